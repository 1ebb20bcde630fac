"""Adapters: immutable values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters.plan import LowRank, Plan
from lorafit.adapters.rendering import Rendering
from lorafit.digests import canonical
from lorafit.errors import AdapterError
from lorafit.variants import VARIANTS

FORMAT = 2  # of what a digest is taken over; raise it when that changes, and keep the older ones readable


@dataclass(frozen=True)
class Claims:
    """What an adapter from elsewhere says of its base, to be compared with the base that it is attached to.

    selects: the settings of its config that choose modules, such as `target_modules`.
    weights: digests of base weights that came with it, by path and dtype.
    """

    selects: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A plan, its tensors, the identity of the base, and the rendering it was trained with.

    `tensors` maps `<site path>.<factor>` to fp32 tensors of the plan's shapes. They are copied on the way
    in, so that no later training step reaches them. Two adapters are equal when their digests are.
    `base` is None for an adapter that came from elsewhere without saying whose it is; it may have `claims`.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    base: str | None = None
    base_name: str | None = None
    rendering: Rendering | None = None
    claims: Claims | None = None

    def __post_init__(self) -> None:
        expected = {f"{s.site.path}.{name}": shape for s in self.plan.slots for name, shape in s.shapes().items()}
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
        """What its methods compute with, by site path and name; matrices in `dtype`, vectors in fp32."""
        return {slot.site.path: computed(slot, self.tensors, dtype, device) for slot in self.plan.slots}

    def digest(self) -> str:
        """SHA-256 over plan and tensors: the content, whatever file or name it lives under."""
        return self._digest_with(canonical({"format": FORMAT, "slots": self.plan.slots}))

    def digest_of_format_1(self) -> str:
        """The digest that folders of format 1 hold, over the plan as Python printed it then."""
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
    """What the slot's method computes with, of fp32 factors by `<site path>.<factor>`, as `cast` gives it."""
    own = {name: tensors[f"{slot.site.path}.{name}"] for name in slot.factors()}
    made = VARIANTS[slot.variant].computed(own)
    return {name: cast(tensor, dtype, device) for name, tensor in made.items()}


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor as forward wants it: matrices in `dtype`, vectors in fp32, on `device`."""
    return tensor.to(device, dtype if tensor.dim() > 1 else torch.float32)


def initial(
    plan: Plan,
    weights: Mapping[str, Tensor],
    seed: int,
    *,
    base: str | None = None,
    base_name: str | None = None,
    rendering: Rendering | None = None,
) -> Adapter:
    """Fresh factors that change nothing yet. `weights` maps site paths to (d_out, d_in).

    One generator, seeded before anything is drawn, serves all sites in the order of the plan.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in plan.slots:
        weight = weights[slot.site.path].detach().cpu()
        drawn = VARIANTS[slot.variant].init(slot.site, slot.rank, weight, slot.scaling, generator)
        tensors.update({f"{slot.site.path}.{name}": tensor for name, tensor in drawn.items()})
    return Adapter(plan, tensors, base, base_name, rendering)
