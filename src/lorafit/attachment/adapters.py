"""An adapter attached to a model, and many at once.

While attached, each site's `forward` is shadowed on the instance. Keys, types and bytes of the model stay as
they are, a parent that calls the module reaches the adapter, and a compiled model notices: torch's compiler
guards the forward of every module it has inlined and compiles again, where it passes over hooks that were added
later (torch 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan
from lorafit.attachment.buffers import unwritten
from lorafit.attachment.checks import landed, landing_of, require_bare, require_bare_module, require_base
from lorafit.attachment.fused import FUSED, layer_by_layer
from lorafit.attachment.source import Fixed, Source
from lorafit.attachment.together import Place, Shared
from lorafit.bases.base import Base


@dataclass
class Attachment:
    """A handle on an attached adapter: `with attachment.off(): ...` computes as the bare base, bit for bit."""

    plan: Plan
    model: nn.Module
    on: bool = True

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            with FUSED.wanted(True, self.model) if before else nullcontext():
                yield
        finally:
            self.on = before


@contextmanager
def attach(base: Base, adapter: Adapter | Source, *, accept_unknown_base: bool = False) -> Iterator[Attachment]:
    """Attach an adapter, or the state that trains one, for the length of the block.

    Everything is checked before anything is touched: the adapter's base is this base (an adapter from
    elsewhere says none, and needs `accept_unknown_base`), and each slot lands on a module of its widths. The
    base's weights need no gradient inside the block, and what its modules write to their buffers in `train()` is
    forgotten. `backward()` under activation checkpointing must run inside it too. Raises AdapterError, or
    AttachError for a model in a state that cannot be adapted.
    """
    value = adapter if isinstance(adapter, Adapter) else adapter.adapter
    require_base(base, value.base, value.base_name, accept_unknown_base)
    value = landed(base, value) if value is adapter else value
    source: Source = Fixed(value) if isinstance(adapter, Adapter) else adapter
    modules = landing_of(base, value.plan)
    for slot in value.plan.slots:
        require_bare_module(modules[slot.site.path], slot.site.path)
    attachment = Attachment(value.plan, base.model)
    flags = [(parameter, parameter.requires_grad) for parameter in base.model.parameters()]
    shadowed: list[nn.Module] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        shared = Shared(source)
        for slot in value.plan.slots:
            module = modules[slot.site.path]
            module.forward = _adapted(Place.of(module, slot), shared, attachment)
            shadowed.append(module)
        with layer_by_layer(base), unwritten(base):
            yield attachment
    finally:
        for module in shadowed:
            vars(module).pop("forward", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _adapted(place: Place, shared: Shared, attachment: Attachment) -> Callable[..., Tensor]:
    def forward(*given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())  # the one thing a site is given, whatever its forward calls it
        return shared.forward(place, x) if attachment.on else place.original(x)

    return forward


@contextmanager
def adapting(base: Base, change: Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """Have `change(number, x, original)` give what every site gives for x (..., d_in), for the length of the block.
    number: of the site in `base.sites`; original: what the site itself computes.

    This is how rows of many adapters run together: what a row's adapter adds is the business of `change`, and the
    model's structure stays as it is. Raises AttachError where another attachment is there.
    """
    require_bare(base)
    modules = [base.model.get_submodule(site.path) for site in base.sites]
    try:
        for number, module in enumerate(modules):
            module.forward = _changed(number, module.forward, change)
        with layer_by_layer(base), unwritten(base):
            yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _changed(
    number: int, original: Callable[..., Tensor], change: Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> Callable[..., Tensor]:
    def forward(*given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        return change(number, x, original)

    return forward
