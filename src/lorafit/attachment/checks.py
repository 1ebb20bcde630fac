"""What is checked before an adapter acts on a base."""

from __future__ import annotations

from torch import nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan
from lorafit.attachment import landing
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, AttachError, TargetError
from lorafit.layers import KINDS, kind_of


def require_base(base: Base, identity: str | None, name: str | None, accept_unknown: bool = False) -> None:
    """Raise AdapterError unless this identity, which an adapter names as its base's, is the base's."""
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
    """Raise AdapterError where an adapter is another base's, or has a slot that lands on no module of its widths."""
    require_base(base, adapter.base, adapter.base_name, accept_unknown_base)
    landing_of(base, landed(base, adapter).plan)


def landed(base: Base, adapter: Adapter) -> Adapter:
    """The adapter under the base's paths, checked: `landing.landed`."""
    return landing.landed(adapter, base.model, base.every_site, base.name)


def landing_of(base: Base, plan: Plan) -> dict[str, nn.Module]:
    """The module of every slot, by the path of its site. Raises AdapterError listing every slot that does not land."""
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
            problems.append(f"{site.path}: {type(module).__name__} is no kind of layer that can be adapted")
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
        raise AdapterError(f"{len(problems)} slots do not land on '{base.name}'\n  " + "\n  ".join(shown) + f"\n{fix}")
    return {**modules, **{slot.site.path: modules[slot.site.module] for slot in plan.slots}}


def require_bare(base: Base) -> None:
    """Raise AttachError where anything is attached to a site of the base."""
    for site in base.every_site:
        require_bare_module(base.model.get_submodule(site.module), site.module)


def require_bare_module(module: nn.Module, path: str) -> None:
    if "forward" in vars(module):
        raise AttachError(
            f"{path}: its forward is already replaced, by another attach or another library: "
            "leave that block first; one adapter is attached at a time"
        )


def require_fired(plan: Plan, seen: frozenset[str]) -> None:
    """Raise TargetError naming every site of the plan that is not among those `fired` has found."""
    silent = [slot.site.path for slot in plan.slots if slot.site.path not in seen]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise TargetError(
            f"{len(silent)} named sites take no part in a forward over your rows, or no gradient comes back to them: "
            f"{shown}: an adapter there would learn nothing; leave them out of --targets"
        )
