"""Sites that are called with the very same tensor (q, k and v; gate and up) are computed together where the variant
can: the first forward with a source goes site by site and finds them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.adapters.plan import LowRank
from lorafit.attachment.source import Source
from lorafit.layers import KINDS, kind_of
from lorafit.layers.kind import Layer
from lorafit.variants import VARIANTS
from lorafit.variants.variant import Variant


@dataclass(frozen=True, eq=False)
class Place:
    """One adapted site: what its module computes on its own, the module, its slot, and the method of that."""

    original: Callable[..., Tensor]
    layer: Layer
    slot: LowRank
    variant: Variant

    @staticmethod
    def of(module: nn.Module, slot: LowRank) -> Place:
        kind = KINDS[kind_of(module, slot.site.parameter) or slot.site.kind]
        return Place(module.forward, Layer(kind, module), slot, VARIANTS[slot.variant])


@dataclass(eq=False)
class Shared:
    """Finds the places that are called with the very same tensor, and computes them at the first one's call.

    Whatever does not come as expected is computed by itself: a place is given a kept output only for the tensor, in the
    state, and for the factors that the output was made from.
    """

    source: Source
    places: Mapping[str, Place]  # by path
    _last: tuple[weakref.ref[Tensor], int, Place] | None = None
    _kept: tuple[tuple[weakref.ref[Tensor], int, object, bool], dict[Place, Tensor]] | None = None

    def forward(self, place: Place, x: Tensor) -> Tensor:
        numbers = x.is_floating_point()  # else they are ids, which are neither dropped nor of a dtype to compute in
        dropped = self.source.drop(x) if numbers else x
        factors = self.source.factors(x.dtype if numbers else place.layer.weight.dtype, x.device)
        together = place.variant.together if place.layer.kind.is_product else None
        if together is None or dropped is not x or _watched(x):
            y, own = place.original(x), factors[place.slot.site.path]
            return place.variant.forward(dropped, y, place.layer, own, place.slot.scaling)
        if (kept := self._kept) is not None and place in kept[1]:
            made_from, version, by, grad = kept[0]
            if made_from() is x and version == x._version and by is factors and grad == torch.is_grad_enabled():
                return kept[1].pop(place)
        self._learn(place, x)
        group = [self.places[path] for path in self.source.groups[place.slot.site.path]]
        self._kept = None  # what a forward that broke off has left
        first, *others = together(
            x,
            [one.original for one in group],
            [one.layer for one in group],
            [factors[one.slot.site.path] for one in group],
            [one.slot.scaling for one in group],
        )
        made = (weakref.ref(x), x._version, factors, torch.is_grad_enabled())
        self._kept = (made, dict(zip(group[1:], others, strict=True)))
        return first

    def _learn(self, place: Place, x: Tensor) -> None:
        """Have the place before call for this one too, if both are given the same tensor."""
        groups, path = self.source.groups, place.slot.site.path
        new = path not in groups
        groups.setdefault(path, [path])
        if self._last is not None and new:
            tensor, version, leader = self._last
            if tensor() is x and version == x._version and leader.slot.variant == place.slot.variant:
                groups[leader.slot.site.path].append(path)
                return
        self._last = (weakref.ref(x), x._version, place)


def _watched(x: Tensor) -> bool:
    """Whether something around this call needs every site by itself.

    A compiler traces them. Tensors of inference mode do not count how often they are written to. Autocast reaches into
    single operations alone. torch.func differentiates in ways of its own. Activation checkpointing, which shows as
    hooks on saved tensors, computes a forward a second time, and must find that it saves as many as the first did.
    """
    return (
        torch.compiler.is_compiling()
        or x.is_inference()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )
