"""The laws, for every variant on every kind of layer, in fp32 and bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import encoder, normed, plain_module, tiny_falcon, tiny_gpt2, tiny_llama
from torch import nn
from torch.backends import mha
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrised
from transformers.modeling_utils import PreTrainedModel

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import LowRank, Plan
from lorafit.attachment.adapters import adapting, attach
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import fired
from lorafit.bases.base import Base
from lorafit.layers import KINDS
from lorafit.layers.kind import Layer
from lorafit.planning.rules import all_linear
from lorafit.testing import LAWS, Case, law_compiled_notices, random_adapter
from lorafit.variants import VARIANTS


class Worded(nn.Module):
    """Words in numbers: an embedding, and a layer over it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.over = nn.Linear(16, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.over(self.words(ids)))


def worded() -> Worded:
    torch.manual_seed(0)
    return Worded().eval()


class Seen(nn.Module):
    """Pictures in numbers: convolutions over two dimensions and over one, in groups and without, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding="same", bias=False)
        self.along = nn.Conv1d(12, 8, 5, padding=4, dilation=2, padding_mode="replicate")
        self.over = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        return torch.tanh(self.over(torch.tanh(self.along(x.flatten(2))).mT))


def seen() -> Seen:
    torch.manual_seed(0)
    return Seen().eval()


EVERY_KIND = {"embedding", "convolution", "attention"}  # of whose models all sites are taken
MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "falcon": tiny_falcon,
    "no-transformer": plain_module,
    "encoder": encoder,
    "embedding": worded,
    "convolution": seen,
    "attention": encoder,
    "batch-norm": normed,
}


def make_case(name: str, variant: str, dtype: torch.dtype) -> Case:
    """Mixed ranks and scales, so that no law holds by uniformity."""
    model = MODELS[name]().to(dtype)
    base = Base.of(model, name)
    acts = [site for site in base.every_site if VARIANTS[variant].any_kind or KINDS[site.kind].any_variant]
    sites = acts if name in EVERY_KIND else all_linear(base)
    slots = [LowRank(site, 1 + i % 4, 4.0 + i % 3, variant) for i, site in enumerate(sites)]
    forward: Callable[[], torch.Tensor]
    if name == "embedding":
        words = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))
        forward = lambda: model(words)  # noqa: E731
    elif not isinstance(model, PreTrainedModel):
        # Only a batch is computed by one fused call.
        shape = {"encoder": (2, 5, 16), "attention": (2, 5, 16), "convolution": (2, 3, 8, 8)}.get(name, (5, 16))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        forward = lambda: model(x)  # noqa: E731
    else:
        ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))
        forward = lambda: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    return Case(base, forward, Plan(tuple(slots)))


def cases() -> Iterator[Any]:
    """Every law of every case. A compiler takes seconds for each: most of those are slow tests."""
    for law in LAWS:
        for model in MODELS:
            for variant in VARIANTS:
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                    slow = law is law_compiled_notices and (model, variant, name) not in COMPILED
                    told = f"{law.__name__.removeprefix('law_')}-{model}-{variant}-{name}"
                    yield pytest.param(law, model, variant, dtype, id=told, marks=pytest.mark.slow if slow else ())


COMPILED = {
    ("llama", "lora", "fp32"),
    ("llama", "dora", "bf16"),
    ("falcon", "pissa", "fp32"),
    ("encoder", "lora", "fp32"),
    ("embedding", "rslora", "bf16"),
    ("convolution", "dora", "fp32"),
    ("attention", "lora", "fp32"),
}


@pytest.mark.parametrize(("law", "model", "variant", "dtype"), [*cases()])
def test_law(law: Callable[[Case], None], model: str, variant: str, dtype: torch.dtype) -> None:
    law(make_case(model, variant, dtype))


def test_what_pissa_has_learnt_is_not_lost_in_bf16() -> None:
    """A step is far below the spacing of bf16 at the start's size: it is told apart before the cast."""
    case = make_case("llama", "pissa", torch.bfloat16)
    start = fresh(case.base, case.plan, 0)
    moved = {k: t + 1e-4 * torch.randn(t.shape) if k.endswith((".A", ".B")) else t for k, t in start.tensors.items()}
    adapter = Adapter(case.plan, moved, start.base, start.base_name)
    wide = Base.of(copy.deepcopy(case.base.model).float(), "wide")
    theirs = Adapter(case.plan, moved, wide.identity, wide.name)
    path = case.plan.slots[0].site.path
    x = torch.randn(64, case.plan.slots[0].site.d_in, generator=torch.Generator().manual_seed(2))
    effects = []
    for base, one, given in ((case.base, adapter, x.bfloat16()), (wide, theirs, x.bfloat16().float())):
        module = base.model.get_submodule(path)
        factors = one.factors(given.dtype, given.device)[path]
        slot, zero = case.plan.slots[0], torch.zeros(64, case.plan.slots[0].site.d_out, dtype=given.dtype)
        layer = Layer(KINDS[slot.site.kind], module)
        effects.append(VARIANTS["pissa"].forward(given, zero, layer, factors, slot.scaling).float())
    error = float((effects[0] - effects[1]).norm() / effects[1].norm())
    assert error < 4 * torch.finfo(torch.bfloat16).eps  # of four roundings: x A, twice, and what they add


# torch's fused encoder layer, which passes over the layers within it


def test_an_adapter_acts_in_eval_as_it_does_in_train() -> None:
    case = make_case("encoder", "lora", torch.float32)
    adapter = random_adapter(case.base, case.plan)
    in_eval = case.output(adapter)
    assert not torch.allclose(in_eval, case.bare(), atol=1e-3)
    case.base.model.train()
    assert torch.equal(case.output(adapter), in_eval)


def test_the_fused_layer_is_left_as_it_was() -> None:
    case = make_case("encoder", "lora", torch.float32)
    adapter = random_adapter(case.base, case.plan)
    assert mha.get_fastpath_enabled()
    with attach(case.base, adapter) as attached:
        assert not mha.get_fastpath_enabled()
        with attached.off(), attached.off():
            assert mha.get_fastpath_enabled()
        assert not mha.get_fastpath_enabled()
        other = make_case("encoder", "lora", torch.float32)
        with attach(other.base, random_adapter(other.base, other.plan)) as second, second.off():
            assert not mha.get_fastpath_enabled(), "the first adapter is attached still"
        assert not mha.get_fastpath_enabled()
    assert mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with attach(case.base, adapter):
            pass
        assert not mha.get_fastpath_enabled(), "as the user had it"
    finally:
        mha.set_fastpath_enabled(True)


def test_a_model_without_such_layers_leaves_the_fused_layer_on() -> None:
    case = make_case("llama", "lora", torch.float32)
    with attach(case.base, random_adapter(case.base, case.plan)):
        assert mha.get_fastpath_enabled()


def test_the_probe_sees_what_an_adapter_reaches_and_nothing_else() -> None:
    """By hooks, which switch the fused layer off, it saw layers that were passed over once they were gone."""
    base = make_case("encoder", "lora", torch.float32).base
    x = torch.ones(1, 3, 16)
    names = ("linear1", "linear2", "self_attn.in_proj_weight", "self_attn.out_proj.weight")
    assert fired(base, lambda: base.model(x)) == {f"layers.{i}.{name}" for i in (0, 1) for name in names}
    assert all("forward" not in vars(module) for module in base.model.modules())
    assert mha.get_fastpath_enabled()


# Buffers that a forward writes


def mixed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.InstanceNorm1d(16, track_running_stats=True),
        parametrised(nn.Linear(16, 16)),
        spectral_norm(nn.Conv1d(16, 16, 1)),
    )


@pytest.mark.parametrize("served", [False, True])
def test_what_a_forward_writes_in_train_is_forgotten(served: bool) -> None:
    base = Base.of(mixed(), "mixed")
    plan = Plan(tuple(LowRank(site, 2, 4.0) for site in base.sites))
    x, before = torch.randn(5, 16, 16, requires_grad=True), base.integrity()
    on = adapting(base, lambda _, x, original: original(x)) if served else attach(base, random_adapter(base, plan))
    with on:
        base.model.eval()  # it may be switched inside
        base.model.train()
        for _ in range(2):
            found = base.model(x).sum()
        assert base.integrity() == before
        found.backward()
    assert base.integrity() == before
    assert all("forward" not in vars(module) for module in base.model.modules())
    base.model(x)
    assert base.integrity() != before, "a bare forward in train() does write: nothing was tested"


def test_a_batch_norm_computes_in_train_what_it_computes_without_an_adapter() -> None:
    base = Base.of(normed(), "normed")
    x = torch.randn(5, 16)
    expected = base.model(x)
    plan = Plan(tuple(LowRank(site, 2, 4.0) for site in base.sites))
    with attach(base, random_adapter(base, plan)) as attached, attached.off():
        assert torch.equal(base.model(x), expected)
