"""Memory: what it is spent on, predicted; and less of it, at the price of time."""

from __future__ import annotations

import pytest
import torch
from conftest import NotATransformer, byte_tokenizer, plain_module, tiny_gpt2, tiny_llama
from torch import Tensor

from lorafit.attachment import attach, fresh, packing, recomputing
from lorafit.base import Base
from lorafit.data.render import Row
from lorafit.errors import AttachError
from lorafit.plan import uniform
from lorafit.planning.rules import all_linear
from lorafit.tasks.completion import Way, batch_of
from lorafit.training.loop import gradient_step
from lorafit.training.state import TrainState

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def rows_of(*lengths: int) -> list[Row]:
    return [Row(tuple((7 * i + k) % 200 for k in range(n)), (False, *[True] * (n - 1)), i)
            for i, n in enumerate(lengths)]  # fmt: skip


def gradient(base: Base, way: Way, recompute: bool, dropout: float = 0.0, variant: str = "lora") -> Tensor:
    """The gradient of every factor over four micro-batches, of factors that all act."""
    plan = uniform(all_linear(base), 4, 32, variant)
    state = TrainState(fresh(base, plan, 0), dropout=dropout)
    torch.manual_seed(1)
    with torch.no_grad():
        state.master.add_(0.05 * torch.randn_like(state.master))
    batches = [batch_of(base, rows_of(9 + k, 30, 12), way) for k in range(4)]
    with attach(base, state), packing(base, way.packed), recomputing(base, recompute):
        torch.manual_seed(2)
        gradient_step(base, state, batches, way)
    assert state.master.grad is not None
    return state.master.grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_computed_twice_give_the_same_gradient(model: str, variant: str, packed: bool, dropout: float) -> None:
    base = Base.of(MODELS[model](), model)
    way = Way(True, packed)
    plain, twice = (gradient(base, way, recompute, dropout, variant) for recompute in (False, True))
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(plain, twice, rtol=0, atol=1e-6)


def test_blocks_are_computed_twice() -> None:
    base = Base.of(tiny_llama(), "llama")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    base.model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(count)
    gradient(base, Way(True, True), recompute=False)
    assert calls == 4
    gradient(base, Way(True, True), recompute=True)
    assert calls == 4 + 4 + 3  # the first call is a plain one


def test_a_model_is_as_it_was_after_recomputing() -> None:
    base = Base.of(tiny_llama(), "llama")
    with pytest.raises(KeyError), recomputing(base):
        raise KeyError
    assert not [name for name, module in base.model.named_modules() if "forward" in vars(module)]


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(AttachError, match="names no blocks"), recomputing(Base.of(plain_module(), "plain")):
        pass
