"""Laws that hold for every variant on every kind of layer, and for every task. Run them on your own.

    from lorafit.testing import Case, TaskCase, check_kind, check_laws, check_task
    check_laws(Case(base, lambda: my_model(x).logits, plan))
    check_kind("embedding", nn.Embedding(40, 16), torch.tensor([[1, 2, 3]]))
    check_task(TaskCase(base, my_task, rows, plan))

A case is a base, a forward that returns one tensor, and a plan. Each law raises AssertionError with what it found. A
new kind of layer is checked by `check_kind` first, which says what part of it is wrong.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import LowRank, Plan
from lorafit.adapters.rendering import Classes
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fired
from lorafit.attachment.fused import layer_by_layer
from lorafit.attachment.pure import fresh, merged
from lorafit.attachment.watching import fired
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import AdapterError, TargetError
from lorafit.layers import KINDS, Kind, find_sites
from lorafit.layers.kind import Layer
from lorafit.layers.site import select
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import Task

ROUNDING = 1e-4  # relative, of sums in fp32 that are taken in another order


@dataclass(frozen=True)
class Case:
    """forward() runs the base's model on fixed inputs and returns one tensor that depends on every site."""

    base: Base
    forward: Callable[[], Tensor]
    plan: Plan

    def bare(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def output(self, adapter: Adapter) -> Tensor:
        """Of a second forward, in which sites that share their input go together where the variant can."""
        with attach(self.base, adapter), torch.no_grad():
            self.forward()
            return self.forward()


def random_adapter(
    base: Base, plan: Plan, seed: int = 0, size: float = 0.05, classes: Classes | None = None
) -> Adapter:
    """An adapter in which every factor is moved away from its start, so that all of it acts. classes: of a
    classifier."""
    start = fresh(base, plan, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    moved = {key: t + size * torch.randn(t.shape, generator=generator) for key, t in start.tensors.items()}
    return Adapter(plan, moved, start.base, start.base_name, classes=classes)


def law_identity_at_the_start(case: Case) -> None:
    """1. Attached with fresh factors, outputs are bit-identical to the bare base, computed layer by layer as then."""
    with layer_by_layer(case.base):
        bare = case.bare()
    assert torch.equal(case.output(fresh(case.base, case.plan, seed=3)), bare)


def law_base_untouched(case: Case) -> None:
    """2. Keys, types and bytes of the base are equal while attached, after training, after an exception."""
    model = case.base.model

    def look() -> tuple[str, list[tuple[str, type]], list[bool]]:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return case.base.integrity(), modules, flags

    bare = case.bare()  # which may write to the model, in `train()`
    before = look()
    state = TrainState(random_adapter(case.base, case.plan), case.base.device)
    optimizer = torch.optim.AdamW(state.parameters(), lr=1e-2)
    keys = list(model.state_dict())
    with attach(case.base, state):
        for _ in range(2):
            case.forward().float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert look()[:2] == before[:2]
        assert list(model.state_dict()) == keys
    assert look() == before
    assert all("forward" not in vars(module) for module in model.modules())
    try:
        with attach(case.base, state):
            raise KeyError("any")
    except KeyError:
        pass
    assert look() == before
    assert torch.equal(case.bare(), bare)


def law_landed(case: Case) -> None:
    """3. What does not land is an error, and every site that lands acts."""
    adapter = random_adapter(case.base, case.plan)
    whole = case.output(adapter)
    for slot in case.plan.slots:
        path = slot.site.path
        own = {f"{path}.{name}" for name, shape in slot.shapes().items() if len(shape) > 1}
        zeroed = {key: torch.zeros_like(t) if key in own else t for key, t in adapter.tensors.items()}
        without = Adapter(case.plan, zeroed, adapter.base, adapter.base_name)
        assert not torch.equal(case.output(without), whole), f"{path} has no effect"
    require_fired(case.plan, fired(case.base, case.forward))
    name = case.plan.slots[0].site.name
    _expect(TargetError, lambda: select(case.base.sites, [name, name + "x"]))
    kept = dict(list(adapter.tensors.items())[1:])
    _expect(AdapterError, lambda: Adapter(case.plan, kept))
    stranger = Adapter(case.plan, adapter.tensors, base="0" * 64, base_name="another")
    _expect(AdapterError, lambda: case.output(stranger))


def law_merged_equals_attached(case: Case) -> None:
    """4. Merged weights compute what the attached adapter does, within the dtype's rounding; the base stays."""
    adapter = random_adapter(case.base, case.plan)
    before = case.base.integrity()
    new = {**{key: buffer.clone() for key, buffer in case.base.model.named_buffers()}, **merged(case.base, adapter)}
    with torch.no_grad():
        out = torch.func.functional_call(_Call(case), {f"model.{k}": v for k, v in new.items()}, (), tie_weights=False)
    assert case.base.integrity() == before
    attached, bare = case.output(adapter), case.bare()
    effect = (attached - bare).float().abs().max()
    error = (out - attached).float().abs().max()
    assert effect > 0
    assert error <= effect * (1e-3 if case.base.dtype == torch.float32 else 0.25), f"{error} of an effect of {effect}"


class _Call(nn.Module):
    """The case's forward as a module around the model, for torch.func.functional_call."""

    def __init__(self, case: Case):
        super().__init__()
        self.model = case.base.model
        self._forward = case.forward

    def forward(self) -> Tensor:
        return self._forward()


def law_saved_bit_exact(case: Case) -> None:
    """5. An adapter read back is the same value. (That PEFT reads it and computes the same is tested with PEFT.)"""
    adapter = random_adapter(case.base, case.plan)
    with tempfile.TemporaryDirectory() as folder:
        peft.write(adapter, Path(folder) / "adapter")
        again = peft.read(Path(folder) / "adapter")
    assert again == adapter
    assert again.plan == adapter.plan
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())


def law_gradients(case: Case) -> None:
    """6. Every factor that is trained receives a gradient and no other does; no weight of the base either. Experts that
    no token reaches are exempt (`idle_experts` lists them): theirs is zero."""
    state = TrainState(random_adapter(case.base, case.plan), case.base.device)
    with attach(case.base, state):
        case.bare()
        case.forward().float().square().mean().backward()
        idle = idle_experts(case)
    for key, gradient in state.gradients().items():
        assert gradient.abs().sum() > 0, f"{key} has no gradient"
        if (path := key.rpartition(".")[0]) in idle:
            still = tuple((gradient.flatten(1) == 0).all(1).nonzero().flatten().tolist())
            assert still == idle[path], f"{key}: no gradient of experts {still}, and no token reaches {idle[path]}"
    declared = [(f"{slot.site.path}.{name}", one) for slot in case.plan.slots for name, one in slot.factors().items()]
    assert set(state.gradients()) == {key for key, one in declared if one.trained}
    kept = state.freeze()
    assert all(torch.equal(kept.tensors[key], state.adapter.tensors[key]) for key, one in declared if not one.trained)
    assert all(parameter.grad is None for parameter in case.base.model.parameters())


def idle_experts(case: Case) -> dict[str, tuple[int, ...]]:
    """By site on experts, those that no token of the case's forward reaches, as the base now computes."""
    experts = [slot.site for slot in case.plan.slots if slot.site.count > 1]
    reached: dict[str, set[int]] = {site.module: set() for site in experts}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            for one in (*given, *named.values()):
                if isinstance(one, Tensor) and not one.is_floating_point():  # the numbers of each token's experts
                    reached[path].update(one.unique().tolist())

        return see

    modules = {path: case.base.model.get_submodule(path) for path in reached}
    handles = [module.register_forward_pre_hook(watch(path), with_kwargs=True) for path, module in modules.items()]
    try:
        case.bare()
    finally:
        for handle in handles:
            handle.remove()
    return {site.path: tuple(sorted(set(range(site.count)) - reached[site.module])) for site in experts}


def law_off_means_off(case: Case) -> None:
    """8. With the adapter switched off, outputs are bit-identical to the bare base; on again, they are not."""
    bare = case.bare()
    with attach(case.base, random_adapter(case.base, case.plan)) as attached, torch.no_grad():
        with attached.off():
            assert torch.equal(case.forward(), bare)
        assert not torch.equal(case.forward(), bare)


def law_compiled_notices(case: Case) -> None:
    """9. A callable compiled before attaching computes with the adapter once it is attached, and without it after."""
    torch._dynamo.reset()
    compiled = torch.compile(case.forward, backend="eager")
    with torch.no_grad():
        bare = compiled()
        with attach(case.base, random_adapter(case.base, case.plan)):
            assert not torch.equal(compiled(), bare), "the compiled model passed over the adapter"
        assert torch.equal(compiled(), bare), "the compiled model kept the adapter"
    torch._dynamo.reset()


def law_together(case: Case) -> None:
    """10. Sites that go together give the bits they give one by one; the gradient within 1e-5 (bf16: 2 %)."""
    adapter = random_adapter(case.base, case.plan)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # beneath which each goes on its own
        ((expected, own),) = _forwards(case, adapter, 1)
    for output, gradient in _forwards(case, adapter, 3):
        assert torch.equal(output, expected), f"differs by up to {(output - expected).abs().max()}"
        error, size = float((gradient - own).norm()), float(own.norm())
        within = 1e-5 if case.base.dtype == torch.float32 else 0.02
        assert error <= within * size, f"the gradient differs by {error}, of {size}"


def _forwards(case: Case, adapter: Adapter, times: int) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of each of several forwards of one attachment."""
    state, found = TrainState(adapter, case.base.device), []
    with attach(case.base, state):
        for _ in range(times):
            output = case.forward()
            (gradient,) = torch.autograd.grad(output.float().square().mean(), state.master)
            found.append((output.detach(), gradient))
    return found


LAWS: tuple[Callable[[Case], None], ...] = (
    law_identity_at_the_start,
    law_base_untouched,
    law_landed,
    law_merged_equals_attached,
    law_saved_bit_exact,
    law_gradients,
    law_off_means_off,
    law_compiled_notices,
    law_together,
)


def check_laws(case: Case) -> None:
    """Run every law on the case; AssertionError names the one that does not hold."""
    _check(LAWS, case)


@dataclass(frozen=True)
class TaskCase:
    """rows: several, of different lengths. plan: an adapter for the base, in fp32, with all that the task trains."""

    base: Base
    task: Task
    rows: Sequence[Row]
    plan: Plan

    @property
    def runner(self) -> Runner:
        return Runner.of(self.base, self.rows, self.task)


def law_targets(case: TaskCase) -> None:
    """1. A batch counts its rows, and names the row of each target, rows in order, as many as the rows say."""
    batch, wanted = case.runner.batch(case.rows), [row.n_trained for row in case.rows]
    assert batch.rows == len(case.rows), f"rows is {batch.rows}, of {len(case.rows)}"
    owned = torch.repeat_interleave(torch.arange(len(wanted)), torch.tensor(wanted)).tolist()
    assert batch.owner.tolist() == owned, f"owner is {batch.owner.tolist()}, and the rows say {owned}"
    assert batch.n_trained == len(owned), f"n_trained is {batch.n_trained}, of {len(owned)} targets"


def law_nll(case: TaskCase) -> None:
    """2. Every target has one NLL, in fp32, and it is the same whatever other rows are in the batch."""
    runner = case.runner
    with torch.no_grad():
        batches = [runner.batch(case.rows), *(runner.batch([row]) for row in case.rows)]
        together, *each = (case.task.nll(case.base, batch, runner.mode) for batch in batches)
    targets = sum(row.n_trained for row in case.rows)
    assert together.shape == (targets,), f"shape {tuple(together.shape)}, of {targets} targets"
    assert together.dtype == torch.float32, f"it is in {together.dtype}"
    error = float((torch.cat(each) - together).abs().max())
    assert error <= ROUNDING * float(together.abs().max()), f"a row on its own has an NLL that differs by {error}"


def law_divided(case: TaskCase) -> None:
    """3. The gradient of a step does not depend on how its rows are divided."""
    runner, found = case.runner, []
    for parts in ([list(range(len(case.rows)))], [[i] for i in range(len(case.rows))]):
        state = TrainState(random_adapter(case.base, case.plan), case.base.device)
        with runner.training(state):
            runner.gradient_of(case.rows, parts)
        assert state.master.grad is not None, "no gradient reaches the adapter"
        found.append(state.master.grad)
    error, size = float((found[1] - found[0]).norm()), float(found[0].norm())
    assert size > 0, "the gradient is zero"
    assert error <= ROUNDING * size, f"one row at a time it differs by {error}, of {size}"


def law_probes(case: TaskCase) -> None:
    """4. Probes have the lengths that are asked for, and can be run."""
    lengths = [max(len(row.ids) for row in case.rows), 3, 8]
    probes = case.task.probes(case.rows, lengths)
    found = [len(row.ids) for row in probes]
    assert found == lengths, f"lengths {found}, where {lengths} were asked for"
    assert all(case.task.weight(row) > 0 for row in probes), "a probe weighs nothing"
    nll = case.runner.nll(probes)
    assert len(nll) == len(probes) and all(map(math.isfinite, nll)), f"their NLL is {nll}"


TASK_LAWS: tuple[Callable[[TaskCase], None], ...] = (law_targets, law_nll, law_divided, law_probes)


def check_task(case: TaskCase) -> None:
    """Run every law of tasks on the case; AssertionError names the one that does not hold."""
    _check(TASK_LAWS, case)


def _check(laws: Sequence[Callable[[Any], None]], subject: Any) -> None:
    for law in laws:
        try:
            law(subject)
        except Exception as error:  # what is checked may raise anything
            found = error if isinstance(error, AssertionError) else repr(error)
            raise AssertionError(f"{law.__doc__}: {found}") from error


@dataclass(frozen=True)
class Sample:
    """A module of a kind, and what it is called with. name: of the kind in `lorafit.layers.KINDS`."""

    name: str
    module: nn.Module
    x: Tensor

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def case(self) -> Case:
        """A model of this module and nothing else, with one LoRA pair."""
        base = Base.of(nn.ModuleDict({"layer": self.module}), "sample")
        site = next(site for site in base.every_site if site.path == "layer")
        return Case(base, lambda: self.module(self.x), Plan((LowRank(site, rank=2, alpha=8.0),)))

    def with_weight(self, matrix: Tensor) -> nn.Module:
        """A copy of the module in which W is `matrix` (d_out, d_in)."""
        other = copy.deepcopy(self.module)
        other.get_parameter("weight").copy_(self.kind.stored(other, matrix))
        return other


def kind_finds_its_sites(sample: Sample) -> None:
    """types, computes_as: a module of the kind is a site of it"""
    assert sample.name in KINDS, f"lorafit.layers.KINDS has no '{sample.name}': give it its line there"
    assert sample.kind.through is None, "through: only kinds that act beside their module are checked: use check_laws"
    found = {site.path: site.kind for site in find_sites(nn.ModuleDict({"layer": sample.module}))}
    given, taken = type(sample.module).__name__, found.get("layer", "no site")
    assert taken == sample.name, f"a {given} is taken for {taken}"


def kind_tells_the_widths(sample: Sample) -> None:
    """widths, out_dim, fan_in: (d_in, d_out), as the weight and the output have them"""
    d_in, d_out = widths = sample.kind.widths(sample.module)
    shape, dim = tuple(sample.kind.weight(sample.module).shape), sample.kind.out_dim(sample.module)
    size = sample.module(sample.x).shape[dim]
    assert shape == (d_out, d_in), f"{widths}, and weight is {shape}, which is not (d_out, d_in)"
    assert size == d_out, f"{widths}, and the output has {size} along dimension {dim}, which is not d_out"
    assert d_in != d_out, f"{widths}: give a module with other outputs than inputs, which shows how its weight lies"
    inputs = sample.kind.fan_in(sample.case().plan.slots[0].site)
    assert 1 <= inputs <= d_in, f"fan_in: {inputs} of {d_in} inputs"


def kind_reads_what_is_stored(sample: Sample) -> None:
    """weight, stored: what is stored as the module's weight is read as the same matrix"""
    kind, own = sample.kind, sample.module.get_parameter("weight")
    weight = kind.weight(sample.module)
    again = kind.stored(sample.module, weight)
    assert again.shape == own.shape, f"of {tuple(own.shape)} in the module {tuple(again.shape)} is stored"
    assert torch.equal(again, own), "of the module's own weight other numbers are stored"
    other = _random(weight.shape, 1)
    assert torch.equal(kind.weight(sample.with_weight(other)), other), "another matrix is read than was stored"


def kind_reads_the_bias(sample: Sample) -> None:
    """bias: what comes out where the weight is zero; None for nothing"""
    out = sample.with_weight(torch.zeros_like(sample.kind.weight(sample.module)))(sample.x)
    bias = sample.kind.bias(sample.module)
    expected = torch.zeros_like(out)
    if bias is not None:
        expected = expected + Layer(sample.kind, sample.module).by_output(bias)
    dim = sample.kind.out_dim(sample.module)
    assert torch.equal(out, expected), f"it is {bias}, and {out.movedim(dim, -1).flatten(0, -2)[0]} comes out"


def kind_acts_as_its_weight(sample: Sample) -> None:
    """down, up: y + scaling · B (A x) is what the module gives with B A as its weight"""
    kind, layer, (d_in, d_out) = sample.kind, Layer(sample.kind, sample.module), sample.kind.widths(sample.module)
    a, b = _random((3, d_in), 1), _random((d_out, 3), 2)
    product = sample.with_weight(b @ a)(sample.x) - sample.with_weight(torch.zeros(d_out, d_in))(sample.x)
    y, u = _random(product.shape, 3), layer.down(sample.x, a)
    rows = y.numel() // d_out
    assert not kind.is_product or u.shape == (rows, 3), f"down gives {tuple(u.shape)} for {rows} rows and rank 3"
    before = y.clone()
    out = layer.up(u, b, 0.5, y)
    assert torch.equal(y, before), "up writes to y, and must return a new tensor"
    assert out.shape == y.shape, f"up gives {tuple(out.shape)} for y of {tuple(y.shape)}"
    error, size = (out - y - 0.5 * product).abs().max(), product.abs().max()
    assert error <= 1e-4 * size, f"they differ by up to {error}, of {size}"


def kind_is_the_product_it_says(sample: Sample) -> None:
    """is_product: only a module that computes x Wᵀ + b is computed in groups and served together with others"""
    if not sample.kind.is_product:
        return
    assert sample.x.is_floating_point(), f"it is True, and the module takes {sample.x.dtype}"
    expected = F.linear(sample.x, sample.kind.weight(sample.module), sample.kind.bias(sample.module))
    found = sample.module(sample.x)
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    assert same, "it is True, and the module computes something else"


def kind_keeps_the_laws(sample: Sample) -> None:
    """A model of this one layer"""
    laws = (law_identity_at_the_start, law_merged_equals_attached, law_saved_bit_exact, law_together)
    with torch.enable_grad():
        _check(laws, sample.case())


def kind_names_its_factors(sample: Sample) -> None:
    """peft_names: of A and B, where they differ from LoRA's. (That PEFT reads them is tested with PEFT.)"""
    names = sample.kind.peft_names
    whole = not names or (set(names) == {"A", "B"} and names["A"] != names["B"])
    assert whole, f"{dict(names)}, and not a name for A and another for B"


KIND_LAWS: tuple[Callable[[Sample], None], ...] = (
    kind_finds_its_sites,
    kind_tells_the_widths,
    kind_reads_what_is_stored,
    kind_reads_the_bias,
    kind_acts_as_its_weight,
    kind_is_the_product_it_says,
    kind_names_its_factors,
    kind_keeps_the_laws,
)


def check_kind(name: str, module: nn.Module, x: Tensor) -> None:
    """Check a kind of layer on one module of it. `check_laws` then runs every law on a model that has such layers.

    Args:
        name: Of the kind, in `lorafit.layers.KINDS`.
        module: A module of it, in fp32, with other outputs than inputs; it is not written to.
        x: What the module is called with.

    Raises:
        AssertionError: A part of the kind is wrong; the message begins with its name.
    """
    with torch.no_grad():
        _check(KIND_LAWS, Sample(name, module, x))


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _expect(kind: type[Exception], action: Callable[[], object]) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
