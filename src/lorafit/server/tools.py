"""Tools in a request: what of them the prompt shows, what an answer is kept to, and how its calls are told."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.calls import ID, Arguments, Begun, CallForm, CallReader, Part
from lorafit.data.examples import Call, Message
from lorafit.data.render import Renderer
from lorafit.data.tools import bound, name_of, read_tools
from lorafit.errors import RequestError

# Arguments are any JSON object, written as they are learnt: a grammar made of a schema would hold them to the order of
# its properties, and take those that come later in it from an adapter that learnt another. `strict` asks for that.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY = {"type": "object"}
KINDS = ("array", "boolean", "integer", "null", "number", "string")  # of JSON, that are no object


@dataclass(frozen=True)
class Calling:
    """What a request may call. tools: that the prompt shows. form: of the calls in an answer; None where none is looked
    for. grammar: what an answer is kept to. must: whether it is calls, and no words. special: special tokens that the
    marks of calls are made of."""

    tools: tuple[str, ...] = ()
    form: CallForm | None = None
    grammar: str | None = None
    must: bool = False
    special: frozenset[int] = frozenset()


def _refuse(what: str, fix: str, field: str = "tools") -> None:
    raise RequestError(f"{field}: {what}: {fix}")


def conversation(messages: Sequence[Message]) -> list[Message]:
    """A conversation with its calls numbered and answered, as it is learnt. Raises RequestError for an answer without a
    call, and for a call without an answer."""
    return bound(messages, [f"messages[{i}]" for i in range(len(messages))], _refuse)


def shown(tools: Sequence[Mapping[str, Any]] | None, choice: Any) -> tuple[str, ...]:
    """The tools of a request that its prompt shows. Raises RequestError."""
    read = read_tools({"tools": [*tools] if tools else None}, _refuse)
    return () if choice == "none" else read


def calling(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None, renderer: Renderer
) -> Calling:
    """
    Args:
        tools: of the request.
        choice: its `tool_choice`: "none", "auto", "required", or a function by its name.
        parallel: its `parallel_tool_calls`.
        renderer: of the adapter that answers.

    Raises:
        RequestError: for tools that are none, or a choice among others.
    """
    seen = shown(tools, choice)
    names = [name_of(tool) for tool in seen]
    named = choice["function"]["name"] if isinstance(choice, Mapping) else None
    if named is not None and named not in names:
        raise RequestError(f"tool_choice: '{named}' is none of the tools: name one of {', '.join(names) or 'none'}")
    if not seen:
        if choice == "required":
            raise RequestError("tool_choice: there are no tools to choose from: give tools")
        return Calling()
    strict = {
        one["function"]["name"]: _of_object(one["function"].get("parameters") or ANY, f"tools[{i}]")
        for i, one in enumerate(tools or ())
        if one["function"].get("strict")
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
    _require_kept(grammar)
    return Calling(seen, form, grammar, must, renderer.marks)


def _of_object(schema: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """A strict schema that takes objects alone, for arguments are one. Raises RequestError where it takes none."""
    kinds = schema.get("type", "object")
    if kinds in KINDS or (isinstance(kinds, list) and "object" not in kinds):
        _refuse(
            f"a strict schema of the type {json.dumps(kinds)}, and arguments are an object",
            "write the type object, or set strict to false",
            f"{place}.function.parameters",
        )
    return {**schema, "type": "object" if isinstance(kinds, list) else kinds}


def _require_kept(grammar: str) -> None:
    """Raise RequestError for a grammar that no answer can be kept to: that of a strict schema."""
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
    """What an answer with calls is kept to, in llguidance's dialect of Lark: words alone, or the marks of calls with
    names that are known and arguments that are JSON.

    Args:
        form: how calls stand in it.
        schemas: of the arguments, by the names that may be called.
        added: ids of the tokens that llguidance takes for no text, by what they are written as, without those that end
            an answer: special ones, and those in angle brackets. A mark of calls may be one, words may hold the others.
        must: whether the answer is calls, and no words.
        several: whether it may hold more than one.
        barred: the mark before a thought, where the model may have learnt one. Words do not hold it where it is a
            token, and where it is text do not begin with its first character: a mark that is begun and cannot be ended
            would go on as nonsense.
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
        rules["TEXT"] += f" & ~/(.|\\n)*{_escaped(first)}(.|\\n)*/{bar}"  # spelt out it would be read as a call
        before = f"{words}TEXT? " if form.after_words else ""
        rules["start"] = f"{before}{_mark(form.opens.lstrip(), added)} {calls} | {words}TEXT?"
    elif form.after_words:
        rules["TEXT"] += bar
        spaced = f" | /\\s*{_escaped(first)}/" if bar else ""  # a mark of calls may begin as that of a thought does
        rules["head[lazy]"] = f"(/(.|\\n)*{_escaped(first)}/{bar}){spaced}"
        rules["start"] = f"{words}head {rest} {calls} | {words}TEXT?"
    else:
        rules["OTHER"] = f"/(.|\\n)+/ & ~/\\s*{_escaped(first)}(.|\\n)*/{bar}"
        opens = f"{_mark(form.opens, added)} {calls}"
        rules["start"] = f"{opens} | OTHER?" + f" | OTHER? {other} {words}TEXT?" * bool(others)
    return "\n".join(["%llguidance {}", *(f"{name}: {rule}" for name, rule in rules.items())])


def _pieces(mark: str, added: Mapping[str, int]) -> list[str]:
    """A mark cut at the tokens that were added to the vocabulary, and at ids."""
    known = sorted([*added, ID], key=len, reverse=True)
    return [piece for piece in re.split(f"({'|'.join(map(re.escape, known))})", mark) if piece]


def _mark(mark: str, added: Mapping[str, int]) -> str:
    """A mark as a rule. Where an added token and text meet, tokenizers treat white space in many ways: some may be
    there, or none."""
    pieces = _pieces(mark, added)
    found: list[str] = []
    for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
        if piece in added or piece == ID:
            found.append(_piece(piece, added))
            continue
        text = piece.lstrip() if before in added else piece
        text = text.rstrip() if after in added else text
        starts, ends = text == "" or not piece.startswith(text), text != "" and not piece.endswith(text)
        found += ["SPACE?"] * starts + [_text(text)] * bool(text) + ["SPACE?"] * ends
    return " ".join(found)


def _piece(piece: str, added: Mapping[str, int]) -> str:
    return f"<[{added[piece]}]>" if piece in added else "ID" if piece == ID else _text(piece)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A mark as part of a pattern, with white space as the reader takes it."""
    return r"\s*".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in part) for part in text.split())


def deltas(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts of an answer as the deltas of a stream."""

    def one(number: int, **call: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": number, **call}]}

    found = []
    for part in parts:
        match part:
            case Begun(number, name):
                found.append(one(number, id=new_id(), type="function", function={"name": name, "arguments": ""}))
            case Arguments(number, text):
                found.append(one(number, function={"arguments": text}))
            case _:
                found.append({"content": part.text})
    return found


def message(reader: CallReader) -> dict[str, Any]:
    """A whole answer, read, as a message of a client."""
    words = {"role": "assistant", "content": reader.words}
    if not reader.calls:
        return words
    return {**words, "content": reader.words or None, "tool_calls": [_told(call) for call in reader.calls]}


def finish_of(finish: str | None, reader: CallReader | None) -> str | None:
    """Why an answer ended, as clients are told: where it ended by itself with calls, they are to be answered. One that
    a stop text ended within a call is cut, as one is that grew too long."""
    if finish != "stop" or reader is None:
        return finish
    return "length" if reader.is_cut else "tool_calls" if reader.calls else finish


def _told(call: Call) -> dict[str, Any]:
    return {"id": new_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def new_id() -> str:
    """By which a client names a call to what answers it."""
    return f"call_{secrets.token_hex(12)}"
