"""Attaches one adapter, or a function that handles many, to a model.

While an adapter is attached, each adapted module has a `forward` of its own in its instance dictionary. The keys, types
and bytes of the model stay the same, and a parent that calls the module reaches the adapter. A compiled model notices
the change: torch's compiler guards the forward of every inlined module and compiles again, whereas it ignores hooks
that are added later (torch 2.13).
"""

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
    """An attached adapter, as `attach` returns it. Inside `with attachment.off():` the model computes as the bare base,
    bit for bit.

    Args:
        plan: The plan of the adapter.
        model: The model that it is attached to.
        on: Whether the adapter takes effect.
    """

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

    Inside the block, the base's weights need no gradient, and its modules write to copies of their buffers, which are
    dropped afterwards. With activation checkpointing, `backward()` must also run inside the block.

    Args:
        base: The base that the adapter belongs to.
        adapter: The adapter, or a source of its factors, such as a TrainState.
        accept_unknown_base: Whether to accept an adapter that does not name its base, such as one that another program
            trained.

    Returns:
        A context manager that gives the Attachment.

    Raises:
        AdapterError: If the adapter belongs to another base, or a slot does not fit a module of the base. The model is
            unchanged then.
        AttachError: If an adapter is attached already.
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
        replaced = {path: partial(_changed_weights, changed, source) for path, changed in through.items()} | {
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
        (x,) = (*given, *named.values())  # a site takes one argument, by position or under any name
        return shared.forward(place, x) if attachment.on else place.original(x)

    return forward


def _replaced(
    module: nn.Module, parameters: Callable[[], Mapping[str, Any]], attachment: Attachment
) -> Callable[..., Any]:
    """The module's forward, with `parameters()` in place of the module's own parameters of these names."""
    original, bare = module.forward, copy.copy(module)  # a shallow copy, made before the forward is replaced

    def forward(*given: Any, **named: Any) -> Any:
        if not attachment.on:
            return original(*given, **named)
        return _with(bare, parameters()).forward(*given, **named)

    return forward


def _with(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of the module with these parameters. Their values need not be tensors: see `experts.Sum`."""
    changed = copy.copy(module)
    changed._parameters, changed._modules = dict(module._parameters), dict(module._modules)
    for name, value in parameters.items():
        child, _, rest = name.partition(".")
        if not rest:
            changed._parameters[child] = value
        elif (inner := changed._modules[child]) is not None:
            changed._modules[child] = _with(inner, {rest: value})
    return changed


def _whole(whole: Whole, module: nn.Module, source: Source) -> Mapping[str, Any]:
    parameter = next(module.parameters())
    return source.factors(parameter.dtype, parameter.device)[whole.path]


def _changed_weights(places: Sequence[Place], source: Source) -> Mapping[str, Any]:
    """W + ΔW of the adapted weights of one module, by their names in the module."""
    changed = {}
    for place in places:
        layer, site, through = place.layer, place.slot.site, place.layer.kind.through
        assert through is not None
        factors = source.factors(layer.weight.dtype, layer.weight.device)[site.path]
        added = place.variant.served(layer, factors, place.slot.scaling)
        changed[site.parameter] = through(layer.module, added.A, added.B, 1.0)
    return changed


@contextmanager
def adapting(base: Base, change: Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """Compute the output of every site with `change` for the length of the block. The engine uses this to run rows of
    many adapters in one batch: `change` decides what each row's adapter adds.

    Args:
        base: The base.
        change: (number, x, original) -> the output (..., d_out) of a site for x (..., d_in). `number` is the site's
            position in `base.sites`, and `original` is the site's own forward.

    Raises:
        AttachError: If an adapter is attached already.
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
