"""One reading of tools, of calls and of what tools answer, for examples that are learnt and for requests."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorafit.data.examples import Call, Message
from lorafit.data.fields import filled, unpacked

CALLS = ("tool_calls", "function_call", "tool_call")  # fields of a message that hold calls
OF_CALLS = (*CALLS, "tool_call_id")  # and the one that names the call which a tool answers
OF_A_CALL = ("function", "name", "id", "type", "index", "strict")  # fields of a call beside its arguments
OF_ROWS = ("tools", "functions", "parallel_tool_calls")  # fields of a row, or of a request
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")  # of a tool: what no rendering takes for its own marks
DEEPEST = 4  # how far into a schema it is read whether it takes null: one may name itself
FUNCTION = '{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}'
ONE_CALL = '{"type": "function", "function": {"name": "find", "arguments": "{}"}}'

Wrong = Callable[..., None]
"""wrong(what, fix, field): report a problem of the row, or of the request, at hand."""


def read_tools(given: Mapping[str, Any], wrong: Wrong) -> tuple[str, ...]:
    """The tools that a row or a request describes.

    Args:
        given: its fields. `tools` is a list as OpenAI has it, `functions` one of the functions alone.
        wrong: is told every problem.

    Returns:
        Each tool as JSON of one form, `{"type": "function", "function": {"name", "description", "parameters", ...}}`,
        so that equal tools are rendered alike however they were written; of no use where a problem was told.
    """
    found: dict[str, str] = {}
    for field in ("tools", "functions"):
        held = unpacked(given.get(field))
        if not filled(held):
            continue
        if not isinstance(held, list):
            wrong("not a list of tools", f"write [{FUNCTION}, ...]", field)
            continue
        for i, one in enumerate(held):
            place = f"{field}[{i}]"
            name, text = _tool(unpacked(one), place, wrong)
            if name in found and found[name] != text:
                wrong(f"a second tool of the name {name}", "give it another name", place)
            elif name:
                found[name] = text
    return tuple(found.values())


def _tool(one: Any, place: str, wrong: Wrong) -> tuple[str, str]:
    """Name and JSON of a tool; empty, with the problem told, for what is none."""
    kind = one.get("type", "function") if isinstance(one, dict) else None
    function = one.get("function", one) if isinstance(one, dict) else one
    if not isinstance(function, dict) or (kind != "function" and "function" in one):
        wrong("not the description of a function", f"write {FUNCTION}", place)
        return "", ""
    if kind not in ("function", None) and "name" not in function:
        wrong(
            f"a tool of the type {json.dumps(kind, default=str)}, and only functions are called here",
            "leave it out",
            place,
        )
        return "", ""
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        wrong(
            f"{json.dumps(name, default=str)}, where a function has its name",
            "write up to 128 letters, digits, and _ . : -",
            f"{place}.name",
        )
        return "", ""
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        wrong("not a JSON schema", 'write {"type": "object", "properties": {...}}', f"{place}.parameters")
        return "", ""
    if (odd := _odd_property(parameters or {})) is not None:
        wrong(
            "not described by a JSON schema",
            'write {"type": "string"}, or what else it takes',
            f"{place}.parameters.{odd}",
        )
        return "", ""
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
        return name, sys.intern(text)  # most rows describe the same
    except (TypeError, ValueError, RecursionError) as error:
        wrong(f"cannot be written as JSON ({error})", "write what JSON knows", place)
        return "", ""


def _odd_property(parameters: Mapping[str, Any]) -> str | None:
    """Where the properties of a schema are none, or the first that no schema describes; None where all are."""
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
    """A schema without what is null in it: tables fill the fields of one tool with null where another has them."""
    if isinstance(value, dict):
        return {
            key: held if key in ("enum", "const", "default", "examples") else without_nulls(held)
            for key, held in value.items()
            if held is not None or key in ("const", "default")
        }
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def read_calls(turn: Mapping[str, Any], place: str, wrong: Wrong) -> tuple[Call, ...] | None:
    """The calls that a message makes, with the ids that it gives them; None, with its problems told, where they cannot
    be read. Arguments may be an object, or the text of one."""
    held = [(field, unpacked(turn[field])) for field in CALLS if filled(turn.get(field))]
    if len(held) > 1:
        wrong(f"calls in both {held[0][0]} and {held[1][0]}", "leave one of them", place)
        return None
    found = []
    for field, value in held:
        many = isinstance(value, list)
        for i, one in enumerate(value if many else [value]):
            found.append(read_call(one, f"{place}.{field}[{i}]" if many else f"{place}.{field}", wrong))
    called = tuple(call for call in found if call is not None)
    return called if len(called) == len(found) else None


def read_call(one: Any, place: str, wrong: Wrong) -> Call | None:
    """One call; None, with its problem told, where it cannot be read."""
    one = unpacked(one)
    function = unpacked(one.get("function", one)) if isinstance(one, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not NAME.fullmatch(name):
        wrong("not a call of a function by its name", f"write {ONE_CALL}", place)
        return None
    by = "parameters" if function.get("arguments") is None else "arguments"
    fields = {**one, **function}
    strange = next((key for key, value in fields.items() if key not in (*OF_A_CALL, by) and filled(value)), None)
    if strange is not None:
        wrong(
            f"a call with '{strange}', which nothing reads",
            "leave it out, or call it arguments if it holds them",
            place,
        )
        return None
    given = function.get(by)
    try:
        arguments = json.loads(given, parse_constant=_no_number) if isinstance(given, str) and given.strip() else given
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, dict):
            raise TypeError("not an object")
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        wrong(f"arguments that are no JSON object ({error})", 'write {"name": value, ...}, or that as text', place)
        return None
    id_ = one.get("id")
    return Call(name, text, id_ if isinstance(id_, str) else "")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def claim(turn: Mapping[str, Any]) -> Call:
    """What a tool's message says of the call that it answers."""
    id_, name = turn.get("tool_call_id"), turn.get("name")
    return Call(name if isinstance(name, str) else "", "{}", id_ if isinstance(id_, str) else "")


def bound(messages: Sequence[Message], places: Sequence[str], wrong: Wrong) -> list[Message]:
    """A conversation in which every call has its number as id, and every answer of a tool stands at its call.

    Ids are drawn anew by every program, and some templates write them: numbers are what can be learnt and served alike.
    Answers are put in the order of the calls, for many templates show no ids.

    Args:
        messages: with the ids that they were given.
        places: of each, as problems name it.
        wrong: is told of an answer without a call, and of a call without an answer.
    """
    found: list[Message] = []
    waiting: list[tuple[Call, Call]] = []  # calls without an answer: as they were given, and numbered
    answered: list[tuple[str, Message]] = []  # by the id of the call
    number, asked_at = 0, ""
    for message, place in zip(messages, places, strict=True):
        if message.role == "tool":
            said = message.answers or Call("", "{}")
            by_id = [pair for pair in waiting if said.id and pair[0].id == said.id]
            without_ids = not said.id or not any(given.id for given, _ in waiting)
            fits = by_id or [pair for pair in waiting if without_ids and said.name in ("", pair[0].name)]
            if not fits:
                wrong(
                    "the answer of a tool that answers no call before it",
                    "give it the tool_call_id of that call",
                    place,
                )
                continue
            waiting.remove(fits[0])
            answered.append((fits[0][1].id, replace(message, answers=fits[0][1])))
            continue
        if waiting:
            wrong(
                f"a call of {waiting[0][0].name} that no tool answers, in a conversation that goes on",
                "add the tool's message behind it",
                asked_at,
            )
        found += [answer for _, answer in sorted(answered, key=lambda one: one[0])]
        calls = tuple(replace(call, id=f"call{number + i:05}") for i, call in enumerate(message.calls))
        number, asked_at, answered = number + len(calls), place, []
        waiting = list(zip(message.calls, calls, strict=True))
        found.append(replace(message, calls=calls))
    return found + [answer for _, answer in sorted(answered, key=lambda one: one[0])]


def name_of(tool: str) -> str:
    """The name of a tool that `read_tools` has read."""
    return str(json.loads(tool)["function"]["name"])


def known_calls(
    messages: Sequence[Message], tools: Sequence[str], places: Sequence[str], wrong: Wrong
) -> list[Message]:
    """The messages with calls of the tools that are described, where any are: without the nulls by which tables fill
    the arguments of one tool where another has them.

    Args:
        messages: of one conversation.
        tools: as `read_tools` read them.
        places: of each message, as problems name it.
        wrong: is told of every call of another tool, and of one to be learnt that lacks what its tool requires.
    """
    functions = {function["name"]: function for function in (json.loads(tool)["function"] for tool in tools)}
    found = []
    for message, place in zip(messages, places, strict=True):
        calls = []
        for call in message.calls:
            if functions and call.name not in functions:
                wrong(
                    f"calls {call.name}, which is none of its tools ({', '.join([*functions][:6])})",
                    "add its description, or correct the name",
                    place,
                )
            elif missing := _missing(call, functions.get(call.name)) if message.learnt else []:
                wrong(
                    f"calls {call.name} without '{missing[0]}', which it requires",
                    "add the argument, or take it out of what the tool requires",
                    place,
                )
            calls.append(_without_filling(call, functions.get(call.name)))
        found.append(replace(message, calls=tuple(calls)) if calls else message)
    return found


def _required(function: Mapping[str, Any] | None) -> list[str]:
    required = function["parameters"].get("required") if function else None
    return required if isinstance(required, list) else []


def _missing(call: Call, function: Mapping[str, Any] | None) -> list[str]:
    """Arguments that the function requires and the call lacks."""
    given = json.loads(call.arguments)
    return [name for name in _required(function) if isinstance(name, str) and name not in given]


def _without_filling(call: Call, function: Mapping[str, Any] | None) -> Call:
    arguments = json.loads(call.arguments)
    if function is None or None not in arguments.values():
        return call
    whole = function["parameters"]
    properties, needed = whole.get("properties") or {}, _required(function)
    others = bool(whole.get("patternProperties")) or _takes_null(whole.get("additionalProperties", False), whole)
    kept = {
        name: value
        for name, value in arguments.items()
        if value is not None
        or name in needed
        or (_takes_null(properties[name], whole) if name in properties else others)
    }
    if kept == arguments:
        return call
    return replace(call, arguments=json.dumps(kept, ensure_ascii=False))


def _takes_null(schema: Any, whole: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether null keeps to a schema. whole: in which it may name another. What cannot be told is taken for yes."""
    if not isinstance(schema, dict) or depth > DEEPEST:
        return schema is not False
    if schema.get("nullable"):
        return True
    kinds = schema.get("type", "null")
    takes = ["null" in (kinds if isinstance(kinds, list) else [kinds])]
    takes += [None in schema["enum"]] if isinstance(schema.get("enum"), list) else []
    takes += [schema["const"] is None] if "const" in schema else []
    for joint, of in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        if isinstance(schema.get(joint), list):
            takes.append(of(_takes_null(one, whole, depth + 1) for one in schema[joint]))
    if isinstance(schema.get("$ref"), str):
        takes.append(_takes_null(_named(schema["$ref"], whole), whole, depth + 1))
    return all(takes)


def _named(reference: str, whole: Mapping[str, Any]) -> Any:
    """The part of a schema that a reference within it names; None where there is none."""
    found: Any = whole
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, dict) else None
    return found
