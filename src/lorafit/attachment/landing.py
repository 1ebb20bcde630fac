"""Matches the paths of another program's adapter to those of a base, and checks what the adapter says about its base.

An adapter of lorafit names its base by content, and its paths are the base's. Another program may have saved an adapter
from inside a larger model (`model.language_model.layers...` in place of `model.layers...`). If exactly one renaming
fits all of its paths to the base, the adapter is renamed; if several do, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats.foreign import is_weight, selects, selects_parameter
from lorafit.adapters.plan import Plan
from lorafit.errors import AdapterError
from lorafit.layers.site import Site


def landed(adapter: Adapter, model: nn.Module, sites: Sequence[Site], name: str) -> Adapter:
    """The adapter with the paths of this base. An adapter that names its base is returned as it is.

    Args:
        adapter: The adapter, trained by lorafit or by another program.
        model: The base's model, which is only read.
        sites: All sites of the model.
        name: The base's name, for messages.

    Raises:
        AdapterError: If several renamings fit the base, the adapter lacks tensors for modules that its config names, or
            a base weight that came with it differs from the base's.
    """
    if adapter.base is not None:
        return adapter
    known = {site.path: site for site in sites}
    renaming = _renaming(adapter.plan, known, name)
    if adapter.claims is not None:
        _require_all(adapter, renaming, known, name)
        _require_weights(adapter, renaming, model, name)
    return _renamed(adapter, renaming) if renaming.paths else adapter


class _Renaming:
    """The base's paths by the adapter's.

    Args:
        paths: The base's path for each path of the adapter that changes.
        old: The components at the beginning of the adapter's paths that are replaced.
        new: The components that replace them.
    """

    def __init__(self, paths: Mapping[str, str], old: Sequence[str] = (), new: Sequence[str] = ()):
        self.paths, self.old, self.new = paths, list(old), list(new)

    def reversed(self, path: str) -> str | None:
        """The adapter's path for a path of the base; None if the path lies outside the model it was trained on."""
        if not self.paths:
            return path
        parts = path.split(".")
        return ".".join([*self.old, *parts[len(self.new) :]]) if parts[: len(self.new)] == self.new else None


def _renaming(plan: Plan, sites: Mapping[str, Site], name: str) -> _Renaming:
    """The renaming that fits the plan to the base. It is empty if none is needed, or if none fits."""
    lost = [slot.site for slot in plan.slots if slot.site.path not in sites]
    if not lost:
        return _Renaming({})
    kept = {slot.site.path for slot in plan.slots} & set(sites)
    found: list[_Renaming] = []
    for site in sites.values():
        one = _renaming_to(site, lost, sites)
        if one and not kept & set(one.paths.values()) and one.paths not in [other.paths for other in found]:
            found.append(one)
    if len(found) > 1:
        shown = ", ".join(renaming.paths[lost[0].path] for renaming in found[:3])
        raise AdapterError(
            f"{lost[0].path}: '{name}' has no such module, but {len(found)} that could be meant ({shown}): rename the "
            "adapter's tensors to the right one"
        )
    return found[0] if found else _Renaming({})


def _renaming_to(site: Site, lost: Sequence[Site], sites: Mapping[str, Site]) -> _Renaming | None:
    """The renaming of all lost paths that gives the first of them the path of `site`. It may only add or remove
    components at the beginning, as a wrapper around a model does. None if it does not fit."""
    here, there = lost[0].path.split("."), site.path.split(".")
    shared = 0
    while shared < min(len(here), len(there)) and here[-1 - shared] == there[-1 - shared]:
        shared += 1
    if not shared:
        return None
    old, new = here[: len(here) - shared], there[: len(there) - shared]
    numbers = [[part for part in parts if part.isdecimal()] for parts in (old, new)]
    if numbers[0] != numbers[1] or not (_within(old, new) or _within(new, old)):
        return None  # a layer with another number, or a module with another name
    paths = {}
    for lost_site in lost:
        parts = lost_site.path.split(".")
        path = ".".join([*new, *parts[len(old) :]])
        target = sites.get(path)
        if parts[: len(old)] != old or target is None:
            return None
        if (target.d_in, target.d_out) != (lost_site.d_in, lost_site.d_out):
            return None
        paths[lost_site.path] = path
    return _Renaming(paths, old, new)


def _within(few: Sequence[str], many: Sequence[str]) -> bool:
    """Whether `few` is a subsequence of `many`."""
    rest = iter(many)
    return all(part in rest for part in few)


def _require_all(adapter: Adapter, renaming: _Renaming, sites: Mapping[str, Site], name: str) -> None:
    """Raise AdapterError if the config names modules of the base for which the adapter has no tensors."""
    assert adapter.claims is not None
    present = {slot.site.path for slot in adapter.plan.slots}
    missing = []
    for path, site in sites.items():
        theirs, module = renaming.reversed(path), renaming.reversed(site.module)
        if theirs is None or module is None or {path, theirs} & present:
            continue
        claims = adapter.claims.selects
        if selects_parameter(claims, theirs) if site.count > 1 else selects(claims, module):
            missing.append(path)
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise AdapterError(
            f"its config names {len(missing)} modules of '{name}' for which it has no tensors ({shown}): restore the "
            "adapter, which is incomplete, or open the base it was trained on"
        )


def _require_weights(adapter: Adapter, renaming: _Renaming, model: nn.Module, name: str) -> None:
    """Raise AdapterError if a base weight that came with the adapter differs from the base's, because attaching would
    ignore it."""
    assert adapter.claims is not None
    modules = dict(model.named_modules())
    differ = []
    for key, digests in adapter.claims.weights.items():
        path, _, part = key.rpartition(".")
        module = modules.get(renaming.paths.get(path, path))
        weight = module._parameters.get(part) if module is not None else None
        if weight is None or not is_weight(digests, weight):
            differ.append(key)
    if differ:
        raise AdapterError(
            f"{', '.join(differ)}: came with the adapter and differs from the weight of '{name}': open the base it was "
            "trained on, or merge the adapter into that base first (PEFT: merge_and_unload)"
        )


def _renamed(adapter: Adapter, renaming: _Renaming) -> Adapter:
    """The adapter with its slots and tensors under their new paths."""
    slots = tuple(
        replace(slot, site=replace(slot.site, path=renaming.paths.get(slot.site.path, slot.site.path)))
        for slot in adapter.plan.slots
    )
    tensors = {}
    for key, tensor in adapter.tensors.items():
        path, _, factor = key.rpartition(".")
        tensors[f"{renaming.paths.get(path, path)}.{factor}"] = tensor
    return replace(adapter, plan=replace(adapter.plan, slots=slots), tensors=tensors)
