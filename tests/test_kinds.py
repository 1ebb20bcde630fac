"""Convolutions and torch's attention: PEFT reads ours, we read PEFT's, both compute the same, or it is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import encoder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.backends import mha

from lorafit.adapters.formats import peft
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.adapters.plan import LowRank, Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.pure import fresh, merged, served
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, FormatError, PlanError, TargetError
from lorafit.layers.site import Site
from lorafit.planning.rules import _named, adapted_by_default, reached
from lorafit.planning.trim import require_pairs, trimmed
from lorafit.testing import random_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    # Where every layer is adapted, nothing is left to be excluded.
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
    # Of attention PEFT adapts both weights, and starts the one that is not there at zero.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]
DATA = Path(os.environ.get("LORAFIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def trained(model: nn.Module) -> nn.Module:
    """Frozen, as an opened base is."""
    return model.eval().requires_grad_(False)


class Pictures(nn.Module):
    """Convolutions over one, two and three dimensions, in groups and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.volume = nn.Conv3d(1, 4, 2)
        self.strided = nn.Conv2d(12, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding="same", bias=False)
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12, padding=1)
        self.along = nn.Conv1d(12, 8, 1)
        self.over = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.volume(x)).flatten(1, 2)
        x = torch.tanh(self.grouped(torch.tanh(self.strided(x)))).flatten(2)
        out: Tensor = self.over(torch.tanh(self.along(torch.tanh(self.depthwise(x)))).mT)
        return out


class Attending(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True, **settings)
        self.over = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.over(self.attn(x, x, x, need_weights=False)[0])
        return out


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]  # a model, and the shape of what it is given
MODELS: dict[str, Case] = {
    "pictures": (Pictures, (2, 1, 4, 9, 9)),
    "attending": (Attending, (2, 5, 16)),
    "encoder": (encoder, (2, 5, 16)),
}


def output(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Computed layer by layer: torch's fused encoder passes over PEFT's layers."""
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            out: Tensor = model(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    finally:
        mha.set_fastpath_enabled(before)
    return out


def assert_the_same(ours: Tensor, theirs: Tensor, bare: Tensor) -> None:
    difference, effect = (float((theirs - other).abs().max()) for other in (ours, bare))
    assert difference <= 1e-4
    assert effect >= 100 * max(difference, 1e-4)


def ours_and_pefts(folder: Path, base: Base, plan: Plan, case: Case, size: float = 0.3) -> None:
    """Write a random adapter, have PEFT read it, and read it without what is ours in it."""
    adapter = random_adapter(base, plan, size=size)
    peft.write(adapter, folder)
    assert peft.read(folder) == adapter
    make, shape = case
    bare = output(base.model, shape)
    with attach(base, adapter):
        ours = output(base.model, shape)
    theirs = PeftModel.from_pretrained(trained(make()), str(folder))
    assert_the_same(ours, output(theirs, shape), bare)
    if any(slot.site.kind.startswith("attention") for slot in plan.slots):
        return  # a pair of in_proj_weight is told from that of a linear layer by one of out_proj
    (folder / "lorafit.json").unlink()
    with attach(base, peft.read(folder), accept_unknown_base=True):
        assert_the_same(output(base.model, shape), ours, bare)


@pytest.mark.parametrize("variant", ["lora", "rslora", "pissa", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_ours_and_computes_the_same(tmp_path: Path, name: str, variant: str) -> None:
    make, shape = MODELS[name]
    base = Base.of(trained(make()), name)
    sites = [site for site in base.every_site if site.name != "weight"]
    if variant == "dora" and name != "pictures":
        with pytest.raises(PlanError, match=r"dora does not act on an attention.in_proj_weight: choose another"):
            uniform(sites, 2, 4.0, variant)
        return
    slots = [LowRank(site, 1 + i % 3, 3.0, variant) for i, site in enumerate(sites)]
    assert misread_by_peft(base.model, slots) is None
    ours_and_pefts(tmp_path / "adapter", base, Plan(tuple(slots)), (make, shape))


@pytest.mark.parametrize("names", [["attn"], ["out_proj"]])
def test_peft_adds_the_change_of_out_proj_twice_and_that_is_told(tmp_path: Path, names: list[str]) -> None:
    make, shape = MODELS["attending"]
    base = Base.of(trained(make()), "attending")
    adapter = random_adapter(base, uniform(_named(base, names), 2, 4.0), size=0.3)
    assert str(misread_by_peft(base.model, adapter.plan.slots)).startswith(
        "attn.out_proj.weight: PEFT adds its change twice"
    )
    peft.write(adapter, tmp_path / "adapter")
    assert peft.read(tmp_path / "adapter") == adapter
    theirs = PeftModel.from_pretrained(trained(make()), str(tmp_path / "adapter"))
    twice = {key: 2 * tensor if key == "attn.out_proj.weight.B" else tensor for key, tensor in adapter.tensors.items()}
    with attach(base, replace(adapter, tensors=twice)):
        assert_the_same(output(base.model, shape), output(theirs, shape), output(base.model, shape) * 0)
    (tmp_path / "adapter" / "lorafit.json").unlink()
    with pytest.raises(FormatError, match=r"attn.out_proj.weight: .*the config names no such peft_version"):
        peft.read(tmp_path / "adapter")


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutions": ("pictures", {"target_modules": ["volume", "strided", "along", "over"]}),
    "rslora": ("pictures", {"target_modules": ["strided"], "use_rslora": True, "rank_pattern": {"strided": 2}}),
    "dora": ("pictures", {"target_modules": ["strided", "along"], "use_dora": True}),
    "attention": ("attending", {"target_modules": ["attn", "over"], "rank_pattern": {"attn": 2}}),
    "encoder": ("encoder", {"target_modules": ["self_attn", "linear1"], "lora_alpha": 3}),
}


def made_by_peft(name: str, folder: Path, settings: dict[str, Any]) -> Tensor:
    """Save an adapter of PEFT's, all of it random; returns what PEFT computes with it."""
    make, shape = MODELS[name]
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    model = get_peft_model(trained(make()), LoraConfig(**config)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    out = output(model, shape)
    model.save_pretrained(str(folder))
    return out


@pytest.mark.parametrize("case", FOREIGN)
def test_we_read_pefts_and_compute_the_same(tmp_path: Path, case: str) -> None:
    name, settings = FOREIGN[case]
    theirs = made_by_peft(name, tmp_path, settings)
    make, shape = MODELS[name]
    base = Base.of(trained(make()), name)
    with attach(base, peft.read(tmp_path), accept_unknown_base=True):
        ours = output(base.model, shape)
    assert_the_same(ours, theirs, output(base.model, shape))


def test_a_convolution_in_groups_that_is_no_product_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT trains an A that reads the channels of all groups."""
    made_by_peft("pictures", tmp_path, {"target_modules": ["grouped"]})
    with pytest.raises(FormatError, match=r"grouped: its A differs between the 2 groups, or reads channels"):
        peft.read(tmp_path)


def test_a_pair_of_odd_convolutions_is_named(tmp_path: Path) -> None:
    made_by_peft("pictures", tmp_path, {"target_modules": ["strided"]})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    odd = {name: torch.cat([t, t], dim=-1) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(odd, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="strided: lora_A and lora_B are not a pair of convolutions"):
        peft.read(tmp_path)


def test_what_peft_adapts_on_a_layer_whose_forward_is_never_called_does_not_land(tmp_path: Path) -> None:
    made_by_peft("attending", tmp_path, {"target_modules": ["out_proj", "over"]})
    base = Base.of(trained(Attending()), "attending")
    with (
        pytest.raises(AdapterError, match=r"attn.out_proj: a NonDynamicallyQuantizableLinear cannot be adapted"),
        attach(base, peft.read(tmp_path), accept_unknown_base=True),
    ):
        pass


def test_an_adapter_of_another_kernel_does_not_land() -> None:
    base = Base.of(nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)}), "kernel of 3 by 3")
    other = Base.of(nn.ModuleDict({"conv": nn.Conv2d(3, 8, (1, 9))}), "kernel of 1 by 9")
    adapter = random_adapter(other, uniform(other.every_site, 2, 4.0))
    with (
        pytest.raises(AdapterError, match=r"groups and kernel \(1, 3, 3\) in the base, \(1, 1, 9\) in the adapter"),
        attach(base, type(adapter)(adapter.plan, adapter.tensors), accept_unknown_base=True),
    ):
        pass


MISREAD: dict[str, tuple[nn.Module, str]] = {
    "dilated": (nn.Conv1d(4, 8, 3, dilation=2), "without its dilation"),
    "circular": (nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), "not in mode 'circular'"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_a_convolution_that_peft_computes_otherwise_is_told(tmp_path: Path, case: str) -> None:
    layer, told = MISREAD[case]
    model = trained(nn.ModuleDict({"conv": layer}))
    base = Base.of(model, case)
    adapter = random_adapter(base, uniform(base.every_site, 2, 4.0), size=0.3)
    assert told in str(misread_by_peft(model, adapter.plan.slots))
    peft.write(adapter, tmp_path / "adapter")
    x = torch.randn(2, 4, 9)
    with attach(base, adapter), torch.no_grad():
        ours = layer(x)
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    try:
        with torch.no_grad():
            same = torch.allclose(theirs.base_model.model["conv"](x), ours, atol=1e-4)
    except RuntimeError:
        return
    assert not same


# What plans and jobs make of them


def test_a_net_of_convolutions_is_adapted_by_them_and_others_only_where_they_are_named() -> None:
    net = Base.of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), "net")
    assert [site.path for site in adapted_by_default(net)] == ["0"]
    base = Base.of(trained(Pictures()), "pictures")
    assert [site.path for site in adapted_by_default(base)] == ["over"]
    assert [site.path for site in _named(base, ["strided"])] == ["strided"]
    words = reached(base, adapted_by_default(base))
    share = 100 * sum(m.weight.numel() for m in (base.model.strided, base.model.grouped))  # type: ignore[union-attr, operator]
    share /= sum(parameter.numel() for parameter in base.model.parameters())
    assert f"; adapted only if named: {share:.1f} % in Conv2d" in words
    assert "out of an adapter's reach" not in words


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.back, self.memory = nn.Bilinear(4, 4, 4), nn.ConvTranspose1d(4, 4, 3), nn.LSTM(4, 4)
        self.over = nn.Linear(4, 4)


def test_a_target_of_a_type_that_is_not_adapted_is_named_with_its_type() -> None:
    with pytest.raises(TargetError) as refused:
        _named(Base.of(Others(), "others"), ["pair", "back", "memory", "over"])
    for path, name in (("pair", "Bilinear"), ("back", "ConvTranspose1d"), ("memory", "LSTM")):
        assert f"{path}: torch.nn.{name} is not adapted: leave it out of --targets" in str(refused.value)
    assert "over" not in str(refused.value)


def test_linear_layers_are_trimmed_beside_others_and_others_alone_are_not() -> None:
    base = Base.of(trained(Pictures()), "pictures")
    adapter = random_adapter(base, uniform(base.every_site, 4, 8.0))
    small, _ = trimmed(adapter, 0.5)
    assert {slot.site.path: slot.rank for slot in small.plan.slots} == {
        site.path: 2 if site.path == "over" else 4 for site in base.every_site
    }
    alone = random_adapter(base, uniform(_named(base, ["strided"]), 4, 8.0))
    with pytest.raises(AdapterError, match="only pairs of linear layers can be trimmed, and this adapter has none"):
        require_pairs(alone)
    with pytest.raises(AdapterError, match="strided: an adapter of such a layer cannot be served together"):
        served(base, alone)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_output_is_laid_out_as_the_convolutions_own(variant: str) -> None:
    """The next layer computes by another kernel, and rounds otherwise, where its input is laid out otherwise."""
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1)).eval().requires_grad_(False)
    base = Base.of(model, "layout")
    x = torch.randn(2, 16, 1, 1).to(memory_format=torch.channels_last)
    with attach(base, fresh(base, uniform(base.every_site, 2, 4.0, variant), 0)):
        assert model(x).stride() == (8, 1, 8, 8)
    assert model(x).stride() == (8, 1, 8, 8)


def test_operations_are_counted_for_every_group() -> None:
    slot = LowRank(Site("conv", "convolution", 18, 12, (4, 3, 3)), 2, 4.0)
    assert slot.flops == 2 * 2 * (4 * 18 + 12)


# A real net


class Block(nn.Module):
    """Of a ResNet for CIFAR-10 (He et al. 2015, arXiv 1512.03385), whose shortcut has no weights."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        stride = d_out // d_in
        self.conv1, self.bn1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out)
        self.conv2, self.bn2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out)
        self.stride, self.more = stride, (d_out - d_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        past = x[..., :: self.stride, :: self.stride]
        return F.relu(inside + F.pad(past, (0, 0, 0, 0, self.more, self.more)))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (d_in, d_out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            self.add_module(f"layer{i}", nn.Sequential(Block(d_in, d_out), Block(d_out, d_out), Block(d_out, d_out)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def test_every_convolution_of_a_resnet_is_adapted_merged_and_read_by_peft(tmp_path: Path) -> None:
    file = DATA / "models" / "resnet20_cifar10.safetensors"
    if not file.exists():
        pytest.skip(f"{file} is not there: set LORAFIT_DATA to the folder that has it")

    def make() -> nn.Module:
        model = ResNet20()
        model.load_state_dict(load_file(file), strict=False)
        return model

    made = ResNet20().load_state_dict(load_file(file), strict=False)
    assert not [key for key in made.missing_keys if "num_batches" not in key] and not made.unexpected_keys
    base, shape = Base.of(trained(make()), "resnet20"), (2, 3, 32, 32)
    sites = [site for site in base.every_site if site.kind == "convolution"]
    assert len(sites) == 19
    plan = uniform(sites, 4, 8.0)
    ours_and_pefts(tmp_path / "adapter", base, plan, (make, shape), size=0.02)
    adapter = random_adapter(base, plan, size=0.02)
    with attach(base, adapter):
        attached = output(base.model, shape)
    with torch.no_grad():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        new = {**dict(base.model.named_buffers()), **merged(base, adapter)}
        together = torch.func.functional_call(base.model, new, (x,))
    assert_the_same(together, attached, output(base.model, shape))
