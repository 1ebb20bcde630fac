"""Tools in a request: which of them the prompt shows, the grammar that calls follow, and how calls are written.

A request's tools come in; out come texts for the prompt, a grammar for llguidance, and messages or deltas with calls.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.calls import ID, Arguments, Begun, CallForm, CallReader, Part
from lorafit.data.examples import Message
from lorafit.data.render import Renderer
from lorafit.data.tools import bound, name_of, read_tools
from lorafit.errors import RequestError

# Unless `strict` is set, arguments are any JSON object, written as in training: a grammar made of the schema would fix
# the order of its properties, and an adapter that learnt another order could not write those that come too late.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY = {"type": "object"}
NOT_OBJECTS = ("array", "boolean", "integer", "null", "number", "string")  # the other types of JSON


@dataclass(frozen=True)
class Calling:
    """The tools of a request: texts that the prompt shows, form of the calls in an answer (None where none is read),
    grammar that an answer follows, in llguidance's dialect of Lark, and special tokens in the marks of calls."""

    tools: tuple[str, ...] = ()
    form: CallForm | None = None
    grammar: str | None = None
    special: frozenset[int] = frozenset()


def _refuse(problem: str, fix: str, field: str = "tools") -> None:
    raise RequestError(f"{field}: {problem}: {fix}")


def conversation(messages: Sequence[Message]) -> list[Message]:
    """A conversation with numbered calls, each bound to its answer, as in training. Raises RequestError for an answer
    without a call, and for a call without an answer."""
    return bound(messages, [f"messages[{i}]" for i in range(len(messages))], _refuse)


def shown(tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> tuple[str, ...]:
    """The tools of a request that its prompt shows. Raises RequestError."""
    texts = read_tools({"tools": [*tools] if tools else None}, _refuse)
    return () if choice == "none" else texts


def calling(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None, renderer: Renderer
) -> Calling:
    """Read the tools of a request.

    Args:
        tools: of the request.
        choice: its `tool_choice`: "none", "auto", "required", or a function by its name.
        parallel: its `parallel_tool_calls`.
        renderer: of the adapter that answers.

    Raises:
        RequestError: for invalid tools, and for a choice that is not among them.
    """
    texts = shown(tools, choice)
    names = [name_of(tool) for tool in texts]
    named = choice["function"]["name"] if isinstance(choice, Mapping) else None
    if named is not None and named not in names:
        raise RequestError(f"tool_choice: '{named}' is none of the tools: name one of {', '.join(names) or 'none'}")
    if not texts:
        if choice == "required":
            raise RequestError("tool_choice: there are no tools to choose from: give tools")
        return Calling()
    strict = {
        tool["function"]["name"]: _object_schema(tool["function"].get("parameters") or ANY, f"tools[{i}]")
        for i, tool in enumerate(tools or ())
        if tool["function"].get("strict")
    }
    schemas = {name: strict.get(name, ANY) for name in ([named] if named else names)}
    form, added = renderer.call_form, renderer.tokenizer.added_tokens_decoder
    must, several = choice == "required" or named is not None, parallel is not False and not named
    known = {
        str(token): id_
        for id_, token in added.items()
        if id_ not in renderer.stop_ids
        and str(token) not in renderer.rowless
        and (token.special or re.fullmatch("<.*>", str(token)))
    }
    barred = renderer.thought.opening if renderer.thought else ""
    grammar = grammar_of(form, schemas, known, must, several, barred)
    _require_valid(grammar)
    return Calling(texts, form, grammar, renderer.marks)


def _object_schema(schema: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """A strict schema, narrowed to objects, as arguments are. Raises RequestError for one that allows no object."""
    types = schema.get("type", "object")
    if types in NOT_OBJECTS or (isinstance(types, list) and "object" not in types):
        _refuse(
            f"a strict schema of the type {json.dumps(types)}, but arguments are an object",
            "set the type to object, or set strict to false",
            f"{place}.function.parameters",
        )
    return {**schema, "type": "object" if isinstance(types, list) else types}


def _require_valid(grammar: str) -> None:
    """Raise RequestError for a grammar that llguidance does not take, because of a strict schema."""
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise RequestError("tools: calls need llguidance: pip install llguidance") from error
    if problem := LLMatcher.validate_grammar(grammar):
        raise RequestError(f"tools: {problem}: make the schema simpler, or set strict to false")


def grammar_of(
    form: CallForm,
    schemas: Mapping[str, Mapping[str, Any]],
    added: Mapping[str, int],
    must: bool,
    several: bool,
    barred: str = "",
) -> str:
    """The grammar of an answer that may call tools, in llguidance's dialect of Lark: words only, or the marks of calls
    around known names and JSON arguments.

    Args:
        form: of calls in an answer.
        schemas: of the arguments, by the names that may be called.
        added: ids of the added tokens that llguidance does not take for text (special ones, and those in angle
            brackets), by their text; without those that end an answer. A mark of calls may be such a token, and words
            may hold the others.
        must: whether the answer must consist of calls only.
        several: whether it may hold more than one call.
        barred: the mark before reasoning, where the model may have learnt one; "" without. Where it is a token, words
            must not hold it; where it is text, words must not begin with its first character, since a mark that is
            begun and cannot be completed would continue as nonsense.
    """
    marks = "\n".join([form.opens, form.closes, form.joins or "", *(name + form.between for name in schemas)])
    ids, added = added, {token: id_ for token, id_ in added.items() if token in marks}
    joins = form.joins if several else None
    calls = "one" + " (joins one)*" * (joins is not None) + " closes" * bool(form.closes)
    rules = {"one": " | ".join(f"call_{i}" for i in range(len(schemas)))}
    for i, (name, schema) in enumerate(schemas.items()):
        rules[f"call_{i}"] = f"{_mark(name + form.between, added)} arguments_{i}"
        rules[f"arguments_{i}"] = f"%json {json.dumps({**schema, 'x-guidance': WRITTEN}, ensure_ascii=False)}"
    rules |= {"joins": _mark(joins, added)} if joins else {}
    rules |= {"closes": _mark(form.closes, added)} if form.closes else {}
    rules |= {"TEXT": "/(.|\\n)+/", "SPACE": "/[ \\n]{1,3}/", "ID": "/[A-Za-z0-9]{9}/"}
    first = _pieces(form.opens.lstrip(), added)[0]
    rest = _mark(form.opens.lstrip()[len(first) :], added)
    others = sorted(id_ for token, id_ in ids.items() if token not in (first, barred))
    is_text = barred and not any(barred.startswith(token) for token in ids)
    bar = f" & ~/\\s*{_escaped(barred[0])}(.|\\n)*/" if is_text else ""
    other = f"<[{','.join(map(str, others))}]>"
    words = f"(TEXT? {other})* " if others else ""
    if must:  # some templates put white space before an answer
        rules["start"] = f"SPACE? {_mark(form.opens.lstrip(), added)} {calls}"
    elif first in added:
        rules["TEXT"] += f" & ~/(.|\\n)*{_escaped(first)}(.|\\n)*/{bar}"  # as text it would be read as a call
        before = f"{words}TEXT? " if form.after_words else ""
        rules["start"] = f"{before}{_mark(form.opens.lstrip(), added)} {calls} | {words}TEXT?"
    elif form.after_words:
        rules["TEXT"] += bar
        spaced = f" | /\\s*{_escaped(first)}/" if bar else ""  # the marks of calls and of reasoning may begin alike
        rules["head[lazy]"] = f"(/(.|\\n)*{_escaped(first)}/{bar}){spaced}"
        rules["start"] = f"{words}head {rest} {calls} | {words}TEXT?"
    else:
        rules["OTHER"] = f"/(.|\\n)+/ & ~/\\s*{_escaped(first)}(.|\\n)*/{bar}"
        opens = f"{_mark(form.opens, added)} {calls}"
        rules["start"] = f"{opens} | OTHER?" + f" | OTHER? {other} {words}TEXT?" * bool(others)
    return "\n".join(["%llguidance {}", *(f"{name}: {rule}" for name, rule in rules.items())])


def _pieces(mark: str, added: Mapping[str, int]) -> list[str]:
    """A mark, split at the tokens that were added to the vocabulary, and at ids."""
    known = sorted([*added, ID], key=len, reverse=True)
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, known))})", mark) if piece]


def _mark(mark: str, added: Mapping[str, int]) -> str:
    """A mark as a rule. White space between an added token and text is optional, since tokenizers differ in it."""
    pieces = _pieces(mark, added)
    terms: list[str] = []
    for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
        if piece in added or piece == ID:
            terms.append(f"<[{added[piece]}]>" if piece in added else "ID")
            continue
        text = piece.lstrip() if before in added else piece
        text = text.rstrip() if after in added else text
        starts, ends = text == "" or not piece.startswith(text), text != "" and not piece.endswith(text)
        quoted = [json.dumps(text, ensure_ascii=False)] * bool(text)
        terms += ["SPACE?"] * starts + quoted + ["SPACE?"] * ends
    return " ".join(terms)


def _escaped(text: str) -> str:
    """A mark as part of a pattern, with any white space between its parts, as the reader allows."""
    return r"\s*".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in part) for part in text.split())


def deltas(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts of an answer as the deltas of a stream."""
    made: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Begun(number, name):
                made.append({"tool_calls": [{"index": number, **_call(name, "")}]})
            case Arguments(number, text):
                made.append({"tool_calls": [{"index": number, "function": {"arguments": text}}]})
            case _:
                made.append({"content": part.text})
    return made


def message(reader: CallReader) -> dict[str, Any]:
    """The message of a whole answer."""
    words = {"role": "assistant", "content": reader.words}
    if not reader.calls:
        return words
    calls = [_call(call.name, call.arguments) for call in reader.calls]
    return {**words, "content": reader.words or None, "tool_calls": calls}


def finish_of(finish: str | None, reader: CallReader | None) -> str | None:
    """The finish_reason of an answer: `tool_calls` where it holds calls, and `length` where a stop text cut a call."""
    finish = "stop" if finish == "cancelled" else finish
    if finish != "stop" or reader is None:
        return finish
    return "length" if reader.is_cut else "tool_calls" if reader.calls else finish


def _call(name: str, arguments: str) -> dict[str, Any]:
    """A call with a new id, by which a client refers to it."""
    id_ = f"call_{secrets.token_hex(12)}"
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
