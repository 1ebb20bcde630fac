"""An adapter attached to a model, and many at once.

While attached, each site's `forward` is shadowed on the instance. Keys, types and bytes of the model stay as
they are, a parent that calls the module reaches the adapter, and a compiled model notices: torch's compiler
guards the forward of every module it has inlined and compiles again, where it passes over hooks that were added
later (torch 2.13)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan, Whole
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
    for path in [slot.site.module for slot in value.plan.slots] + [one.path for one in value.plan.whole]:
        require_bare_module(modules[path], path)
    attachment = Attachment(value.plan, base.model)
    flags = [(parameter, parameter.requires_grad) for parameter in base.model.parameters()]
    shadowed: list[nn.Module] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        places = {slot.site.path: Place.of(modules[slot.site.path], slot) for slot in value.plan.slots}
        shared = Shared(source, places)
        through: dict[str, list[Place]] = {}
        for path, place in places.items():
            if place.layer.kind.through is None:
                module = modules[path]
                module.forward = _adapted(place, shared, attachment)
                shadowed.append(module)
            else:
                through.setdefault(place.slot.site.module, []).append(place)
        replaced = {path: partial(_changed_weights, those, source) for path, those in through.items()} | {
            one.path: partial(_whole, one, modules[one.path], source) for one in value.plan.whole
        }
        for path, parameters in replaced.items():
            modules[path].forward = _replaced(modules[path], parameters, attachment)
            shadowed.append(modules[path])
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


def _replaced(
    module: nn.Module, parameters: Callable[[], Mapping[str, Any]], attachment: Attachment
) -> Callable[..., Any]:
    """The module's forward with these parameters, made for each call, in place of its own."""
    original, bare = module.forward, copy.copy(module)  # a copy that shares everything but what is attached to it

    def forward(*given: Any, **named: Any) -> Any:
        if not attachment.on:
            return original(*given, **named)
        return _with(bare, parameters()).forward(*given, **named)

    return forward


def _with(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """A copy of the module that shares everything with it but these parameters; they may be what acts as a tensor."""
    made = copy.copy(module)
    made._parameters, made._modules = dict(module._parameters), dict(module._modules)
    for name, value in parameters.items():
        child, _, rest = name.partition(".")
        if not rest:
            made._parameters[child] = value
        elif (inner := made._modules[child]) is not None:
            made._modules[child] = _with(inner, {rest: value})
    return made


def _whole(whole: Whole, module: nn.Module, source: Source) -> Mapping[str, Any]:
    parameter = next(module.parameters())
    return source.factors(parameter.dtype, parameter.device)[whole.path]


def _changed_weights(places: Sequence[Place], source: Source) -> Mapping[str, Any]:
    """W + ΔW of weights of one module, under its names for them."""
    made = {}
    for place in places:
        layer, site, through = place.layer, place.slot.site, place.layer.kind.through
        assert through is not None
        factors = source.factors(layer.weight.dtype, layer.weight.device)[site.path]
        added = place.variant.served(layer, factors, place.slot.scaling)
        made[site.parameter] = through(layer.module, added.A, added.B, 1.0)
    return made


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
