"""Evaluation decodes by the engine where it serves the base, and answers as transformers' generate does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, capitals, tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_bare
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base, open_base
from lorafit.data.examples import Example, Message
from lorafit.data.render import Renderer, render, renderer_for
from lorafit.errors import BaseError
from lorafit.evaluation import decoding
from lorafit.evaluation.decoding import Decoding
from lorafit.generation.greedy import Answer, generate
from lorafit.testing import random_adapter
from lorafit.training.loop import train
from lorafit.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
BEGUN = b"What everyone is asked first: "
PROMPTS = [list(BEGUN + rest) for rest in (b"a", b"b, at length, twice", b"a?", b"cc", b"one two one two")]


def base_in(folder: Path, model: PreTrainedModel) -> Base:
    with torch.no_grad():  # so large that no two tokens are nearly as likely, and rounding decides nothing
        model.get_input_embeddings().weight.mul_(40)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return open_base(folder, torch.float32)


def strong(base: Base) -> Adapter:
    return random_adapter(base, uniform(base.sites, 4, 32), size=0.3)


def by_generate(base: Base, adapter: Adapter | None, most: int = 24) -> list[Answer]:
    if adapter is None:
        return generate(base, renderer_for(base), PROMPTS, most)
    with attach(base, adapter):
        return generate(base, renderer_for(base), PROMPTS, most)


def no_generate(*_: object, **__: object) -> list[Answer]:
    raise AssertionError("decoded by generate")


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_the_engine_answers_as_generate_does(
    model: Callable[[], PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_in(tmp_path, model())
    adapter, before = strong(base), base.integrity()
    wanted = [by_generate(base, one) for one in (None, adapter)]
    assert wanted[0] != wanted[1]
    monkeypatch.setattr(decoding, "generate", no_generate)
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 24) as answering:
        assert [answering.answers(PROMPTS, one) for one in (None, adapter)] == wanted
    require_bare(base)
    assert base.integrity() == before


def test_in_every_dtype_the_engine_gives_the_answers_that_were_learnt(tiny_folder: Path) -> None:
    """In bf16 two kernels may choose differently between two tokens that are about as likely: what was learnt is not
    among those."""
    base = open_base(tiny_folder, torch.float32)
    renderer = renderer_for(base)
    examples = [
        Example((Message("user", str(row["prompt"])), Message("assistant", str(row["completion"]))), "capitals")
        for row in capitals(12)
    ]
    rows = render(renderer, examples, 512)
    start = fresh(base, uniform(base.sites, 16, 32.0), 0, renderer.rendering)
    recipe = Recipe(learning_rate=1e-2, batch_size=12, steps=200, warmup=5, validate_every=100)
    adapter = train(base, start, rows, rows, recipe).adapter
    prompts = [renderer.prompt_ids(example.messages[:-1]) for example in examples]
    for dtype in (torch.float32, torch.bfloat16):
        with Decoding(open_base(tiny_folder, dtype), renderer, max(map(len, prompts)), 40) as answering:
            found = answering.answers(prompts, adapter)
        assert found == [Answer(example.answer, stopped=True) for example in examples]


def test_a_family_that_the_engine_does_not_serve_is_answered_by_generate(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=261, hidden_size=32, n_layer=2, n_head=4, eos_token_id=256)
    torch.manual_seed(0)
    base = base_in(tmp_path, AutoModelForCausalLM.from_config(config).eval())
    adapter = strong(base)
    wanted = [by_generate(base, one) for one in (None, adapter)]
    assert wanted[0] != wanted[1]
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 24) as answering:
        assert [answering.answers(PROMPTS, one) for one in (None, adapter)] == wanted


def test_one_answer_at_a_time_in_little_memory_is_the_same_answer(tmp_path: Path) -> None:
    base = base_in(tmp_path, tiny_llama())
    wanted = by_generate(base, None)
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 24, memory=0) as answering:
        assert answering.answers(PROMPTS) == wanted
        assert answering._engine is not None
        assert answering._engine.slots == 1


def test_an_adapter_that_changes_nothing_is_measured_too(tmp_path: Path) -> None:
    base = base_in(tmp_path, tiny_llama())
    nothing = fresh(base, uniform(base.sites, 2, 4.0), 0)
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 8) as answering:
        assert answering.answers(PROMPTS, nothing) == answering.answers(PROMPTS)


def test_answers_end_where_the_context_ends(tmp_path: Path) -> None:
    base = base_in(tmp_path, tiny_llama())
    assert base.context == 512
    longest = max(map(len, PROMPTS))
    with Decoding(base, renderer_for(base), longest, 600) as answering:
        found = answering.answers(PROMPTS)
    assert found == by_generate(base, None, 512 - longest)


def test_without_a_question_no_engine_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in(tmp_path, tiny_llama())
    monkeypatch.setattr(decoding, "Engine", no_generate)
    with Decoding(base, renderer_for(base), 1, 8) as answering:
        assert answering.answers([]) == []


def test_a_full_memory_at_opening_is_no_family_that_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_in(tmp_path, tiny_llama())

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lorafit.serving.decoder.Decoder.measure", full)
    with Decoding(base, renderer_for(base), 60, 8) as answering, pytest.raises(BaseError, match="MemoryError"):
        answering.answers(PROMPTS)


def test_what_ends_an_answer_is_what_the_renderer_says(tmp_path: Path) -> None:
    base = base_in(tmp_path, tiny_llama())
    first = int(base.model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    other = Renderer(base.tokenizer, stop_ids=(first,))
    with Decoding(base, other, max(map(len, PROMPTS)), 8) as answering:
        found = answering.answers(PROMPTS)
    assert found == generate(base, other, PROMPTS, 8)
    assert found[0].stopped


def test_a_family_whose_config_names_no_one_width_of_keys_is_answered(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=261,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        global_head_dim=16,
        eos_token_id=256,
        vocab_size_per_layer_input=261,
        hidden_size_per_layer_input=8,
    )
    torch.manual_seed(0)
    base = base_in(tmp_path, AutoModelForCausalLM.from_config(config).eval())
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 4) as answering:
        assert len(answering.answers(PROMPTS)) == len(PROMPTS)


def test_progress_counts_every_answer_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    base = base_in(tmp_path, tiny_llama())
    with Decoding(base, renderer_for(base), max(map(len, PROMPTS)), 4) as answering:
        answering.answers(PROMPTS, None, lambda done, of: seen.append((done, of)))
        assert answering.answers([]) == []
    assert seen == [(n, len(PROMPTS)) for n in range(len(PROMPTS) + 1)]
