"""What counts as a linear layer: by its type, or by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_falcon
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import adapting, attach
from lorafit.attachment.watching import observing
from lorafit.bases.base import Base
from lorafit.layers import find_sites, kind_of
from lorafit.planning.rules import all_linear
from lorafit.testing import random_adapter


class Written(nn.Linear):
    """As some families write it out."""

    def forward(self, input: Tensor) -> Tensor:
        found = input @ self.weight.T
        return found if self.bias is None else found + self.bias


class Named(nn.Linear):
    """What it is given has another name than in torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Marked(nn.Linear):
    """A type of its own, so that something can tell it apart."""


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.03 * super().forward(input)


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-20, 20))


class Rounded(nn.Linear):
    """The weight is rounded to few values as it is read."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, (self.weight * 8).round() / 8, self.bias)


class Gate(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class Two(nn.Linear):
    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) + other


class Several(nn.Linear):
    def forward(self, *given: Tensor) -> Tensor:
        return super().forward(given[0])


class Counting(nn.Linear):
    """Writes down what it is given: trying it out would change it."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.largest.copy_(input.abs().max())
        return super().forward(input)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(16, 24), "weight", Doubled())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Written, Marked, Named])
def test_a_subclass_that_computes_a_linear_layer_is_one(kind: type[nn.Linear], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert kind_of(kind(160, 96, bias=bias).to(dtype)) == "linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [Scaled, Clamped, Rounded, Gate, Two, Several])
def test_a_subclass_that_computes_something_else_is_none(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert kind_of(kind(160, 96).to(dtype)) is None


@pytest.mark.parametrize(
    "make", [parametrised, lambda: nn.MultiheadAttention(16, 2).out_proj, lambda: Written(4, 4, device="meta")]
)
def test_a_subclass_whose_weight_is_read_past_it_or_made_anew_is_none(make: Callable[[], nn.Module]) -> None:
    assert kind_of(make()) is None


class ByName(nn.Module):
    """Calls its layers by the names of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.plain, self.conv = Named(8, 8), nn.Linear(8, 8), Conv1D(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x=self.plain(input=self.named(x=x)))
        return found


def test_a_site_may_be_called_by_the_name_of_what_it_is_given() -> None:
    base = Base.of(ByName().eval(), "by name")
    assert [site.path for site in base.sites] == ["named", "plain", "conv"]
    x, seen = torch.ones(3, 8), []
    state = TrainState(random_adapter(base, uniform(base.sites, 2, 4.0)))
    paths = [site.path for site in base.sites]
    with attach(base, state), observing(base, paths, lambda *_: None, lambda path, *_: seen.append(path)):
        acted = base.model(x)
        acted.sum().backward()
    assert sorted(seen) == sorted(paths)
    assert not torch.equal(acted, base.model(x))
    with adapting(base, lambda number, x, original: original(x)):
        assert torch.equal(base.model(x), base.model(x))


def test_what_keeps_a_state_is_not_tried() -> None:
    layer = Counting(4, 4)
    assert kind_of(layer) is None
    assert layer.largest == 0


def test_trying_a_layer_leaves_the_random_numbers_as_they_were() -> None:
    model = nn.Sequential(Written(8, 8))
    before = torch.get_rng_state()
    assert find_sites(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_layer_of_a_falcon_is_a_site() -> None:
    """Its layers are of a type of their own."""
    base = Base.of(tiny_falcon(), "falcon")
    names = {site.name for site in all_linear(base)}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
