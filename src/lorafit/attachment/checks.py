"""Checks that an adapter fits a base, before it is attached."""

from __future__ import annotations

from torch import nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan
from lorafit.attachment import landing
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, AttachError, TargetError
from lorafit.layers import KINDS, kind_of


def require_base(base: Base, identity: str | None, name: str | None, accept_unknown: bool = False) -> None:
    """Check that an adapter belongs to a base.

    Args:
        base: The base.
        identity: The identity that the adapter names; None if it names none.
        name: The name of the adapter's base, for the message.
        accept_unknown: Whether to accept an adapter that names no base.

    Raises:
        AdapterError: If the adapter belongs to another base, or names none and `accept_unknown` is False.
    """
    if identity is None:
        if not accept_unknown:
            raise AdapterError(
                "this adapter does not say which base it belongs to: if you know that it is "
                f"'{base.name}', accept it with accept_unknown_base=True (--accept-unknown-base)"
            )
    elif identity != base.identity:
        raise AdapterError(
            f"this adapter belongs to base '{name}' ({identity[:12]}), not to '{base.name}' "
            f"({base.identity[:12]}): open the base it was trained on"
        )


def require_fits(base: Base, adapter: Adapter, *, accept_unknown_base: bool = False) -> None:
    """Raise AdapterError if the adapter belongs to another base, or a slot does not fit a module of the base."""
    require_base(base, adapter.base, adapter.base_name, accept_unknown_base)
    landing_of(base, landed(base, adapter).plan)


def landed(base: Base, adapter: Adapter) -> Adapter:
    """The adapter with the base's paths: see `landing.landed`."""
    return landing.landed(adapter, base.model, base.every_site, base.name)


def landing_of(base: Base, plan: Plan) -> dict[str, nn.Module]:
    """The modules of the base by path, and the module of every slot by the path of its site.

    Raises:
        AdapterError: If a slot does not fit a module of the base (the message lists all such slots), or a classifier is
            used with a base that was not opened as one, or the other way round.
    """
    if plan.is_classifier and not base.head:
        raise AdapterError(
            "this adapter is a classifier, which writes no text: lorafit classify labels new texts with it, and in "
            f"Python it goes with open_base('{base.name}', labels=...)"
        )
    if base.head and not plan.is_classifier:
        raise AdapterError(
            f"this adapter writes text, and '{base.name}' was opened as a classifier: open it without labels"
        )
    modules = dict(base.model.named_modules())
    problems, of_head = [], []
    for slot in plan.slots:
        site, module = slot.site, modules.get(slot.site.module)
        kind = kind_of(module, site.parameter) if module is not None else None
        if module is None:
            problems.append(f"{site.path}: the base has no such module")
        elif kind is None:
            problems.append(f"{site.path}: a {type(module).__name__} cannot be adapted")
        elif kind != site.kind and not (slot.is_product and KINDS[kind].is_product):
            problems.append(f"{site.path}: {kind} in the base, {site.kind} in the adapter")
        elif (form := KINDS[kind].form(module)) != site.form:
            what = "experts" if kind.startswith("experts.") else "groups and kernel"
            problems.append(f"{site.path}: {what} {form} in the base, {site.form} in the adapter")
        elif KINDS[kind].widths(module) != (site.d_in, site.d_out):
            d_in, d_out = KINDS[kind].widths(module)
            problems.append(f"{site.path}: {d_in} → {d_out} in the base, {site.d_in} → {site.d_out} in the adapter")
    for one in plan.whole:
        named = modules[one.path].named_parameters() if one.path in modules else ()
        shapes = {name: tuple(parameter.shape) for name, parameter in named}
        of_head += [
            f"{one.path}.{name}: {list(shape)} in the adapter, {list(shapes.get(name, ())) or 'none'} in the base"
            for name, shape in one.parameters
            if shapes.get(name) != shape
        ]
    if problems or of_head:
        fix = "open the base it was trained on" + " with as many labels" * (not problems)
        problems += of_head
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        what = f"{len(problems)} parts of the adapter do not fit '{base.name}'"
        raise AdapterError(f"{what}\n  " + "\n  ".join(shown) + f"\n{fix}")
    return {**modules, **{slot.site.path: modules[slot.site.module] for slot in plan.slots}}


def require_bare(base: Base) -> None:
    """Raise AttachError if anything is attached to a site of the base."""
    for site in base.every_site:
        require_bare_module(base.model.get_submodule(site.module), site.module)


def require_bare_module(module: nn.Module, path: str) -> None:
    """Raise AttachError if the module's forward is replaced. path: its path, for the message."""
    if "forward" in vars(module):
        raise AttachError(
            f"{path}: its forward is already replaced, by another attach() or another library: leave that `with` block "
            "first, because one adapter can be attached at a time"
        )


def require_fired(plan: Plan, seen: frozenset[str]) -> None:
    """Raise TargetError if a site of the plan is not in `seen`, the result of `fired`. The message names all."""
    silent = [slot.site.path for slot in plan.slots if slot.site.path not in seen]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise TargetError(
            f"{len(silent)} named sites take no part in a forward over your rows, or receive no gradient: {shown}: an "
            "adapter there would learn nothing; leave them out of --targets"
        )
