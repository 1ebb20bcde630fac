"""Computes sites that are called with the same input tensor (q, k and v; gate and up) as one group, if the method can.

The first forward of a source computes each site on its own and finds the groups.
"""

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
    """An adapted site.

    Args:
        original: The forward of its module before anything was attached.
        layer: Its module.
        slot: Its slot in the plan.
        variant: The method of the slot.
    """

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
    """Finds the sites that are called with the same input tensor, and computes all of them when the first is called.

    The outputs of the others are stored. A site takes its stored output only if its input is the same tensor, unchanged
    since, with the same factors and the same gradient mode; otherwise it is computed on its own.
    """

    source: Source
    places: Mapping[str, Place]  # by path
    _last: tuple[weakref.ref[Tensor], int, Place] | None = None  # the last input, its version, the site it began with
    # The input, its version, the factors and the gradient mode from which outputs were computed; the outputs.
    _kept: tuple[tuple[weakref.ref[Tensor], int, object, bool], dict[Place, Tensor]] | None = None

    def forward(self, place: Place, x: Tensor) -> Tensor:
        """The adapted output of the site for its input x (..., d_in)."""
        is_float = x.is_floating_point()  # an embedding's ids are not: no dropout, and the weight's dtype decides
        dropped = self.source.drop(x) if is_float else x
        factors = self.source.factors(x.dtype if is_float else place.layer.weight.dtype, x.device)
        together = place.variant.together if place.layer.kind.is_product else None
        if together is None or dropped is not x or _needs_each_site(x):
            y = place.original(x)
            out = place.variant.forward(dropped, y, place.layer, factors[place.slot.site.path], place.slot.scaling)
            if out.stride() != y.stride() and not place.layer.kind.is_product:
                # The layout of a convolution's output decides by which kernel the next layer computes, and so its
                # rounding: a sum with a tensor of another layout may have neither's, even where nothing is added.
                out = torch.empty_like(y).copy_(out)
            return out
        if (kept := self._kept) is not None and place in kept[1]:
            made_from, version, by, grad = kept[0]
            if made_from() is x and version == x._version and by is factors and grad == torch.is_grad_enabled():
                return kept[1].pop(place)
        self._learn(place, x)
        group = [self.places[path] for path in self.source.groups[place.slot.site.path]]
        self._kept = None  # outputs that were left by an interrupted forward
        first, *others = together(
            x,
            [member.original for member in group],
            [member.layer for member in group],
            [factors[member.slot.site.path] for member in group],
            [member.slot.scaling for member in group],
        )
        made = (weakref.ref(x), x._version, factors, torch.is_grad_enabled())
        self._kept = (made, dict(zip(group[1:], others, strict=True)))
        return first

    def _learn(self, place: Place, x: Tensor) -> None:
        """Add the site to the group of the site called before it, if both have the same input tensor."""
        groups, path = self.source.groups, place.slot.site.path
        new = path not in groups
        groups.setdefault(path, [path])
        if self._last is not None and new:
            tensor, version, leader = self._last
            if tensor() is x and version == x._version and leader.slot.variant == place.slot.variant:
                groups[leader.slot.site.path].append(path)
                return
        self._last = (weakref.ref(x), x._version, place)


def _needs_each_site(x: Tensor) -> bool:
    """Whether each site must be computed on its own, because of what surrounds this call.

    A compiler traces each site. Tensors of inference mode have no version counter. Autocast changes single operations,
    not a custom Function as a whole. torch.func has its own differentiation. Activation checkpointing, which is visible
    as hooks on saved tensors, computes the forward a second time and must save as many tensors as in the first.
    """
    return (
        torch.compiler.is_compiling()
        or x.is_inference()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )
