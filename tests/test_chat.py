"""Chat: it says what evaluation would say, remembers each speaker's own words, and forgets before it overflows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.adapters.rendering import Rendering
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.examples import Message
from lorafit.data.render import Renderer, renderer_for
from lorafit.errors import AdapterError, BaseError, SettingsError
from lorafit.generation.greedy import generate
from lorafit.generation.text import Detokenizer
from lorafit.jobs.chat import BASE, Chat, Emit
from lorafit.testing import random_adapter


def written(
    base: Base, folder: Path, system: str | None = "Be brief.", template: str | None = None, single: bool = False
) -> Path:
    """An adapter with a rendering of its own, in a folder."""
    adapter = random_adapter(base, uniform(base.sites[:14], 4, 32), size=0.3)
    rendering = renderer_for(base, system).rendering
    rendering = Rendering(template or rendering.template_hash, system, single=single)
    peft.write(type(adapter)(adapter.plan, dict(adapter.tensors), adapter.base, adapter.base_name, rendering), folder)
    return folder


def test_an_answer_is_what_evaluation_decodes_with_the_rendering_of_training(tiny_base: Base, tmp_path: Path) -> None:
    chat = Chat(tiny_base, max_new_tokens=12)
    name = chat.add(written(tiny_base, tmp_path / "mine"))
    pieces: list[str] = []
    chat.ask("Where is it?", pieces.append)
    chat.close()
    renderer = renderer_for(tiny_base, "Be brief.")
    prompt = renderer.prompt_ids([Message("user", "Where is it?")])
    with attach(tiny_base, chat.adapters[name]):
        (wanted,) = generate(tiny_base, renderer, [prompt], 12)
    assert "".join(pieces).strip() == wanted.text


def test_every_speaker_remembers_its_own_answers(tiny_base: Base, tmp_path: Path) -> None:
    chat = Chat(tiny_base, max_new_tokens=8)
    name = chat.add(written(tiny_base, tmp_path / "mine"))
    chat.command("/both")
    heard: dict[str, str] = {}
    current = ""

    def begin(who: str) -> None:
        nonlocal current
        current = who
        heard[who] = ""

    def emit(piece: str) -> None:
        heard[current] += piece

    chat.ask("Where is it?", emit, begin)
    assert list(heard) == [BASE, name]
    assert heard[BASE] != heard[name]
    for who in heard:
        assert [m.role for m in chat.histories[who]] == ["user", "assistant"]
        assert chat.histories[who][1].content == heard[who].strip()


def test_the_oldest_turns_are_forgotten_before_the_context_overflows(tiny_base: Base) -> None:
    chat = Chat(tiny_base, max_new_tokens=8)
    for i in range(8):
        chat.ask(f"{i} " + "word " * 20, lambda piece: None)
    left = chat.histories[BASE]
    assert left[-2].content.startswith("7 ")
    assert left[0].role == "user"
    assert not left[0].content.startswith("0 ")


def test_a_question_longer_than_the_context_is_refused_and_not_remembered(tiny_base: Base) -> None:
    chat = Chat(tiny_base, max_new_tokens=8)
    with pytest.raises(SettingsError, match="do not fit the base's 512"):
        chat.ask("word " * 200, lambda piece: None)
    assert chat.histories[BASE] == []


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(tiny_base: Base) -> None:
    chat = Chat(tiny_base, max_new_tokens=8)
    for i in range(2):
        chat.ask(f"{i}?", lambda piece: None)
    before = list(chat.histories[BASE])
    with pytest.raises(SettingsError, match="do not fit"):
        chat.ask("word " * 200, lambda piece: None)
    assert chat.histories[BASE] == before


def test_an_answer_that_was_stopped_stays_as_far_as_it_came(tiny_base: Base, tmp_path: Path) -> None:
    chat = Chat(tiny_base, max_new_tokens=40)
    name = chat.add(written(tiny_base, tmp_path / "mine"))

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("Where is it?", stop)
    chat.close()
    assert [m.role for m in chat.histories[name]] == ["user", "assistant"]
    assert "forward" not in vars(tiny_base.model.get_submodule(tiny_base.sites[0].path))


def test_an_adapter_that_does_not_belong_does_not_speak(tiny_base: Base, tmp_path: Path) -> None:
    chat = Chat(tiny_base)
    with pytest.raises(BaseError, match="chat template"):
        chat.add(written(tiny_base, tmp_path / "other", template="0" * 64))
    (written(tiny_base, tmp_path / "foreign") / "lorafit.json").unlink()
    with pytest.raises(AdapterError, match="does not say which base"):
        chat.add(tmp_path / "foreign")
    assert (chat.adapters, chat.speaking) == ({}, (BASE,))


def test_an_adapter_in_a_folder_called_base_is_not_the_base(tiny_base: Base, tmp_path: Path) -> None:
    chat = Chat(tiny_base, max_new_tokens=8)
    said = chat.command(f"/both {written(tiny_base, tmp_path / BASE)}")
    assert said == f"answering: base and {tmp_path.name}/base (base is another)"
    chat.ask("Where is it?", lambda piece: None)
    base, adapter = (chat.histories[name][1].content for name in chat.speaking)
    assert base != adapter


def test_adapters_of_one_folder_name_keep_apart_and_say_so(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("a/mine", "b/mine", "mine"):
        written(tiny_base, tmp_path / place)
    chat = Chat(tiny_base, max_new_tokens=4)
    assert chat.command("/adapter a/mine").startswith("answering: mine")
    chat.ask("Where is it?", lambda piece: None)
    assert chat.command("/adapter b/mine") == "answering: b/mine (mine is another)"
    assert "b/mine" not in chat.histories
    assert chat.command("/adapter mine") == f"answering: mine (from {tmp_path / 'a' / 'mine'})"
    assert chat.command("/adapter ./mine") == f"answering: {tmp_path.name}/mine (mine is another)"
    assert chat.command("/adapter a/mine").startswith("answering: mine")
    assert [*chat.adapters] == ["mine", "b/mine", f"{tmp_path.name}/mine"]


def test_an_adapter_of_another_base_is_told_by_its_base(tiny_base: Base, tmp_path: Path) -> None:
    folder = written(tiny_base, tmp_path / "mine", template="0" * 64)
    with pytest.raises(AdapterError, match=r"belongs to base .* not to 'another'"):
        Chat(replace(tiny_base, name="another", identity="f" * 64)).add(folder)


def test_an_answer_that_was_stopped_before_its_first_word_leaves_no_turn(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "_speak", stopped)
    chat = Chat(tiny_base, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Where is it?", lambda piece: None)
    assert chat.histories[BASE] == []


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"), [("a😀\né😀<|end|>", 13, ["a", "😀", "\n", "é", "😀"]), ("a😀", 3, ["a", "\ufffd"])]
)
def test_every_character_is_told_as_soon_as_it_is_whole(text: str, tokens: int, pieces: list[str]) -> None:
    """One token per byte; what the last character lacks at the end is told as it is."""
    tokenizer = byte_tokenizer()
    words = Detokenizer(tokenizer)
    told = [words.add([token]) for token in tokenizer(text)["input_ids"][:tokens]]
    told = [piece for piece in [*told, words.add([], ended=True)] if piece]
    assert told == pieces


def test_an_answer_may_take_what_the_context_leaves(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the base reads no more tokens in all than an answer may have by default."""
    asked: list[tuple[int, int]] = []

    def speak(chat: Chat, adapter: object, renderer: Renderer, prompt: list[int], room: int, emit: Emit) -> None:
        asked.append((len(prompt), room))
        emit("word " * 20)

    monkeypatch.setattr(Chat, "_speak", speak)
    chat = Chat(tiny_base, max_new_tokens=512)
    for i in range(4):
        chat.ask(f"{i} " + "word " * 10, lambda piece: None)
    chat.ask("word " * 70, lambda piece: None)
    assert all(256 <= room == 512 - prompt for prompt, room in asked[:-1])
    assert asked[1][0] > asked[0][0]  # half of the context is for what was said before
    assert 0 < asked[-1][1] == 512 - asked[-1][0] < 256


def test_a_line_that_is_no_text_is_refused_and_not_remembered(tiny_base: Base) -> None:
    chat = Chat(tiny_base, max_new_tokens=4)
    with pytest.raises(SettingsError, match=r"not UTF-8 \(byte 0xff\): type it again"):
        chat.ask(b"\xff bad".decode(errors="surrogateescape"), lambda piece: None)
    chat.ask("Where is it?", lambda piece: None)
    assert [m.role for m in chat.histories[BASE]] == ["user", "assistant"]


def test_new_forgets_what_was_said(tiny_base: Base, tmp_path: Path) -> None:
    folder = written(tiny_base, tmp_path / "mine")

    def last_answer(*lines: str) -> str:
        pieces = [""]
        with Chat(tiny_base, max_new_tokens=8) as chat:
            chat.add(folder)
            for line in lines:
                pieces.clear()
                chat.command(line) if line.startswith("/") else chat.ask(line, pieces.append)
        return "".join(pieces)

    assert last_answer("Where is it?", "/new", "Who has it?") == last_answer("Who has it?") != ""
    assert last_answer("Where is it?", "Who has it?") != last_answer("Who has it?")


def test_what_was_trained_on_single_questions_is_asked_each_by_itself_and_chat_says_so(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []

    def speak(chat: Chat, adapter: object, renderer: Renderer, prompt: list[int], room: int, emit: Emit) -> None:
        prompts.append(prompt)
        emit("In Skerrow.")

    monkeypatch.setattr(Chat, "_speak", speak)
    chat = Chat(tiny_base)
    chat.add(written(tiny_base, tmp_path / "mine", single=True))
    assert "mine was trained on single questions: each is asked on its own" in chat.remark()
    assert "trained on single questions" in chat.command("/both") and chat.command("/base") == "answering: base"
    chat.command("/both")
    for line in ("Where is it?", "Who has it?"):
        chat.ask(line, lambda piece: None)
    turns = [Message("user", "Where is it?"), Message("assistant", "In Skerrow."), Message("user", "Who has it?")]
    assert prompts[2] == renderer_for(tiny_base).prompt_ids(turns), "the base remembers"
    assert prompts[3] == renderer_for(tiny_base, "Be brief.").prompt_ids(turns[2:])
    chat.command("/remember")
    assert chat.remark() == ""
    chat.ask("Since when?", lambda piece: None)
    told = [*turns, Message("assistant", "In Skerrow."), Message("user", "Since when?")]
    assert prompts[5] == renderer_for(tiny_base, "Be brief.").prompt_ids(told)


@pytest.mark.parametrize("trained", [None, "Be brief."])
def test_a_system_prompt_that_is_given_stands_before_the_conversation(
    trained: str | None, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    monkeypatch.setattr(Chat, "_speak", lambda chat, adapter, renderer, prompt, *_: prompts.append(prompt))
    chat = Chat(tiny_base, system="Be long.")
    if trained:
        chat.add(written(tiny_base, tmp_path / "mine", trained))
    chat.ask("Where is it?", lambda piece: None)
    assert tiny_base.tokenizer.decode(prompts[0]).startswith("<|system|>Be long.<|end|>\n<|user|>Where")


def test_a_base_that_the_engine_does_not_serve_is_talked_to_all_the_same() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=261, hidden_size=32, n_layer=1, n_head=2, eos_token_id=256)
    model = AutoModelForCausalLM.from_config(config).eval()
    base = replace(Base.of(model, "bloom"), tokenizer=byte_tokenizer())
    pieces: list[str] = []
    with Chat(base, max_new_tokens=4) as chat:
        chat.ask("Where is it?", pieces.append)
    assert chat._engine is None
    (wanted,) = generate(
        base, renderer_for(base), [renderer_for(base).prompt_ids([Message("user", "Where is it?")])], 4
    )
    assert "".join(pieces).strip() == wanted.text
