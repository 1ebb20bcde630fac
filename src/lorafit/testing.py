"""Laws that hold for every variant on every kind of layer. Run them on your own with `check_laws`.

    from lorafit.testing import Case, check_laws
    check_laws(Case(base, lambda: my_model(x).logits, plan))

A case is a base, a forward that returns one tensor, and a plan. Each law raises AssertionError with what it found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fired
from lorafit.attachment.fused import layer_by_layer
from lorafit.attachment.pure import fresh, merged
from lorafit.attachment.watching import fired
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, AttachError, TargetError
from lorafit.layers.site import select


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


def random_adapter(base: Base, plan: Plan, seed: int = 0, size: float = 0.05) -> Adapter:
    """An adapter in which every factor is moved away from its start, so that all of it acts."""
    start = fresh(base, plan, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    moved = {key: t + size * torch.randn(t.shape, generator=generator) for key, t in start.tensors.items()}
    return Adapter(plan, moved, start.base, start.base_name)


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


class _Call(torch.nn.Module):
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
    """6. Every factor that is trained receives a gradient and no other does; no weight of the base either."""
    state = TrainState(random_adapter(case.base, case.plan), case.base.device)
    with attach(case.base, state):
        case.bare()
        case.forward().float().square().mean().backward()
    for key, gradient in state.gradients().items():
        assert gradient.abs().sum() > 0, f"{key} has no gradient"
    declared = [(f"{slot.site.path}.{name}", one) for slot in case.plan.slots for name, one in slot.factors().items()]
    assert set(state.gradients()) == {key for key, one in declared if one.trained}
    kept = state.freeze()
    assert all(torch.equal(kept.tensors[key], state.adapter.tensors[key]) for key, one in declared if not one.trained)
    assert all(parameter.grad is None for parameter in case.base.model.parameters())


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
    for law in LAWS:
        try:
            law(case)
        except (AssertionError, AttachError) as error:
            raise AssertionError(f"{law.__doc__}: {error}") from error


def _expect(kind: type[Exception], action: Callable[[], object]) -> None:
    try:
        action()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
