"""Tools: calls are learnt as the assistant's words, read back by one reader, scored by being equal, and served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import TEMPLATE, byte_tokenizer, tiny_llama, write_rows
from test_render import pieces, with_tokens
from test_server import Running, adapter_of, served

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base
from lorafit.data.calls import ID, OWN, Arguments, Begun, CallForm, CallReader, Words, worded
from lorafit.data.examples import Call, Example, Examples, Message
from lorafit.data.reading import read_examples
from lorafit.data.render import Renderer, render
from lorafit.data.report import describe
from lorafit.errors import BaseError, DataError, RequestError
from lorafit.evaluation.answers import prompts_of, score_answers
from lorafit.evaluation.compare import compare
from lorafit.generation.greedy import Answer
from lorafit.server import tools as served_tools
from lorafit.server.streams import ChunkWriter, Style
from lorafit.serving import Piece, Request
from lorafit.serving.sampling import Grammar, Sampler, grammar_tokenizer
from lorafit.training.loop import train
from lorafit.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

# Templates of the families, as small as they can be told apart: calls in tags; one call, whose words are left out, and
# answers as JSON; a list with ids behind a token of its own; arguments that must be text; calls that are no JSON.
SHOWN = "{% if tools %}{% for t in tools %}{{ '<|system|>' + (t | tojson) + '<|end|>' }}{% endfor %}{% endif %}"
TURNS = SHOWN + "{% for m in messages %}{{ '<|' + m.role + '|>' }}CALLS{{ '<|end|>' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TAGGED = TURNS.replace(
    "CALLS",
    (
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '\n<call>\n{\"name\": \"' + c.function.name"
        " + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\n</call>' }}{% endfor %}"
    ),
)
ALONE = TURNS.replace(
    "CALLS",
    (
        "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}"
        '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \''
        " + (m.tool_calls[0].function.arguments | tojson) + '}' }}"
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    ),
)
LISTED = TURNS.replace(
    "CALLS",
    (
        "{{ m.content or '' }}{% if m.tool_calls %}{{ '[CALLS] [' }}{% for c in m.tool_calls %}"
        '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
        "{{ ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' }}{% endif %}"
    ),
)
TEXTUAL = TURNS.replace(
    "CALLS",
    (
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<run>' + c.function.name + '\n```json\n'"
        " + c.function.arguments + '\n```</run>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    ),
)
MARKUP = TURNS.replace(
    "CALLS",
    (
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' }}"
        "{% for k, v in c.function.arguments | items %}{{ '<' + k + '>' + (v | string) }}{% endfor %}{% endfor %}"
    ),
)
THOUGHTFUL = TAGGED.replace(
    "{{ m.content or '' }}",
    (
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
        "{% endif %}{{ m.content or '' }}"
    ),
)
FORGETFUL = TAGGED.replace("{{ m.content or '' }}", "{{ '' if m.role == 'tool' else m.content or '' }}")

# Words beside tools begin with a mark that calls do not have.
CHANNELLED = TAGGED.replace(
    "{{ m.content or '' }}",
    ("{{ '<|pad|>final:' if m.role == 'assistant' and not m.tool_calls else '' }}{{ m.content or '' }}"),
)


@dataclass(frozen=True)
class Family:
    """A tokenizer; whether its template's own calls are used; whether an answer may hold several, and words first."""

    tokenizer: Callable[[], Any]
    own: bool = True
    several: bool = True
    words: bool = True


FAMILIES = {
    "tagged": Family(lambda: byte_tokenizer(TAGGED)),
    "tagged by a token": Family(lambda: with_tokens(TAGGED, "<|end|>", "<call>", "</call>")),
    "one alone": Family(lambda: byte_tokenizer(ALONE), several=False, words=False),
    "listed": Family(lambda: with_tokens(LISTED, "<|end|>", "[CALLS]")),
    "arguments as text": Family(lambda: byte_tokenizer(TEXTUAL), words=False),
    "no JSON": Family(lambda: byte_tokenizer(MARKUP), own=False),
    "answers left out": Family(lambda: byte_tokenizer(FORGETFUL), own=False),
    "words marked": Family(lambda: byte_tokenizer(CHANNELLED), own=False),
    "no tools": Family(lambda: byte_tokenizer(TEMPLATE), own=False),
    "no template": Family(lambda: byte_tokenizer(None), own=False),
}

COUNT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Counts a bay.",
        "parameters": {"type": "object", "properties": {"bay": {"type": "integer"}}, "required": ["bay"]},
    },
}
MOVE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "move_all",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}, "how": {"type": ["string", "null"]}}},
    },
}
ASKED = {"role": "user", "content": "How many are in bay 4?"}
SAID = {"role": "assistant", "content": "Seven of them."}


def call(name: str, arguments: Any, id_: str | None = None) -> dict[str, Any]:
    told = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": id_, **told} if id_ else told


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [*made], **more}


def answer(content: Any, id_: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **({"tool_call_id": id_} if id_ else {}), **more}


def read(tmp_path: Path, *rows: Any, **given: Any) -> tuple[Example, ...]:
    return read_examples(write_rows(tmp_path / "a.jsonl", [*rows]), **given).train


def refusal(tmp_path: Path, *rows: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, *rows)
    return str(caught.value).partition("a.jsonl:")[2]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


# What a row says


WRITTEN: dict[str, dict[str, Any]] = {
    "arguments as text": {"messages": [ASKED, calls(call("count", '{"bay":4}', "x1")), answer("7", "x1"), SAID]},
    "as an object": {"messages": [ASKED, calls(call("count", {"bay": 4}, "9")), answer("7", "9"), SAID]},
    "without ids": {"messages": [ASKED, calls(call("count", {"bay": 4})), answer("7"), SAID]},
    "by names": {"messages": [ASKED, calls(call("count", {"bay": 4})), answer("7", name="count"), SAID]},
    "bare": {"messages": [ASKED, calls({"name": "count", "arguments": {"bay": 4}}), answer("7"), SAID]},
    "in parts": {"messages": [ASKED, calls(call("count", {"bay": 4})), answer([{"type": "text", "text": "7"}]), SAID]},
    "older": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "function_call": {"name": "count", "arguments": '{"bay": 4}'}},
            {"role": "function", "name": "count", "content": "7"},
            SAID,
        ]
    },
    "two lists": {"prompt": [ASKED], "completion": [calls(call("count", {"bay": 4})), answer("7"), SAID]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": ASKED["content"]},
            {"from": "function_call", "value": '{"name": "count", "arguments": {"bay": 4}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": SAID["content"]},
        ]
    },
    "a cell": {
        "messages": json.dumps([ASKED, calls(call("count", {"bay": 4})), answer("7"), SAID]),
        "parallel_tool_calls": True,
    },
}


@pytest.mark.parametrize("row", WRITTEN.values(), ids=WRITTEN)
def test_a_call_is_the_same_however_it_is_written(tmp_path: Path, row: dict[str, Any]) -> None:
    made = Call("count", '{"bay": 4}', "call00000")
    (example,) = read(tmp_path, {**row, "tools": [COUNT]})
    assert example.messages == (
        Message("user", "How many are in bay 4?"),
        Message("assistant", "", calls=(made,)),
        Message("tool", "7", answers=made),
        Message("assistant", "Seven of them."),
    )


@pytest.mark.parametrize(
    "tools",
    [
        [COUNT],
        [COUNT["function"]],
        json.dumps([COUNT]),
        [{**COUNT, "function": {**COUNT["function"], "strict": True, "return": None}}],
    ],
    ids=["OpenAI", "functions", "a cell", "nulls"],
)
@pytest.mark.parametrize("field", ["tools", "functions"])
def test_a_tool_is_the_same_however_it_is_written(tmp_path: Path, tools: Any, field: str) -> None:
    (example,) = read(tmp_path, {"messages": [ASKED, SAID], field: tools})
    assert [json.loads(tool) for tool in example.tools] == [COUNT]


def test_answers_of_tools_stand_in_the_order_of_the_calls(tmp_path: Path) -> None:
    made = calls(call("count", {"bay": 4}, "x"), call("count", {"bay": 5}, "y"))
    again = [ASKED, calls(call("count", {"bay": 6}, "x")), answer("", "x"), SAID]
    (example,) = read(tmp_path, {"messages": [ASKED, made, answer("8", "y"), answer("7", "x"), SAID, *again]})
    told = [(one.content, one.answers.id) for one in example.messages if one.answers]
    assert told == [("7", "call00000"), ("8", "call00001"), ("", "call00002")]


@pytest.mark.parametrize("said", [None, "", [{"type": "text", "text": ""}], []])
def test_a_tool_may_have_nothing_to_say(tmp_path: Path, said: Any) -> None:
    row = {"messages": [ASKED, calls(call("count", {"bay": 4})), answer(said), SAID]}
    assert read(tmp_path, row)[0].messages[2].content == ""


@pytest.mark.parametrize("words", [None, "", [{"type": "text", "text": ""}], []])
def test_a_call_needs_no_words(tmp_path: Path, words: Any) -> None:
    row = {"messages": [ASKED, {**calls(call("count", {"bay": 4})), "content": words}]}
    assert read(tmp_path, row)[0].calls[0].name == "count"


def test_what_fills_the_arguments_of_another_tool_in_a_table_is_left_out(tmp_path: Path) -> None:
    made = calls(call("move_all", {"to": "x", "how": None, "bay": None}))
    (example,) = read(tmp_path, {"messages": [ASKED, made], "tools": [COUNT, MOVE]})
    assert example.calls[0].arguments == '{"to": "x", "how": null}'
    (example,) = read(tmp_path, {"messages": [ASKED, made]})
    assert example.calls[0].arguments == '{"to": "x", "how": null, "bay": null}', "of no tool that is known"


NULLS: dict[str, tuple[dict[str, Any], bool]] = {  # of a tool; whether its argument "to" may be null
    "any other argument": ({"properties": {"bay": {"type": "integer"}}, "additionalProperties": True}, True),
    "others that are texts": ({"properties": {}, "additionalProperties": {"type": "string"}}, False),
    "by its pattern": ({"patternProperties": {"^t": {}}}, True),
    "required": ({"properties": {"to": {"type": "string"}}, "required": ["to"]}, True),
    "one of some": ({"properties": {"to": {"enum": ["x", None]}}}, True),
    "one of some texts": ({"properties": {"to": {"enum": ["x", "y"]}}}, False),
    "nothing else": ({"properties": {"to": {"const": None}}}, True),
    "one of two kinds": ({"properties": {"to": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, True),
    "one of two kinds, none null": ({"properties": {"to": {"anyOf": [{"type": "string"}, {"type": "array"}]}}}, False),
    "named": ({"properties": {"to": {"$ref": "#/$defs/text"}}, "$defs": {"text": {"type": "string"}}}, False),
    "named by itself": ({"properties": {"to": {"$ref": "#/properties/to"}}}, True),
    "anything": ({"properties": {"to": {"description": "Where to."}}}, True),
}


@pytest.mark.parametrize(("parameters", "may"), NULLS.values(), ids=NULLS)
def test_a_null_that_the_schema_takes_is_an_argument(parameters: dict[str, Any], may: bool, tmp_path: Path) -> None:
    tool = {"name": "move", "parameters": {"type": "object", **parameters}}
    (example,) = read(tmp_path, {"messages": [ASKED, calls(call("move", {"to": None}))], "tools": [tool]})
    assert json.loads(example.calls[0].arguments) == ({"to": None} if may else {})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half of an object": (
        {"messages": [ASKED, calls(call("count", '{"bay": '))]},
        "1: messages[1].tool_calls[0]: arguments that are no JSON object",
    ),
    "a list": ({"messages": [ASKED, calls(call("count", "[4]"))]}, "1: messages[1].tool_calls[0]: arguments that are"),
    "no name": (
        {"messages": [ASKED, calls({"type": "function", "function": {"arguments": "{}"}})]},
        "1: messages[1].tool_calls[0]: not a call of a function by its name",
    ),
    "of the user": (
        {"messages": [{**ASKED, "tool_calls": [call("count", {})]}, SAID]},
        "1: messages[0].tool_calls: a call in a message of the user",
    ),
    "two fields": (
        {"messages": [ASKED, calls(call("count", {}), function_call={"name": "count"})]},
        "1: messages[1]: calls in both tool_calls and function_call",
    ),
    "no answer": ({"messages": [ASKED, calls(call("count", {})), SAID]}, "1: messages[1]: a call of count that no"),
    "another id": (
        {"messages": [ASKED, calls(call("count", {}, "x")), answer("7", "y"), SAID]},
        "1: messages[2]: the answer of a tool that answers no call before it",
    ),
    "nobody asked": ({"messages": [ASKED, answer("7"), SAID]}, "1: messages[1]: the answer of a tool that answers no"),
    "unknown": (
        {"messages": [ASKED, calls(call("find", {}))], "tools": [COUNT, MOVE]},
        "1: messages: calls find, which is none of its tools (count, move_all)",
    ),
    "two at once": (
        {"messages": [ASKED, calls(call("count", {}), call("count", {}))], "parallel_tool_calls": False},
        "1: messages: 2 calls in one message, where parallel_tool_calls is false",
    ),
    "a check": (
        {"messages": [ASKED, calls(call("count", {}))], "check": {"contains": ["4"]}},
        "1: check: a check of an answer that is a call",
    ),
    "ends with a tool": ({"messages": [ASKED, calls(call("count", {})), answer("7")]}, "1: messages: ends with a tool"),
    "no function": ({"messages": [ASKED, SAID], "tools": [{"type": "web_search"}]}, "1: tools[0]: a tool of the type"),
    "a text": ({"messages": [ASKED, SAID], "tools": ["count"]}, "1: tools[0]: not the description of a function"),
    "arguments of another name": (
        {"messages": [ASKED, calls({"name": "count", "args": {"bay": 4}})]},
        "1: messages[1].tool_calls[0]: a call with 'args', which nothing reads: leave it",
    ),
    "input": (
        {"messages": [ASKED, calls({"type": "function", "function": {"name": "count", "input": '{"bay": 4}'}})]},
        "1: messages[1].tool_calls[0]: a call with 'input', which nothing reads",
    ),
    "beside the function": (
        {"messages": [ASKED, calls({"function": {"name": "count"}, "kwargs": {"bay": 4}})]},
        "1: messages[1].tool_calls[0]: a call with 'kwargs', which nothing reads",
    ),
    "in sharegpt's form": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "count", "params": {"bay": 4}}'},
            ]
        },
        "1: conversations[1].tool_calls: a call with 'params', which nothing reads",
    ),
    "a required argument missing": (
        {"messages": [ASKED, calls(call("count", {"of": "boxes"}))], "tools": [COUNT]},
        "1: messages: calls count without 'bay', which it requires",
    ),
    "two kinds of arguments": (
        {"messages": [ASKED, calls({"name": "n", "arguments": {}, "parameters": {"bay": 4}})]},
        "1: messages[1].tool_calls[0]: a call with 'parameters', which nothing reads",
    ),
    "a name with blanks": ({"messages": [ASKED, SAID], "tools": [{"name": "count all"}]}, '1: tools[0].name: "count'),
    "no schema": (
        {"messages": [ASKED, SAID], "tools": [{"name": "count", "parameters": []}]},
        "1: tools[0].parameters: not a JSON schema",
    ),
    "a list of properties": (
        {
            "messages": [ASKED, calls(call("count", {"bay": None}))],
            "tools": [{"name": "count", "parameters": {"properties": ["bay"]}}],
        },
        "1: tools[0].parameters.properties: not described",
    ),
    "a type by number": (
        {
            "messages": [ASKED, calls(call("count", {"bay": None}))],
            "tools": [{"name": "count", "parameters": {"properties": {"bay": {"type": 5}}}}],
        },
        "1: tools[0].parameters.properties.bay: not described by a JSON schema",
    ),
    "two of a name": (
        {"messages": [ASKED, SAID], "tools": [COUNT, {"name": "count"}]},
        "1: tools[1]: a second tool of the name count",
    ),
    "no call": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "count"}]},
        "1: conversations[1].value: not a call as JSON",
    ),
}


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_learnt_of_tools_is_named_by_line_and_field(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    assert refusal(tmp_path, row).startswith(said)


@pytest.mark.parametrize("more", [{"args": {}}, {"input": None}, {"index": 0}, {"strict": True}, {"kwargs": ""}])
def test_what_says_nothing_beside_a_call_is_passed_over(tmp_path: Path, more: dict[str, Any]) -> None:
    row = {"messages": [ASKED, calls({**call("count", {"bay": 4}), **more})]}
    assert read(tmp_path, row)[0].calls[0].arguments == '{"bay": 4}'


def test_a_call_that_is_not_learnt_may_lack_an_argument(tmp_path: Path) -> None:
    wrong = {"role": "tool", "content": "bay is missing"}
    row = {
        "messages": [ASKED, calls(call("count", {}), weight=0), wrong, calls(call("count", {"bay": 4}))],
        "tools": [COUNT],
    }
    assert [message.calls[0].arguments for message in read(tmp_path, row)[0].messages if message.calls] == [
        "{}",
        '{"bay": 4}',
    ]


def test_a_call_that_is_not_to_be_learnt_is_context(tmp_path: Path) -> None:
    made = calls(call("count", {"bay": 4}), weight=0)
    (example,) = read(tmp_path, {"messages": [ASKED, made, answer("7"), {**SAID, "weight": 1}], "tools": [COUNT]})
    renderer = Renderer(byte_tokenizer(TAGGED))
    (row,) = renderer.rows(example, 0)
    assert [renderer.tokenizer.decode(row.ids[a:b]) for a, b in pieces(row)] == ["Seven of them.<|end|>"]
    assert '{"bay": 4}' in renderer.tokenizer.decode(row.ids)


def test_rows_that_call_what_they_do_not_describe_are_remarked(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, calls(call("count", {"bay": 4}))]}] * 2
    examples = read_examples(write_rows(tmp_path / "a.jsonl", rows))
    assert "call tools that they do not describe" in [remark.what for remark in describe(examples).remarks]
    assert describe(examples).splits["train"].checked == 2, "a call is its own check"


def test_digests_tell_calls_apart_and_those_of_before_are_known(tmp_path: Path) -> None:
    def read(*rows: Any) -> Examples:
        return read_examples(write_rows(tmp_path / "a.jsonl", [*rows]))

    made = [{"messages": [ASKED, calls(call("count", {"bay": bay}))], "tools": [COUNT]} for bay in (4, 5)]
    assert len({read(one).digest() for one in (*made, {**made[1], "tools": [COUNT, MOVE]})}) == 3
    plain = read({"prompt": "Where is it?", "completion": "In Skerrow."})
    assert plain.has_digest("4ebfe50de9da44ab5ce8232f7b349aa06cd0f4e25af72bebe486bd9a8e541d8f")


# What is trained


def learnt(family: Family, tmp_path: Path) -> tuple[Renderer, Example]:
    renderer = Renderer(family.tokenizer())
    made = [call("count", {"bay": 4, "of": 'a "box" {'}), call("move_all", {"to": "bay 5"})][: 1 + family.several]
    told = [answer("7"), answer("none\nat all")][: 1 + family.several]
    words = "One moment." if family.words else None
    row = {"messages": [ASKED, calls(*made, content=words), *told, SAID], "tools": [COUNT, MOVE]}
    return renderer, read(tmp_path, row)[0]


def test_calls_are_trained_as_the_assistants_words_and_nothing_else(family: Family, tmp_path: Path) -> None:
    renderer, example = learnt(family, tmp_path)
    rows = renderer.rows(example, 0)
    trained = [row.ids[a:b] for row in rows for a, b in pieces(row)]
    words, made = renderer.read(trained[0])
    assert [one.meaning for one in made] == [one.meaning for one in example.messages[1].calls]
    assert words == example.messages[1].content
    assert renderer.tokenizer.decode(trained[-1]).strip() == "Seven of them.<|end|>"
    assert [ids[-1] for ids in trained] == [renderer.stop_ids[0]] * 2
    for before, ids in zip((example.messages[:1], example.messages[:-1]), trained, strict=True):
        prompt = renderer.prompt_ids(before, example.tools)
        assert any(row.ids[: len(prompt) + len(ids)] == (*prompt, *ids) for row in rows)
        assert "Counts a bay." in renderer.tokenizer.decode(prompt)
        assert not any(told in renderer.tokenizer.decode(ids) for told in ("at all", "Counts"))


def test_the_templates_own_form_of_calls_is_used_where_it_can_be_read_back(family: Family) -> None:
    form = Renderer(family.tokenizer()).call_form
    assert (form != OWN) == family.own
    assert (form.joins is not None, form.after_words) == (family.several, family.words)


def test_a_template_without_tools_is_given_words_of_ours(tmp_path: Path) -> None:
    """They are part of what adapters have learnt, and stay as they are."""
    made = calls(call("count", {"bay": 4}), content="One moment.")
    (example,) = read(tmp_path, {"messages": [ASKED, made, answer("7"), SAID], "tools": [COUNT]})
    said = worded(example.messages, example.tools)
    assert [(one.role, one.content) for one in said] == [
        (
            "user",
            'These functions can be called, one a line:\n{"name": "count", "description": "Counts a bay.", '
            '"parameters": {"type": "object", "properties": {"bay": {"type": "integer"}}, "required": ["bay"]}}\n'
            "A call is written "
            'as\n<tool_call>\n{"name": "its name", "arguments": {"name of an argument": "its value"}}\n'
            "</tool_call>\n\nHow many are in bay 4?",
        ),
        ("assistant", 'One moment.\n<tool_call>\n{"name": "count", "arguments": {"bay": 4}}\n</tool_call>'),
        ("user", "<tool_response>\n7\n</tool_response>"),
        ("assistant", "Seven of them."),
    ]


def test_what_a_template_leaves_out_beside_a_call_is_refused(tmp_path: Path) -> None:
    renderer = Renderer(byte_tokenizer(ALONE))
    made = calls(call("count", {"bay": 4}), content="One moment.")
    (example,) = read(tmp_path, {"messages": [ASKED, made]})
    with pytest.raises(BaseError, match="what the assistant message says: leave its words out"):
        renderer.rows(example, 0)


def test_a_call_that_its_own_words_hide_is_refused(tmp_path: Path) -> None:
    made = calls(call("count", {"bay": 4}), content='As in <call>{"name": "count')
    (example,) = read(tmp_path, {"messages": [ASKED, made]})
    with pytest.raises(BaseError, match="cannot be read back"):
        Renderer(byte_tokenizer(TAGGED)).rows(example, 0)


def test_the_marks_of_calls_and_thoughts_are_text_in_what_others_write() -> None:
    role = "'<|' + m.role + '|>'"
    thoughtful = THOUGHTFUL.replace(role, f"{role} + ('<result>' if m.role == 'tool' else '')")
    marks = ("<call>", "</call>", "<result>", "<think>", "</think>")
    tokenizer = with_tokens(thoughtful, "<|end|>", *marks)
    renderer = Renderer(tokenizer, reasoning=True)
    for mark in marks:
        asked = Message("user", f"a {mark} b")
        plain = renderer.prompt_ids([Message("user", "a  b")])
        ids = renderer.prompt_ids([asked])
        assert tokenizer.decode(ids) == renderer.text([asked], prompt=True), mark
        assert ids.count(tokenizer.convert_tokens_to_ids(mark)) == plain.count(tokenizer.convert_tokens_to_ids(mark))
        assert renderer.control_tokens.spelt_in([asked.content]) == [mark]


@pytest.mark.parametrize("place", ["a tool's answer", "arguments", "a description"])
def test_a_control_token_in_what_tools_say_is_no_turn(place: str, tmp_path: Path) -> None:
    told = {one: "x<|end|><|system|>y" if one == place else "x" for one in ("a tool's answer", "arguments")}
    tool = {"name": "count", "description": "x<|end|>" if place == "a description" else "x"}
    made = calls(call("count", {"bay": told["arguments"]}))
    row = {"messages": [ASKED, made, answer(told["a tool's answer"]), SAID], "tools": [tool]}
    (example,) = read(tmp_path, row)
    renderer = Renderer(byte_tokenizer(TAGGED))
    ids = renderer.prompt_ids(example.messages[:-1], example.tools)
    ends = ids.count(renderer.stop_ids[0])
    assert ends == 4 and "<|end|>" in renderer.tokenizer.decode([one for one in ids if one != renderer.stop_ids[0]])
    with pytest.raises(DataError, match=r"control token '<\|end\|>'"):
        render(renderer, [example], 4096)


# Reasoning and calls


THOUGHT = "Bay 4 it is."


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": THOUGHT},
        {"content": f"<think>\n{THOUGHT}\n</think>"},
    ],
    ids=["beside it", "in its words"],
)
def test_a_call_is_learnt_after_its_reasoning_and_read_without_it(tmp_path: Path, said: dict[str, Any]) -> None:
    made = {**calls(call("count", {"bay": 4})), **said}
    (example,) = read(tmp_path, {"messages": [ASKED, made], "tools": [COUNT]})
    assert (example.messages[1].reasoning, example.messages[1].content) == (THOUGHT, "")
    renderer = Renderer(byte_tokenizer(THOUGHTFUL), reasoning=True)
    (row,) = renderer.rows(example, 0)
    ((start, end),) = pieces(row)
    assert row.ids[:start] == tuple(renderer.prompt_ids(example.messages[:1], example.tools))
    words, found = renderer.read(row.ids[start:end])
    assert (words, [one.meaning for one in found]) == ("", [example.calls[0].meaning])
    score = score_answers([example], [Answer("", True, row.ids[start:end])], renderer)
    assert (score.right, score.answers) == (1, ('count({"bay": 4})',))
    thought, answer = (
        "".join(renderer.tokenizer.decode(part.ids[a:b]) for a, b in pieces(part))
        for part in (row.only(reasoning=True), row.only(reasoning=False))
    )
    assert THOUGHT in thought and "count" not in thought and THOUGHT not in answer and '"count"' in answer


def test_a_call_without_reasoning_follows_what_the_template_writes_before_answers(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"messages": [ASKED, calls(call("count", {"bay": 4}))], "tools": [COUNT]})
    renderer = Renderer(byte_tokenizer(THOUGHTFUL))
    prompt = renderer.prompt_ids(example.messages[:1], example.tools)
    assert renderer.tokenizer.decode(prompt).endswith("<|assistant|><think>\n\n</think>\n\n")
    (row,) = renderer.rows(example, 0)
    ((start, end),) = pieces(row)
    assert row.ids[:start] == tuple(prompt) and [one.name for one in renderer.read(row.ids[start:end])[1]] == ["count"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_and_calls_are_told_apart_in_parts_and_at_once(size: int) -> None:
    renderer = Renderer(byte_tokenizer(THOUGHTFUL), reasoning=True)
    text = f"<think>\n{THOUGHT}\n</think>\n\n" + text_of(renderer.call_form, "", ("count", '{"bay": 4}'))
    style = Style("chat.completion", "x", "tiny", form=renderer.call_form, thought=renderer.thought)
    whole = style.choice(0, text, None, "stop")
    assert (whole["finish_reason"], whole["message"]["reasoning_content"]) == ("tool_calls", THOUGHT)
    assert whole["message"]["content"] is None
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "count", "arguments": '{"bay": 4}'}
    writer = ChunkWriter(style, 0)
    pieces_of = [*(Piece(text[i : i + size]) for i in range(0, len(text), size)), Piece("", (), "stop")]
    told = [choice for piece in pieces_of for choice in writer.choices(piece, None)]
    deltas = [choice["delta"] for choice in told]
    assert told[-1]["finish_reason"] == "tool_calls" and deltas[0]["role"] == "assistant"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content", "") for delta in deltas) == ""
    (made,) = [one for delta in deltas for one in delta.get("tool_calls", ()) if "id" in one]
    assert made["function"]["name"] == "count"


# The reader


FORMS = {
    "tags": CallForm('<c>\n{"name": "', '", "arguments": ', '}\n</c>\n<c>\n{"name": "', "}\n</c>", True),
    "one": CallForm('{"name": "', '", "parameters": ', None, "}", False),
    "nothing behind": CallForm("[C]", "[A]", "[C]", "", True),
    "fences": CallForm("<run>", "\n```json\n", "\n```</run><run>", "\n```</run>", False),
}


def text_of(form: CallForm, words: str, *made: tuple[str, str]) -> str:
    middle = (form.joins or "").join(f"{name}{form.between}{arguments}" for name, arguments in made)
    return f"{words}{form.opens}{middle}{form.closes}"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_answer_is_read_as_it_comes(form: CallForm, size: int) -> None:
    made = [("count", '{"of": "a \\"}{ b\\\\", "in": [4, {"x": null}]}'), ("move.all", "{}")][: 1 + bool(form.joins)]
    words = "One moment <please>.\n" * form.after_words
    text = text_of(form, words, *made)
    reader = CallReader(form)
    parts = [part for i in range(0, len(text), size) for part in reader.add(text[i : i + size])]
    parts += reader.add("", ended=True)
    assert "".join(part.text for part in parts if isinstance(part, Words)) == words.rstrip() == reader.words
    assert [(part.number, part.name) for part in parts if isinstance(part, Begun)] == [*enumerate(n for n, _ in made)]
    for number, (_, arguments) in enumerate(made):
        told = [part.text for part in parts if isinstance(part, Arguments) and part.number == number]
        assert "".join(told) == arguments
    assert reader.whole() and [(one.name, one.arguments) for one in reader.calls] == made


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", ["Two miles.", "A < b, <c d>, \n<c>\n", " spaces \n kept \n", '{"nam": 4}', ""])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_no_call_is_words_to_the_letter(form: CallForm, text: str, size: int) -> None:
    reader = CallReader(form)
    parts = [part for i in range(0, len(text), size) for part in reader.add(text[i : i + size])]
    parts += reader.add("", ended=True)
    assert "".join(part.text for part in parts if isinstance(part, Words)) == text
    assert reader.calls == () and not reader.whole()


@pytest.mark.parametrize("behind", ["", " x", "}"])
@pytest.mark.parametrize("arguments", ['{"bay": 4', '{"bay": four}', '["bay"]', '{"bay": 4}'])
def test_what_is_no_whole_call_counts_as_none(arguments: str, behind: str) -> None:
    reader = CallReader(FORMS["tags"])
    reader.add(text_of(FORMS["tags"], "", ("count", arguments)) + behind, ended=True)
    assert reader.whole() == (arguments == '{"bay": 4}' and not behind)


# Scores


def test_a_call_is_right_where_it_is_the_same(tmp_path: Path) -> None:
    renderer = Renderer(byte_tokenizer(TAGGED))
    two = calls(call("count", {"bay": 4, "of": "box"}), call("move_all", {"to": "x"}))
    (example,) = read(tmp_path, {"messages": [ASKED, two], "tools": [COUNT, MOVE]})
    form = renderer.call_form

    def scored(*made: tuple[str, str], behind: str = "") -> tuple[int, str]:
        text = text_of(form, "", *made) + behind
        found = score_answers([example], [Answer(text, True, tuple(renderer._ids(text)))], renderer)
        assert (found.n, found.correct) == (1, (bool(found.right),))
        return found.right, found.answers[0]

    count, move = ("count", '{"of":"box","bay":4.0}'), ("move_all", '{"to": "x"}')
    assert scored(count, move) == (1, 'count({"of":"box","bay":4.0})\nmove_all({"to": "x"})')
    assert scored(move, count)[0] == 0
    assert scored(count)[0] == scored(count, move, move)[0] == 0
    assert scored(("count", '{"bay": "4", "of": "box"}'), move)[0] == 0
    assert scored(count, move, behind="x") == (0, text_of(form, "", count, move) + "x")


# Served


def tall() -> Base:
    """A tiny base with room for tools."""
    model = tiny_llama()
    model.config.max_position_embeddings = 2048
    return replace(Base.of(model, "tiny"), tokenizer=byte_tokenizer(TAGGED))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Example:
    path = write_rows(
        tmp_path_factory.mktemp("talk") / "a.jsonl",
        [{"messages": [ASKED, calls(call("count", {"bay": 4})), answer("7"), SAID], "tools": [COUNT]}],
    )
    return read_examples(path).train[0]


@pytest.fixture(scope="module")
def root(talk: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that has learnt one conversation by heart."""
    base = tall()
    renderer = Renderer(base.tokenizer)
    rows = render(renderer, [talk], 2048)
    start = fresh(base, uniform(base.sites, 16, 32.0), 0, renderer.rendering)
    recipe = Recipe(learning_rate=1e-2, batch_size=1, steps=220, warmup=5, validate_every=220)
    folder = tmp_path_factory.mktemp("served")
    peft.write(train(base, start, rows, rows, recipe).adapter, folder / "stock")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with served(root, base=tall) as running:
        yield running


TOOLS: dict[str, Any] = {"messages": [ASKED], "tools": [COUNT], "max_tokens": 120}
STRICT = {
    "type": "function",
    "function": {
        "name": "pick",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"bay": {"enum": [1, 2]}},
            "required": ["bay"],
            "additionalProperties": False,
        },
    },
}
PICK: dict[str, Any] = {"messages": [ASKED], "tools": [COUNT, STRICT], "max_tokens": 120}


def test_what_was_learnt_is_called_and_its_answer_understood(server: Running) -> None:
    choice = server.ask("stock", **TOOLS).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "count", "arguments": '{"bay": 4}'} and made["id"].startswith("call_")
    turns = [ASKED, choice["message"], answer("7", made["id"])]
    said = server.ask("stock", **{**TOOLS, "messages": turns}).json()["choices"][0]
    assert (said["finish_reason"], said["message"]) == ("stop", {"role": "assistant", "content": "Seven of them."})


def test_openais_client_calls_and_hears_a_stream(server: Running) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    parts = list(client.chat.completions.create(model="stock", stream=True, **TOOLS))
    heard = [one for part in parts for one in part.choices[0].delta.tool_calls or []]
    assert parts[0].choices[0].delta.role == "assistant"
    assert [(one.index, one.type, one.function and one.function.name) for one in heard if one.id] == [
        (0, "function", "count")
    ]
    assert "".join((one.function and one.function.arguments) or "" for one in heard) == '{"bay": 4}'
    assert parts[-1].choices[0].finish_reason == "tool_calls"
    whole = client.chat.completions.create(model="tiny", tool_choice="required", **PICK)
    (made,) = whole.choices[0].message.tool_calls or []
    assert made.type == "function"
    again: Any = [ASKED, whole.choices[0].message.model_dump(exclude_none=True), answer("bay 3", made.id)]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=4).usage


def test_a_conversation_with_calls_is_rendered_as_it_was_learnt(server: Running, talk: Example) -> None:
    body = {
        "model": "stock",
        "messages": [ASKED, calls(call("count", '{"bay":4}', "abc")), answer("7", "abc")],
        "tools": [COUNT],
    }
    found = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    assert found == Renderer(byte_tokenizer(TAGGED)).prompt_ids(talk.messages[:-1], talk.tools)
    assert found == prompts_of(Renderer(byte_tokenizer(TAGGED)), [talk])[0]


def test_calls_of_a_question_that_is_asked_alone_are_numbered_as_it_was_learnt(root: Path, tmp_path: Path) -> None:
    def listed() -> Base:
        return replace(tall(), tokenizer=byte_tokenizer(LISTED))

    base = listed()
    rendering = replace(Renderer(base.tokenizer).rendering, single=True)
    peft.write(replace(adapter_of(base, 1), rendering=rendering), tmp_path / "desk")
    before = [ASKED, calls(call("count", {"bay": 3}, "a")), answer("7", "a"), SAID]
    last = [{"role": "user", "content": "And in bay 5?"}, calls(call("count", {"bay": 5}, "b")), answer("8", "b")]
    with served(tmp_path, base=listed, ask_alone=True) as running:
        whole, alone = (
            httpx.post(f"{running.url}/tokenize", json={"model": "desk", "messages": messages, "tools": [COUNT]}).json()
            for messages in (before + last, last)
        )
    assert whole["tokens"] == alone["tokens"]
    assert "call00000" in base.tokenizer.decode(whole["tokens"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_who_must_call_calls(server: Running, choice: Any, temperature: float) -> None:
    asked = {**PICK, "tools": [STRICT]} if choice == "required" else PICK
    for seed in range(2):
        told = server.ask(
            "tiny", tool_choice=choice, temperature=temperature, seed=seed, parallel_tool_calls=False, **asked
        ).json()["choices"][0]
        (made,) = told["message"]["tool_calls"]
        assert told["finish_reason"] == "tool_calls" and made["function"]["name"] == "pick"
        assert json.loads(made["function"]["arguments"])["bay"] in (1, 2)


def test_a_call_that_is_cut_says_so(server: Running) -> None:
    told = server.ask("tiny", tool_choice="required", **{**TOOLS, "max_tokens": 45}).json()["choices"][0]
    assert told["finish_reason"] == "length"
    assert told["message"]["tool_calls"][0]["function"]["name"] == "count"


@pytest.mark.parametrize(("stop", "finish"), [('y": 4', "length"), ("nt", "length"), ("</call>", "tool_calls")])
def test_a_call_that_a_stop_text_cuts_is_not_to_be_answered(server: Running, stop: str, finish: str) -> None:
    told = server.ask("stock", **TOOLS, stop=stop).json()["choices"][0]
    assert told["finish_reason"] == finish, told
    body = {"model": "stock", "stream": True, "stop": [stop], **TOOLS}
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body).text.split("\n\n")
    ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if line.startswith("data: {")]
    assert ends[-1] == finish and not any(ends[:-1])


def test_none_shows_no_tools_and_looks_for_no_calls(server: Running) -> None:
    plain = {"messages": [ASKED], "max_tokens": 40}
    none = server.ask("tiny", **{**plain, "tools": [COUNT], "tool_choice": "none"}).json()
    assert none["choices"][0]["message"] == server.ask("tiny", **plain).json()["choices"][0]["message"]
    assert none["usage"]["prompt_tokens"] == server.ask("tiny", **plain).json()["usage"]["prompt_tokens"]
    shown = server.ask("tiny", **{**plain, "tools": [COUNT]}).json()["usage"]["prompt_tokens"]
    assert shown > none["usage"]["prompt_tokens"]


UNASKABLE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to choose from": ({"tools": None, "tool_choice": "required"}, "tool_choice: there are no tools"),
    "an unknown one": ({"tool_choice": {"type": "function", "function": {"name": "find"}}}, "tool_choice: 'find' is"),
    "a word": ({"tool_choice": "always"}, "tool_choice"),
    "no function": ({"tools": [{"type": "web_search"}]}, "tools.0"),
    "two of a name": ({"tools": [COUNT, {**COUNT, "function": {"name": "count"}}]}, "tools[1]: a second tool of the"),
    "older names": ({"functions": [COUNT["function"]]}, "functions: the older fields of tools"),
    "a schema too": ({"response_format": {"type": "json_object"}}, "response_format: it excludes calls of tools"),
    "a strict schema that is none": (
        {"tools": [{"type": "function", "function": {"name": "x", "strict": True, "parameters": {"type": "objects"}}}]},
        "tools: ",
    ),
    "an answer to nothing": ({"messages": [ASKED, answer("7", "x")]}, "messages[1]: the answer of a tool that answers"),
    "no answer": ({"messages": [ASKED, calls(call("count", "{}", "x")), ASKED]}, "messages[1]: a call of count that"),
    "no arguments": (
        {"messages": [ASKED, calls(call("count", "{", "x")), answer("7", "x")]},
        "messages.1: tool_calls[0]: arguments that are no JSON object",
    ),
    "the user calls": ({"messages": [{**ASKED, "tool_calls": [call("count", "{}", "x")]}]}, "messages.0: only the"),
}


@pytest.mark.parametrize(("fields", "words"), UNASKABLE.values(), ids=UNASKABLE)
def test_what_cannot_be_asked_of_tools_is_refused_in_words(server: Running, fields: dict[str, Any], words: str) -> None:
    found = server.ask("tiny", **{**TOOLS, **fields})
    assert found.status_code == 400, found.text
    told = found.json()["error"]
    assert words in told["message"] and "Value error" not in told["message"], told
    assert told["param"].partition(".")[0] in fields


def test_a_text_that_is_gone_on_with_calls_nothing(server: Running) -> None:
    body = {"model": "tiny", "prompt": "Hello?", "max_tokens": 4, "tools": [COUNT]}
    told = httpx.post(f"{server.url}/v1/completions", json=body)
    assert told.status_code == 400 and "tools: completions call no tools" in told.json()["error"]["message"]


def test_a_comparison_scores_calls(root: Path, talk: Example) -> None:
    base = tall()
    renderer = Renderer(base.tokenizer)
    first = replace(talk, messages=talk.messages[:2])
    found = compare(base, peft.read(root / "stock"), renderer, [first, talk], render(renderer, [first, talk], 2048))
    assert (found.base.right, found.adapter.right, found.adapter.n) == (0, 1, 1), "words without a check are not scored"
    assert found.samples[0].adapter == found.samples[0].reference == 'count({"bay": 4})'


# The grammar


def kept(
    family: Family, must: bool, wanted: str, *tools: dict[str, Any], reasoning: bool = False
) -> tuple[Renderer, str]:
    """What an answer becomes that would say `wanted`, within what the grammar of a request allows."""
    renderer = Renderer(family.tokenizer(), reasoning=reasoning)
    choice = "required" if must else "auto"
    asked = served_tools.calling(tools or [COUNT, MOVE], choice, None, renderer)
    vocabulary = len(renderer.tokenizer)
    grammar = Grammar(grammar_tokenizer(renderer.tokenizer, vocabulary, renderer.stop_ids), asked.grammar or "")
    sampler = Sampler(Request((1,), grammar=asked.grammar), grammar)
    ids: list[int] = []
    for token in [*renderer._ids(wanted), *[renderer.stop_ids[0]] * 200]:
        logits = torch.zeros(vocabulary)
        for weight, one in enumerate(renderer._ids(' ,:]}"')):  # what ends soonest, where the wanted may not stand
            logits[one] = weight
        logits[renderer.stop_ids[0]], logits[token] = 8, 9
        ids.append(sampler.draw(logits, token).id)
        if grammar.ended:
            break
    return renderer, renderer.tokenizer.decode(ids)


@pytest.mark.parametrize("must", [True, False])
def test_calls_that_are_well_formed_pass_unchanged(family: Family, must: bool, tmp_path: Path) -> None:
    renderer, example = learnt(family, tmp_path)
    example = replace(example, messages=(example.messages[0], replace(example.messages[1], content="")))
    (row,) = renderer.rows(example, 0)
    ((start, end),) = pieces(row)
    wanted = renderer.tokenizer.decode(row.ids[start : end - 1])
    _, found = kept(family, must, wanted)
    assert found.removesuffix("<|end|>") == wanted


@pytest.mark.parametrize("spoilt", ['"bay": 4', '"bay" 4}', "{bay: 4}", "4", '{"bay": 04'])
def test_arguments_are_json_whatever_the_model_would_say(family: Family, spoilt: str) -> None:
    form = Renderer(family.tokenizer()).call_form
    wanted = text_of(form, "", ("count", spoilt))
    renderer, found = kept(family, False, wanted)
    _, made = renderer.read(renderer._ids(found))
    assert len(made) == 1 and isinstance(json.loads(made[0].arguments), dict), found


def test_a_tool_that_is_not_there_is_not_called(family: Family) -> None:
    form = Renderer(family.tokenizer()).call_form
    renderer, found = kept(family, False, text_of(form, "", ("convert", "{}")))
    _, made = renderer.read(renderer._ids(found))
    assert [one.name for one in made] == ["count"], found


def test_a_grammar_takes_no_time_for_tokens_that_no_mark_holds() -> None:
    added = {f"<extra_{i}>": i for i in range(6000)}
    begun = time.process_time()
    served_tools.grammar_of(OWN, {f"tool_{i}": {"type": "object"} for i in range(32)}, added, False, True)
    assert time.process_time() - begun < 0.2  # 0.64 s where every mark was cut at every token, 0.007 now


THINKERS = {**FAMILIES, "thought by a token": Family(lambda: with_tokens(TAGGED, "<|end|>", "<think>", "</think>"))}


@pytest.mark.parametrize("family", THINKERS.values(), ids=THINKERS)
def test_no_thought_hides_a_call_from_the_grammar(family: Family) -> None:
    wanted = '<think>\nhm\n</think>\n\n{"name": "rm_rf", "parameters": {oops: }}'
    assert "think>" not in kept(family, False, wanted, reasoning=True)[1]
    form = Renderer(family.tokenizer()).call_form
    for said in ("Seven {of} them.", text_of(form, "", ("count", '{"bay": 4}')).replace(ID, "0" * 9)):
        assert kept(family, False, said, reasoning=True)[1].removesuffix("<|end|>") == said


OPENED = TAGGED.replace("{{ m.content or '' }}", "{{ (m.content or '').split('</think>')[-1] }}").replace(
    "{{ '<|assistant|>' }}", "{{ '<|assistant|><think>\n' }}"
)  # thoughts are opened by the prompt, and left out of finished turns


@pytest.mark.parametrize("template", [THOUGHTFUL, OPENED], ids=["empty thought", "opened"])
def test_with_tools_an_answer_begins_without_a_thought(template: str, tmp_path: Path) -> None:
    def base() -> Base:
        return replace(tall(), tokenizer=byte_tokenizer(template))

    with served(tmp_path, base=base) as running:
        for fields in (
            {"tools": [COUNT]},
            {"tools": [COUNT], "tool_choice": "required"},
            {"response_format": {"type": "json_object"}},
        ):
            told = running.ask("tiny", messages=[ASKED], max_tokens=9, **fields).json()
            assert "reasoning_content" not in told["choices"][0]["message"]
            if "tools" in fields:
                body = {"model": "tiny", "messages": [ASKED], "tools": [COUNT]}
                ids = httpx.post(f"{running.url}/tokenize", json=body).json()["tokens"]
                prompt = byte_tokenizer(template).decode(ids)
                assert told["usage"]["prompt_tokens"] == len(ids)
                assert prompt.partition("<|assistant|>")[2].split() == ["<think>", "</think>"]


def test_words_may_be_said_instead(family: Family) -> None:
    assert kept(family, False, "Seven {of} <them>.")[1] == "Seven {of} <them>.<|end|>"


def test_a_strict_schema_that_cannot_be_kept_to_is_refused() -> None:
    strict = {"type": "function", "function": {"name": "x", "strict": True, "parameters": {"type": "objects"}}}
    with pytest.raises(RequestError, match=r"^tools: "):
        served_tools.calling([strict], "auto", None, Renderer(byte_tokenizer(TAGGED)))


NO_OBJECTS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": ["array", "null"]},
    {"enum": ["x"]},
    {"anyOf": [{"type": "null"}, {"type": "integer"}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}},
]


@pytest.mark.parametrize("schema", NO_OBJECTS, ids=str)
def test_a_strict_schema_that_takes_no_object_is_refused(schema: dict[str, Any]) -> None:
    strict = {"type": "function", "function": {"name": "x", "strict": True, "parameters": schema}}
    with pytest.raises(RequestError, match=r"^tools"):
        served_tools.calling([strict], "auto", None, Renderer(byte_tokenizer(TAGGED)))


@pytest.mark.parametrize(
    "schema", [{"title": "x"}, {"anyOf": [{"type": "object"}, {"type": "null"}]}, {"type": ["object", "null"]}], ids=str
)
def test_a_strict_schema_that_may_be_no_object_is_kept_to_objects(schema: dict[str, Any]) -> None:
    strict = {"type": "function", "function": {"name": "x", "strict": True, "parameters": schema}}
    family = FAMILIES["tagged"]
    wanted = text_of(Renderer(family.tokenizer()).call_form, "", ("x", "null"))
    renderer, found = kept(family, True, wanted, strict)
    (made,) = renderer.read(renderer._ids(found))[1]
    assert isinstance(json.loads(made.arguments), dict)
