"""Where an adapter from elsewhere lands in a base: its paths, and what it says of the base, checked before it acts.

An adapter of ours names the content of its base, and its paths are the base's. One from elsewhere may have been saved
from inside another model (`model.language_model.layers...` for `model.layers...`): where exactly one way leads from
its paths to the base's, it is read so; where none or several do, it is refused.
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
    """The adapter under the paths of this base; one that names its base as it is.

    Args:
        adapter: The adapter, of ours or from elsewhere.
        model: The base's model, which is only read.
        sites: All sites of the model.
        name: The base's name, for messages.

    Raises:
        AdapterError: Several ways lead to the base's paths, modules that the adapter's config names have no tensors
            in it, or a weight that came with it is not the base's.
    """
    if adapter.base is not None:
        return adapter
    known = {site.path: site for site in sites}
    moves = _moves(adapter.plan, known, name)
    if adapter.claims is not None:
        _require_all(adapter, moves, known, name)
        _require_weights(adapter, moves, model, name)
    return _moved(adapter, moves) if moves.paths else adapter


class _Moves:
    """New paths by old ones. old, new: the components that stand before what both have."""

    def __init__(self, paths: Mapping[str, str], old: Sequence[str] = (), new: Sequence[str] = ()):
        self.paths, self.old, self.new = paths, list(old), list(new)

    def back(self, path: str) -> str | None:
        """The adapter's path for a path of the base; None where its own model had no such place."""
        if not self.paths:
            return path
        parts = path.split(".")
        return ".".join([*self.old, *parts[len(self.new) :]]) if parts[: len(self.new)] == self.new else None


def _moves(plan: Plan, sites: Mapping[str, Site], name: str) -> _Moves:
    """The one way to the base's paths; none where they are there already, or where no way leads."""
    lost = [slot.site for slot in plan.slots if slot.site.path not in sites]
    if not lost:
        return _Moves({})
    kept = {slot.site.path for slot in plan.slots} & set(sites)
    ways: list[_Moves] = []
    for site in sites.values():
        found = _way(lost, site, sites)
        if found and not kept & set(found.paths.values()) and found.paths not in [way.paths for way in ways]:
            ways.append(found)
    if len(ways) > 1:
        shown = ", ".join(way.paths[lost[0].path] for way in ways[:3])
        raise AdapterError(
            f"{lost[0].path}: '{name}' has no such module, and {len(ways)} that could be meant ({shown}): rename the "
            "adapter's tensors to the one that is"
        )
    return ways[0] if ways else _Moves({})


def _way(lost: Sequence[Site], site: Site, sites: Mapping[str, Site]) -> _Moves | None:
    """How all lost paths move if the first one becomes `site`'s: by components that a wrapper adds before the rest."""
    here, there = lost[0].path.split("."), site.path.split(".")
    shared = 0
    while shared < min(len(here), len(there)) and here[-1 - shared] == there[-1 - shared]:
        shared += 1
    if not shared:
        return None
    old, new = here[: len(here) - shared], there[: len(there) - shared]
    numbers = [[part for part in parts if part.isdecimal()] for parts in (old, new)]
    if numbers[0] != numbers[1] or not (_within(old, new) or _within(new, old)):
        return None  # another layer, or a module of another name
    paths = {}
    for one in lost:
        parts = one.path.split(".")
        path = ".".join([*new, *parts[len(old) :]])
        target = sites.get(path)
        if parts[: len(old)] != old or target is None or (target.d_in, target.d_out) != (one.d_in, one.d_out):
            return None
        paths[one.path] = path
    return _Moves(paths, old, new)


def _within(few: Sequence[str], many: Sequence[str]) -> bool:
    """Whether `few` is `many` with some left out."""
    rest = iter(many)
    return all(part in rest for part in few)


def _require_all(adapter: Adapter, moves: _Moves, sites: Mapping[str, Site], name: str) -> None:
    """Raise AdapterError where the config names modules of the base that the adapter has no tensors for."""
    assert adapter.claims is not None
    there = {slot.site.path for slot in adapter.plan.slots}
    missing = []
    for path, site in sites.items():
        theirs, module = moves.back(path), moves.back(site.module)
        if theirs is None or module is None or {path, theirs} & there:
            continue
        claims = adapter.claims.selects
        if selects_parameter(claims, theirs) if site.count > 1 else selects(claims, module):
            missing.append(path)
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise AdapterError(
            f"its config names {len(missing)} modules of '{name}' that have no tensors in it ({shown}): restore the "
            "adapter, it is cut, or open the base it was trained on"
        )


def _require_weights(adapter: Adapter, moves: _Moves, model: nn.Module, name: str) -> None:
    """Raise AdapterError where a base weight that came with the adapter is not the base's: it would be left out."""
    assert adapter.claims is not None
    modules = dict(model.named_modules())
    differ = []
    for key, digests in adapter.claims.weights.items():
        path, _, part = key.rpartition(".")
        module = modules.get(moves.paths.get(path, path))
        weight = module._parameters.get(part) if module is not None else None
        if weight is None or not is_weight(digests, weight):
            differ.append(key)
    if differ:
        raise AdapterError(
            f"{', '.join(differ)}: came with the adapter and is not the weight of '{name}': open the base it was "
            "trained on, or merge the adapter into its own first (PEFT: merge_and_unload)"
        )


def _moved(adapter: Adapter, moves: _Moves) -> Adapter:
    """The adapter with its slots and tensors under their new paths."""
    slots = tuple(
        replace(slot, site=replace(slot.site, path=moves.paths.get(slot.site.path, slot.site.path)))
        for slot in adapter.plan.slots
    )
    tensors = {}
    for key, tensor in adapter.tensors.items():
        path, _, factor = key.rpartition(".")
        tensors[f"{moves.paths.get(path, path)}.{factor}"] = tensor
    return replace(adapter, plan=replace(adapter.plan, slots=slots), tensors=tensors)
