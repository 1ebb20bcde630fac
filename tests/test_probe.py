"""A base that sees what it is to predict is refused, before anything is trained or scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, capitals, tiny_gpt2, tiny_llama, tiny_mixtral, write_rows
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    PreTrainedModel,
)

from lorafit import run_evaluation, run_training
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base, open_base
from lorafit.data.render import Row
from lorafit.errors import BaseError, NotCausalError
from lorafit.jobs import doctor
from lorafit.tasks import probe
from lorafit.tasks.probe import mode_of, require_causal
from lorafit.tasks.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = Row(tuple(range(20, 61)), (False, *[True] * 40), 0)
SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "electra": {**SIZES, "embedding_size": 32},
    "roberta": SIZES,
    "xlnet": {"vocab_size": 261, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "dropout": 0.0},
}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def made(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Base:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(family, **BOTH_WAYS[family], **more)
    return Base.of(AutoModelForCausalLM.from_config(settings).eval().to(dtype), family)


@BOTH
@pytest.mark.filterwarnings("ignore:The `use_cache` argument is deprecated")  # XLNet's name for it is another
@pytest.mark.parametrize("family", BOTH_WAYS)
def test_a_model_that_looks_both_ways_is_refused(family: str, dtype: torch.dtype) -> None:
    base = made(family, dtype)
    with pytest.raises(NotCausalError, match=f"'{family}': a later token changes what it predicts before it"):
        require_causal(base, ROW)
    with pytest.raises(NotCausalError):
        mode_of(base, [ROW])
    with pytest.raises(NotCausalError):
        Runner.of(base, [ROW]).nll([ROW])


@BOTH
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_a_decoder_is_not(model: Any, dtype: torch.dtype) -> None:
    require_causal(Base.of(model().to(dtype), "decoder"), ROW)


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
def test_what_is_configured_to_look_back_only_is_not(family: str) -> None:
    require_causal(made(family, is_decoder=True), ROW)


class Moved(nn.Module):
    """A model in whose logits each position is moved by the token behind it."""

    def __init__(self, model: PreTrainedModel, by: float, only: int | None = None):
        super().__init__()
        self.model, self.by, self.only = model, by, only

    def forward(self, input_ids: Tensor, **named: Any) -> Any:
        found = self.model(input_ids=input_ids, **named)
        ahead = input_ids.roll(-1, 1).float()[..., None] / 261
        ahead[:, -1] = 0
        if self.only is not None:
            ahead = ahead * (torch.arange(ahead.shape[1]) == self.only)[:, None]
        found.logits = found.logits + self.by * ahead.to(found.logits.dtype)
        return found


def moved(by: float, only: int | None = None) -> Base:
    return Base.of(Moved(tiny_llama(), by, only), "moved")


def test_a_leak_at_the_last_position_alone_is_noticed() -> None:
    last = len(ROW.ids) - 2
    with pytest.raises(NotCausalError):
        require_causal(moved(0.01, only=last), ROW)


def test_rounding_is_no_leak_and_more_than_rounding_is() -> None:
    require_causal(moved(1e-6), ROW)
    with pytest.raises(NotCausalError):
        require_causal(moved(1e-2), ROW)


def test_experts_that_round_otherwise_are_no_leak_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bits differ the lowest blocks decide, in fp32."""
    base = Base.of(tiny_mixtral().to(torch.bfloat16), "experts")
    plain = probe._logits
    seen: list[int] = []

    def rounded(base: Base, row: Row) -> Tensor:
        seen.append(1)
        return plain(base, row) * (1 + 2**-7 * (len(seen) > 1))

    monkeypatch.setattr(probe, "_logits", rounded)
    require_causal(base, ROW)
    with pytest.raises(NotCausalError):
        seen.clear()
        require_causal(made("bert", torch.bfloat16), ROW)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such argument")


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that round otherwise at every forward."""
    plain = probe._logits
    seen: list[int] = []

    def other(base: Base, row: Row) -> Tensor:
        seen.append(1)
        return plain(base, row) * (1 + 2**-7 * len(seen))

    monkeypatch.setattr(probe, "_logits", other)


@pytest.mark.usefixtures("rounded")
def test_of_a_base_that_cannot_be_copied_the_gradient_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_lowest_blocks_in_fp32", fails)
    for model in (tiny_mixtral(), tiny_gpt2()):
        require_causal(Base.of(model.to(torch.bfloat16), "decoder"), ROW)
    for family in ("bert", "roberta"):
        with pytest.raises(NotCausalError):
            require_causal(made(family, torch.bfloat16), ROW)


@pytest.mark.usefixtures("rounded")
def test_what_cannot_be_told_is_not_called_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_lowest_blocks_in_fp32", fails)
    monkeypatch.setattr(probe, "_has_no_gradient_behind", fails)
    said = r"'experts': .* cannot be determined in bfloat16 \(no such argument\): open it in fp32"
    with pytest.raises(BaseError, match=said) as caught:
        require_causal(Base.of(tiny_mixtral().to(torch.bfloat16), "experts"), ROW)
    assert not isinstance(caught.value, NotCausalError)


@pytest.mark.usefixtures("rounded")
def test_a_copy_that_gives_no_numbers_shows_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base.of(tiny_mixtral().to(torch.bfloat16), "experts")
    monkeypatch.setattr(probe, "_hidden", lambda base, row: torch.full((len(row.ids), 32), float("nan")))
    require_causal(base, ROW)


def test_a_base_that_gives_no_numbers_is_told_elsewhere() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    require_causal(Base.of(model, "broken"), ROW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that opens as a causal language model, for its class is called one."""
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**{**SIZES, "max_position_embeddings": 512})).save_pretrained(tmp_path / "both-ways")
    byte_tokenizer().save_pretrained(tmp_path / "both-ways")
    return tmp_path / "both-ways"


def test_a_run_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", capitals(36))
    with pytest.raises(NotCausalError, match="both-ways"):
        run_training(str(folder), str(data), tmp_path / "run", {"epochs": 1.0})
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_such_a_base_is_not_scored(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", capitals(12))
    base = open_base(folder, torch.float32)
    adapter = fresh(base, uniform(base.sites[:2], 2, 4.0), 0)
    peft.write(replace(adapter, base_name=str(folder)), tmp_path / "adapter")
    with pytest.raises(NotCausalError):
        run_evaluation(str(folder), tmp_path / "adapter", str(data), {})


def test_doctor_says_so(folder: Path) -> None:
    found = {one.what: one for one in doctor.opened(str(folder))}
    assert (found["direction"].state, "choose another base" in found["direction"].advice) == ("broken", True)
