"""New values from a base and an adapter; the base is only read."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter, initial, parameters_of
from lorafit.adapters.plan import Plan
from lorafit.adapters.rendering import Classes, Rendering
from lorafit.attachment.checks import landed, landing_of, require_base
from lorafit.attachment.together import Place
from lorafit.bases.base import Base
from lorafit.errors import AdapterError
from lorafit.layers import KINDS
from lorafit.variants import VARIANTS
from lorafit.variants.variant import Served


def fresh(
    base: Base, plan: Plan, seed: int, rendering: Rendering | None = None, classes: Classes | None = None
) -> Adapter:
    """An adapter for `base` that changes nothing yet: what training starts from. Only the head of a classifier, which
    its base does not have, is drawn."""
    modules = landing_of(base, plan)
    weights = {slot.site.path: KINDS[slot.site.kind].weight(modules[slot.site.path]) for slot in plan.slots}
    for one in plan.whole:
        weights |= {f"{one.path}.{name}": modules[one.path].get_parameter(name).detach() for name, _ in one.parameters}
    name = base.address or base.name
    return initial(plan, weights, seed, base=base.identity, base_name=name, rendering=rendering, classes=classes)


def served(base: Base, adapter: Adapter) -> dict[int, Served]:
    """What the adapter adds at each site, in fp32 on the base's device, by the site's number in `base.sites`. Raises
    AdapterError where it acts beside a layer that computes no product."""
    if adapter.classes is not None:
        raise AdapterError(
            f"it is for the task '{adapter.classes.task}' and writes no text: lorafit eval scores it, and attach() "
            "runs it"
        )
    adapter = landed(base, adapter)
    modules = landing_of(base, adapter.plan)
    numbers = {site.path: number for number, site in enumerate(base.sites)}
    if others := [slot.site.path for slot in adapter.plan.slots if not slot.is_product]:
        raise AdapterError(
            f"{', '.join(others)}: an adapter of such a layer is not served to many at once: use attach(), "
            "or merge it into its base"
        )
    factors = adapter.factors(torch.float32, base.device)
    made = {}
    for slot in adapter.plan.slots:
        place = Place.of(modules[slot.site.path], slot)
        one = place.variant.served(place.layer, factors[slot.site.path], slot.scaling)
        made[numbers[slot.site.path]] = one
    return made


def merged(base: Base, adapter: Adapter, *, accept_unknown_base: bool = False) -> dict[str, Tensor]:
    """New weight tensors, W + ΔW, computed in fp32 and rounded once to the dtype of the base; by state-dict key.

    The base is only read. Raises AdapterError where a slot's weight is shared with another module (a head tied to the
    embedding): attached, the adapter acts on that slot alone; merged, it would change both.
    """
    require_base(base, adapter.base, adapter.base_name, accept_unknown_base)
    adapter = landed(base, adapter)
    modules = landing_of(base, adapter.plan)
    shared = [
        f"{slot.site.path} (with {', '.join(tied)})"
        for slot in adapter.plan.slots
        if (tied := base.tied(slot.site.module, slot.site.parameter))
    ]
    if shared:
        raise AdapterError(
            f"cannot be merged, for its weight is shared with another module: {'; '.join(shared)}: keep the adapter "
            "attached, or open a base whose weights are apart (tie_word_embeddings: false)"
        )
    new = {}
    with torch.no_grad():
        for slot in adapter.plan.slots:
            layer = Place.of(modules[slot.site.path], slot).layer
            weight = layer.weight
            factors = {name: adapter.tensors[f"{slot.site.path}.{name}"].to(weight.device) for name in slot.shapes()}
            delta = VARIANTS[slot.variant].delta(layer, factors, slot.scaling)
            total = (weight.float() + delta).to(weight.dtype)
            new[slot.site.key] = layer.kind.stored(layer.module, total).contiguous()
        for one in adapter.plan.whole:
            for name, tensor in parameters_of(one, adapter.tensors, base.dtype, base.device).items():
                new[f"{one.path}.{name}"] = tensor.contiguous()
    return new
