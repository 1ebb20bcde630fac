"""What counts as a linear layer: by its type, or by what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from lorafit.layers import KINDS, find_sites, kind_of
from lorafit.planning.rules import all_linear
from lorafit.testing import check_kind, random_adapter


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
    "make",
    [
        parametrised,
        lambda: nn.MultiheadAttention(16, 2, kdim=8),
        lambda: nn.ConvTranspose1d(4, 8, 3),
        lambda: Written(4, 4, device="meta"),
    ],
)
def test_a_subclass_whose_weight_is_made_anew_and_other_types_are_none(make: Callable[[], nn.Module]) -> None:
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


# What a new kind is checked by


def conv1d() -> Conv1D:
    module = Conv1D(24, 16)
    nn.init.normal_(module.bias)
    return module


NUMBERS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
SAMPLES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(16, 24), NUMBERS),
    "conv1d": (conv1d, NUMBERS),
    "embedding": (lambda: nn.Embedding(40, 16), torch.tensor([[1, 2, 3]])),
    "convolution": (lambda: nn.Conv1d(4, 24, 3, padding=2), torch.ones(2, 4, 7)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_kind_is_what_it_says(name: str) -> None:
    make, x = SAMPLES[name]
    check_kind(name, make(), x)


def test_every_kind_has_a_sample_but_those_that_act_through_their_module() -> None:
    assert {name for name, kind in KINDS.items() if kind.through is None} == set(SAMPLES)
    with pytest.raises(AssertionError, match=r"through: only kinds that act beside their module.*use check_laws"):
        check_kind("attention.in_proj_weight", nn.MultiheadAttention(16, 2), NUMBERS)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "strided": (lambda: nn.Conv1d(6, 24, 3, stride=2, padding=1), (2, 6, 9)),
    "same": (lambda: nn.Conv2d(4, 20, (3, 2), padding="same", dilation=2), (2, 4, 7, 8)),
    "circular": (lambda: nn.Conv2d(6, 24, 3, groups=3, padding=1, padding_mode="circular"), (2, 6, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 24, 3, groups=6, bias=False), (2, 6, 7, 8)),
    "unbatched": (lambda: nn.Conv2d(4, 24, 3, groups=2), (4, 7, 8)),
    "volumes": (lambda: nn.Conv3d(2, 7, 2, stride=2), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_a_product_at_every_position(name: str) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    check_kind("convolution", make(), torch.randn(shape))


def test_a_linear_layer_without_bias_is_of_its_kind_too() -> None:
    check_kind("linear", nn.Linear(16, 24, bias=False), NUMBERS)


LINEAR = KINDS["linear"]  # as it is, whatever is put in its place


def writes_to_y(module: nn.Module, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    return y.view(-1, y.shape[-1]).addmm_(u, b.T, alpha=scaling).view(y.shape)


def of_one_at_most(module: nn.Module, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    return LINEAR.up(module, u, b, min(scaling, 1.0), y)


def never_quite_nothing(module: nn.Module, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    return LINEAR.up(module, u, b, scaling, y) + 1e-6


def reads_once() -> Callable[[nn.Module], Tensor]:
    """As if the weight were kept from the first time that it is asked for."""
    kept: list[Tensor] = []

    def weight(module: nn.Module) -> Tensor:
        assert isinstance(module, nn.Linear)
        kept.append(module.weight.detach().clone())
        return kept[0]

    return weight


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "widths": (
        "linear",
        {"widths": lambda m: (24, 16)},
        r"widths, out_dim, fan_in: .*\(24, 16\), and weight is \(24, 16\)",
    ),
    "widths of the output": (
        "conv1d",
        {"widths": lambda m: (24, 16), "weight": lambda m: m.weight},
        "and the output has 24 along dimension -1, which is not d_out",
    ),
    "fan_in": ("embedding", {"fan_in": lambda site: 0}, "fan_in: 0 of 40 inputs"),
    "stored": (
        "conv1d",
        {"stored": lambda module, matrix: matrix},
        r"stored: .*of \(16, 24\) in the module \(24, 16\) is",
    ),
    "stored numbers": (
        "linear",
        {"stored": lambda module, matrix: -matrix},
        "weight, stored: .*other numbers are stored",
    ),
    "weight": ("linear", {"weight": reads_once()}, "weight, stored: .*another matrix is read than was stored"),
    "bias": ("linear", {"bias": lambda m: None}, "bias: .*it is None, and tensor"),
    "down": ("embedding", {"down": LINEAR.down}, "down, up: .*RuntimeError"),
    "rows of down": (
        "linear",
        {"down": lambda module, x, a: x @ a.T},
        r"down gives \(2, 5, 3\) for 10 rows and rank 3",
    ),
    "up": ("linear", {"up": lambda m, u, b, s, y: y + (u @ b.T).view(y.shape)}, "down, up: .*they differ by up to"),
    "up in place": ("linear", {"up": writes_to_y}, "up writes to y"),
    "shape of up": (
        "linear",
        {"up": lambda m, u, b, s, y: y.view(10, -1) + s * u @ b.T},
        r"up gives \(10, 24\) for y of",
    ),
    "out_dim": ("convolution", {"out_dim": lambda m: -1}, "out_dim, fan_in: .*the output has 9 along dimension -1"),
    "is_product": ("embedding", {"is_product": True}, "is_product: .*the module takes torch.int64"),
    "identity": ("embedding", {"up": never_quite_nothing}, "this one layer: 1. Attached with fresh factors"),
    "merged": ("embedding", {"up": of_one_at_most}, "this one layer: 4. Merged weights compute"),
    "together": ("linear", {"up": never_quite_nothing}, "this one layer: 10. Sites that go together give the bits"),
    "peft_names": ("linear", {"peft_names": {"C": "lora_C"}}, r"peft_names: .*\{'C': 'lora_C'\}, and not a name for A"),
    "peft_names twice": (
        "linear",
        {"peft_names": {"A": "lora_X.weight", "B": "lora_X.weight"}},
        "peft_names: .*for A and",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kind_is_told_what_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, parts, told = WRONG[wrong]
    make, x = SAMPLES[name]
    monkeypatch.setitem(KINDS, name, replace(KINDS[name], **parts))
    with pytest.raises(AssertionError, match=f"(?s){told}"):
        check_kind(name, make(), x)


def test_a_module_that_no_kind_finds_and_a_kind_that_is_not_in_the_table_are_told() -> None:
    with pytest.raises(AssertionError, match=r"types, computes_as: .*a ConvTranspose1d is taken for no site"):
        check_kind("linear", nn.ConvTranspose1d(16, 24, 1), torch.ones(2, 16, 5))
    with pytest.raises(AssertionError, match="KINDS has no 'conv2d': give it its line there"):
        check_kind("conv2d", nn.Linear(16, 24), NUMBERS)


def test_a_square_sample_is_refused_for_it_hides_a_transposed_weight() -> None:
    with pytest.raises(AssertionError, match="give a module with other outputs than inputs"):
        check_kind("linear", nn.Linear(16, 16), NUMBERS)
