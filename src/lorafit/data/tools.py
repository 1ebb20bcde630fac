"""Descriptions of tools, calls of tools, and their answers, read alike in examples and in requests.

Fields of a row, a message or a request go in; tools as JSON and `Call`s, or a report of every problem, come out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorafit.data.equality import refuse_constant
from lorafit.data.examples import Call, Message
from lorafit.data.fields import filled, unpacked

CALLS = ("tool_calls", "function_call", "tool_call")  # fields of a message that hold calls
CALL_FIELDS = (*CALLS, "tool_call_id")  # and the field that names the call which a tool answers
CALL_KEYS = ("function", "name", "id", "type", "index", "strict")  # keys of a call next to its arguments
TOOL_FIELDS = ("tools", "functions", "parallel_tool_calls")  # fields of a row, or of a request
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")  # of a tool: what no rendering takes for its own marks
DEEPEST = 4  # levels of a schema that are searched for null: a schema may refer to itself
FUNCTION = '{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}'
ONE_CALL = '{"type": "function", "function": {"name": "find", "arguments": "{}"}}'

Wrong = Callable[..., None]
"""wrong(what, fix, field): report a problem of the row, or of the request, at hand."""


def read_tools(fields: Mapping[str, Any], wrong: Wrong) -> tuple[str, ...]:
    """Read the tools that a row or a request describes.

    Args:
        fields: of the row or request: `tools` is a list as OpenAI has it, `functions` a list of only the functions.
        wrong: receives every problem.

    Returns:
        Each tool as JSON of one form, `{"type": "function", "function": {"name", "description", "parameters", ...}}`,
        so that equal tools are rendered alike however they were written; of no use where there was a problem.
    """
    tools: dict[str, str] = {}
    for field in ("tools", "functions"):
        descriptions = unpacked(fields.get(field))
        if not filled(descriptions):
            continue
        if not isinstance(descriptions, list):
            wrong("not a list of tools", f"write [{FUNCTION}, ...]", field)
            continue
        for i, description in enumerate(descriptions):
            place = f"{field}[{i}]"
            name, text = _read_tool(unpacked(description), place, wrong) or ("", "")
            if name in tools and tools[name] != text:
                wrong(f"a second tool of the name {name}", "give it another name", place)
            elif name:
                tools[name] = text
    return tuple(tools.values())


def _read_tool(tool: Any, place: str, wrong: Wrong) -> tuple[str, str] | None:
    """Name and JSON of a tool; None where there was a problem."""
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    name, parameters = (function.get(key) if isinstance(function, dict) else None for key in ("name", "parameters"))
    if not isinstance(function, dict) or (kind != "function" and "function" in tool):
        problem = ("not the description of a function", f"write {FUNCTION}", place)
    elif kind not in ("function", None) and "name" not in function:
        what = f"a tool of the type {json.dumps(kind, default=str)}, and only functions are called here"
        problem = (what, "leave it out", place)
    elif not isinstance(name, str) or not NAME.fullmatch(name):
        what = f"{json.dumps(name, default=str)}, where a function has its name"
        problem = (what, "write up to 128 letters, digits, and _ . : -", f"{place}.name")
    elif parameters is not None and not isinstance(parameters, dict):
        problem = ("not a JSON schema", 'write {"type": "object", "properties": {...}}', f"{place}.parameters")
    elif (odd := _odd_property(parameters or {})) is not None:
        fix = 'write {"type": "string"}, or what else it takes'
        problem = ("not described by a JSON schema", fix, f"{place}.parameters.{odd}")
    else:
        known = {
            "name": name,
            "description": function.get("description"),
            "parameters": parameters or {"type": "object", "properties": {}},
        }
        # `strict` asks something of the server, and says nothing to the model.
        more = {key: value for key, value in function.items() if key not in (*known, "strict", "type")}
        whole = {"type": "function", "function": without_nulls({**known, **more})}
        try:
            text = json.dumps(whole, ensure_ascii=False)
            text.encode()
            return name, sys.intern(text)  # most rows describe the same tools
        except (TypeError, ValueError, RecursionError) as error:
            problem = (f"cannot be written as JSON ({error})", "write what JSON knows", place)
    wrong(*problem)
    return None


def _odd_property(parameters: Mapping[str, Any]) -> str | None:
    """The path of the first property that has no schema; None where all have one."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict | None):
        return "properties"
    for name, schema in (properties or {}).items():
        kinds = schema.get("type") if isinstance(schema, dict) else None
        kinds = kinds if isinstance(kinds, list) else [] if kinds is None else [kinds]
        if not isinstance(schema, dict | bool | None) or not all(isinstance(kind, str) for kind in kinds):
            return f"properties.{name}"
    return None


def without_nulls(value: Any) -> Any:
    """A schema without nulls: tables fill the fields that only another tool has with null."""
    if isinstance(value, dict):
        return {
            key: held if key in ("enum", "const", "default", "examples") else without_nulls(held)
            for key, held in value.items()
            if held is not None or key in ("const", "default")
        }
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def read_calls(turn: Mapping[str, Any], place: str, wrong: Wrong) -> tuple[Call, ...] | None:
    """Read the calls that a message makes. Arguments may be an object, or the text of an object.

    Args:
        turn: the message as it was given.
        place: of the message, as problems name it.
        wrong: receives every problem.

    Returns:
        The calls with the ids that the message gives them; None where there was a problem.
    """
    filled_fields = [(field, unpacked(turn[field])) for field in CALLS if filled(turn.get(field))]
    if len(filled_fields) > 1:
        wrong(f"calls in both {filled_fields[0][0]} and {filled_fields[1][0]}", "leave one of them", place)
        return None
    calls: list[Call | None] = []
    for field, value in filled_fields:
        if isinstance(value, list):
            calls += [_read_call(call, f"{place}.{field}[{i}]", wrong) for i, call in enumerate(value)]
        else:
            calls.append(_read_call(value, f"{place}.{field}", wrong))
    read = tuple(call for call in calls if call is not None)
    return read if len(read) == len(calls) else None


def _read_call(value: Any, place: str, wrong: Wrong) -> Call | None:
    """Read a call; None where there was a problem."""
    value = unpacked(value)
    function = unpacked(value.get("function", value)) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not NAME.fullmatch(name):
        wrong("not a call of a function by its name", f"write {ONE_CALL}", place)
        return None
    key = "parameters" if function.get("arguments") is None else "arguments"
    fields = {**value, **function}
    strange = next((name for name, held in fields.items() if name not in (*CALL_KEYS, key) and filled(held)), None)
    if strange is not None:
        fix = "leave it out, or call it arguments if it holds them"
        wrong(f"a call with '{strange}', which nothing reads", fix, place)
        return None
    arguments = function.get(key)
    try:
        if isinstance(arguments, str) and arguments.strip():
            arguments = json.loads(arguments, parse_constant=refuse_constant)
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, dict):
            raise TypeError("not an object")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        wrong(f"arguments that are no JSON object ({error})", 'write {"name": value, ...}, or that as text', place)
        return None
    id_ = value.get("id")
    return Call(name, text, id_ if isinstance(id_, str) else "")


def claim(turn: Mapping[str, Any]) -> Call:
    """The call that a tool's message says it answers: an id, a name, or neither."""
    id_, name = turn.get("tool_call_id"), turn.get("name")
    return Call(name if isinstance(name, str) else "", "{}", id_ if isinstance(id_, str) else "")


def bound(messages: Sequence[Message], places: Sequence[str], wrong: Wrong) -> list[Message]:
    """Number the calls of a conversation, and put every answer of a tool in the place of its call.

    Every program draws other ids, and some templates write them: numbers can be learnt and served alike. Answers are
    put in the order of the calls, for many templates show no ids.

    Args:
        messages: with the ids that they were given.
        places: of each message, as problems name it.
        wrong: receives every answer without a call, and every call without an answer.

    Returns:
        The messages with the number of each call as its id.
    """
    conversation: list[Message] = []
    waiting: list[tuple[Call, Call]] = []  # calls without an answer: as they were given, and numbered
    answers: dict[str, Message] = {}  # by the id of the call
    number, call_place = 0, ""
    for message, place in zip(messages, places, strict=True):
        if message.role == "tool":
            claimed = message.answers or Call("", "{}")
            by_id = [pair for pair in waiting if claimed.id and pair[0].id == claimed.id]
            without_ids = not claimed.id or not any(given.id for given, _ in waiting)
            fitting = by_id or [pair for pair in waiting if without_ids and claimed.name in ("", pair[0].name)]
            if not fitting:
                fix = "give it the tool_call_id of that call"
                wrong("the answer of a tool that answers no call before it", fix, place)
                continue
            waiting.remove(fitting[0])
            call = fitting[0][1]
            answers[call.id] = replace(message, answers=call)
            continue
        if waiting:
            what = f"a call of {waiting[0][0].name} that no tool answers, in a conversation that goes on"
            wrong(what, "add the tool's message behind it", call_place)
        conversation += [answers[id_] for id_ in sorted(answers)]
        calls = tuple(replace(call, id=f"call{number + i:05}") for i, call in enumerate(message.calls))
        number, call_place, answers = number + len(calls), place, {}
        waiting = list(zip(message.calls, calls, strict=True))
        conversation.append(replace(message, calls=calls))
    return conversation + [answers[id_] for id_ in sorted(answers)]


def name_of(tool: str) -> str:
    """The name of a tool that `read_tools` has read."""
    return str(json.loads(tool)["function"]["name"])


def known_calls(
    messages: Sequence[Message], tools: Sequence[str], places: Sequence[str], wrong: Wrong
) -> list[Message]:
    """Check the calls of a conversation against the tools that it describes, if it describes any.

    Args:
        messages: of one conversation.
        tools: as `read_tools` reads them.
        places: of each message, as problems name it.
        wrong: receives every call of another tool, and every call to be learnt that lacks a required argument.

    Returns:
        The messages, without the nulls by which tables fill the arguments that only another tool has.
    """
    functions = {function["name"]: function for function in (json.loads(tool)["function"] for tool in tools)}
    checked = []
    for message, place in zip(messages, places, strict=True):
        calls = []
        for call in message.calls:
            if functions and call.name not in functions:
                names = ", ".join([*functions][:6])
                fix = "add its description, or correct the name"
                wrong(f"calls {call.name}, which is none of its tools ({names})", fix, place)
            elif missing := _missing(call, functions.get(call.name)) if message.learnt else []:
                fix = "add the argument, or take it out of what the tool requires"
                wrong(f"calls {call.name} without '{missing[0]}', which it requires", fix, place)
            calls.append(_without_filling(call, functions.get(call.name)))
        checked.append(replace(message, calls=tuple(calls)) if calls else message)
    return checked


def _required(function: Mapping[str, Any] | None) -> list[str]:
    required = function["parameters"].get("required") if function else None
    return required if isinstance(required, list) else []


def _missing(call: Call, function: Mapping[str, Any] | None) -> list[str]:
    """Arguments that the function requires and the call lacks."""
    arguments = json.loads(call.arguments)
    return [name for name in _required(function) if isinstance(name, str) and name not in arguments]


def _without_filling(call: Call, function: Mapping[str, Any] | None) -> Call:
    """The call without null arguments, except those that its function requires, or that may be null."""
    arguments = json.loads(call.arguments)
    if function is None or None not in arguments.values():
        return call
    schema = function["parameters"]
    properties, required = schema.get("properties") or {}, _required(function)
    others = bool(schema.get("patternProperties")) or _takes_null(schema.get("additionalProperties", False), schema)
    kept = {
        name: value
        for name, value in arguments.items()
        if value is not None
        or name in required
        or (_takes_null(properties[name], schema) if name in properties else others)
    }
    return call if kept == arguments else replace(call, arguments=json.dumps(kept, ensure_ascii=False))


def _takes_null(schema: Any, whole: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether null keeps to the schema of an argument, which may refer to parts of the whole schema. Beyond DEEPEST
    levels null is taken to be allowed."""
    if not isinstance(schema, dict) or depth > DEEPEST:
        return schema is not False
    if schema.get("nullable"):
        return True
    kinds = schema.get("type", "null")
    conditions = ["null" in (kinds if isinstance(kinds, list) else [kinds])]
    conditions += [None in schema["enum"]] if isinstance(schema.get("enum"), list) else []
    conditions += [schema["const"] is None] if "const" in schema else []
    for keyword, quantifier in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        if isinstance(schema.get(keyword), list):
            conditions.append(quantifier(_takes_null(part, whole, depth + 1) for part in schema[keyword]))
    if isinstance(schema.get("$ref"), str):
        conditions.append(_takes_null(_referenced(schema["$ref"], whole), whole, depth + 1))
    return all(conditions)


def _referenced(reference: str, schema: Mapping[str, Any]) -> Any:
    """The part of a schema that a reference within it names; None where there is none."""
    part: Any = schema
    for step in reference.removeprefix("#").strip("/").split("/"):
        part = part.get(step) if isinstance(part, dict) else None
    return part
