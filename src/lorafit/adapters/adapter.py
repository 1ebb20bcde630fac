"""Adapters as immutable values: made from a plan and tensors, compared by their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters.plan import LowRank, Plan, Whole
from lorafit.adapters.rendering import Classes, Rendering
from lorafit.digests import canonical
from lorafit.errors import AdapterError
from lorafit.variants import VARIANTS

HEAD_SIZE = 0.02  # standard deviation of the initial weights of a head (BERT, arXiv 1810.04805)
FORMAT = 2  # of the content of a digest; raise it when that changes, and keep the older ones readable


@dataclass(frozen=True)
class Claims:
    """What another program's adapter says about its base, for a comparison when it is attached.

    Args:
        selects: the settings of its config that choose modules, such as `target_modules`.
        weights: digests of base weights that came with it, by path and dtype.
    """

    selects: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter. Two adapters are equal when their digests are.

    Args:
        plan: its sites and their ranks.
        tensors: fp32 tensors of the plan's shapes by `<site path>.<factor>`. They are copied, so that no later training
            step changes them.
        base: the identity of its base; None where another program did not name it.
        base_name: the name that opens its base.
        rendering: how messages become text for it.
        claims: what another program's adapter says about its base.
        classes: the labels of a classifier; None for an adapter that writes text.

    Raises:
        AdapterError: for tensors that do not match the plan, or that are not finite.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    base: str | None = None
    base_name: str | None = None
    rendering: Rendering | None = None
    claims: Claims | None = None
    classes: Classes | None = None

    def __post_init__(self) -> None:
        expected = {f"{path}.{name}": shape for path, name, shape, _ in self.plan.tensors()}
        problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in self.tensors]
        problems += [f"not in the plan: {key}" for key in self.tensors if key not in expected]
        for key, shape in expected.items():
            tensor = self.tensors.get(key)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                problems.append(f"wrong shape: {key} is {list(tensor.shape)}, the plan says {list(shape)}")
            elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                problems.append(f"not finite numbers: {key}")
        if problems:
            shown = problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else [])
            raise AdapterError(
                f"tensors and plan do not match ({len(problems)})\n  "
                + "\n  ".join(shown)
                + "\nrestore the adapter, or make it from the plan with fresh()"
            )
        copies = {key: self.tensors[key].detach().to("cpu", torch.float32, copy=True).contiguous() for key in expected}
        object.__setattr__(self, "tensors", MappingProxyType(copies))

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """The tensors that its methods compute with, by site path and name: matrices in `dtype`, vectors in fp32. Also
        the parameters of modules that are trained whole."""
        return {slot.site.path: computed(slot, self.tensors, dtype, device) for slot in self.plan.slots} | {
            module.path: parameters_of(module, self.tensors, dtype, device) for module in self.plan.whole
        }

    def digest(self) -> str:
        """SHA-256 over plan and tensors, whatever file or name they have."""
        content: dict[str, Any] = {"format": FORMAT, "slots": self.plan.slots}
        if self.plan.whole:
            content |= {"whole": self.plan.whole, "classes": self.classes}
        return self._digest_with(canonical(content))

    def digest_of_format_1(self) -> str:
        """The digest in folders of format 1, over the plan as Python printed it then."""
        slots = [
            f"LowRank(site=Site(path={s.site.path!r}, kind={s.site.kind!r}, d_in={s.site.d_in!r}, "
            f"d_out={s.site.d_out!r}), rank={s.rank!r}, alpha={s.alpha!r}, variant={s.variant!r})"
            for s in self.plan.slots
        ]
        return self._digest_with(f"Plan(slots=({', '.join(slots)}{',' if len(slots) == 1 else ''}))")

    def _digest_with(self, plan: str) -> str:
        total = hashlib.sha256(plan.encode())
        for key in sorted(self.tensors):
            total.update(key.encode())
            total.update(self.tensors[key].numpy().tobytes())
        return total.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


def computed(
    slot: LowRank, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The tensors that a slot's method computes with, as `cast` returns them, from fp32 factors by
    `<site path>.<factor>`."""
    factors = {name: tensors[f"{slot.site.path}.{name}"] for name in slot.factors()}
    derived = VARIANTS[slot.variant].computed(factors)
    return {name: cast(tensor, dtype, device) for name, tensor in derived.items()}


def parameters_of(
    whole: Whole, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The parameters of a module that is trained whole, in the dtype of its base, from fp32 parameters by
    `<path>.<parameter>`."""
    return {name: tensors[f"{whole.path}.{name}"].to(device, dtype) for name, _ in whole.parameters}


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor for the forward pass on `device`: matrices in `dtype`, vectors in fp32."""
    return tensor.to(device, dtype if tensor.dim() > 1 else torch.float32)


def initial(
    plan: Plan,
    weights: Mapping[str, Tensor],
    seed: int,
    *,
    base: str | None = None,
    base_name: str | None = None,
    rendering: Rendering | None = None,
    classes: Classes | None = None,
) -> Adapter:
    """A new adapter that changes nothing yet. It has more than six parameters, as many values as an adapter.

    Args:
        plan: its sites and their ranks.
        weights: the base's weights by site path, (d_out, d_in); for modules that are trained whole, their initial
            parameters, of which only vectors are used: matrices are drawn.
        seed: of the one generator that draws for all sites, in the order of the plan.
        base, base_name, rendering, classes: as in `Adapter`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in plan.slots:
        weight = weights[slot.site.path].detach().cpu()
        drawn = VARIANTS[slot.variant].init(slot.site, slot.rank, weight, slot.scaling, generator)
        tensors.update({f"{slot.site.path}.{name}": tensor for name, tensor in drawn.items()})
    for module in plan.whole:
        for name, shape in module.parameters:
            key = f"{module.path}.{name}"
            is_matrix = len(shape) > 1
            tensors[key] = torch.randn(shape, generator=generator) * HEAD_SIZE if is_matrix else weights[key]
    return Adapter(plan, tensors, base, base_name, rendering, classes=classes)
