"""Functions that read a base and an adapter, change neither, and return new values."""

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
    """A new adapter, with which the base computes as before. Training starts from it.

    Args:
        base: The base.
        plan: The sites, their ranks and their methods.
        seed: The seed of the random initial values: of A, and of a classifier's head, which the base does not have.
        rendering: How messages become text for the adapter.
        classes: The labels of a classifier.

    Raises:
        AdapterError: If a slot of the plan does not fit the base.
    """
    modules = landing_of(base, plan)
    weights = {slot.site.path: KINDS[slot.site.kind].weight(modules[slot.site.path]) for slot in plan.slots}
    for part in plan.whole:
        parameters = {name: modules[part.path].get_parameter(name).detach() for name, _ in part.parameters}
        weights |= {f"{part.path}.{name}": parameter for name, parameter in parameters.items()}
    name = base.address or base.name
    return initial(plan, weights, seed, base=base.identity, base_name=name, rendering=rendering, classes=classes)


def served(base: Base, adapter: Adapter) -> dict[int, Served]:
    """The adapter in the engine's form: what it adds at each site, in fp32 on the base's device.

    Args:
        base: The base.
        adapter: The adapter.

    Returns:
        The change at each adapted site, by the site's position in `base.sites`.

    Raises:
        AdapterError: If it is a classifier, a slot does not fit the base, or a slot adapts something other than a
            linear layer.
    """
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
            f"{', '.join(others)}: an adapter of such a layer cannot be served together with others: use attach(), or "
            "merge it into its base"
        )
    factors = adapter.factors(torch.float32, base.device)
    changes = {}
    for slot in adapter.plan.slots:
        place = Place.of(modules[slot.site.path], slot)
        changes[numbers[slot.site.path]] = place.variant.served(place.layer, factors[slot.site.path], slot.scaling)
    return changes


def merged(base: Base, adapter: Adapter, *, accept_unknown_base: bool = False) -> dict[str, Tensor]:
    """New weights W + ΔW, computed in fp32 and rounded once to the dtype of the base. The base does not change.

    Args:
        base: The base that the adapter belongs to.
        adapter: The adapter.
        accept_unknown_base: Whether to accept an adapter that does not name its base.

    Returns:
        The new tensors, by their keys in the model's state dict.

    Raises:
        AdapterError: If the adapter does not fit the base, or a weight that it adapts is shared with another module,
            such as a head tied to the embedding. A merged weight would change both modules, the attached adapter only
            one.
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
            f"cannot be merged, because a weight is shared with another module: {'; '.join(shared)}: keep the adapter "
            "attached, or open a base with untied weights (tie_word_embeddings: false)"
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
        for part in adapter.plan.whole:
            for name, tensor in parameters_of(part, adapter.tensors, base.dtype, base.device).items():
                new[f"{part.path}.{name}"] = tensor.contiguous()
    return new
