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
    """The module of every slot. Raises AdapterError listing every slot that does not land."""
    modules = dict(base.model.named_modules())
    problems = []
    for slot in plan.slots:
        site, module = slot.site, modules.get(slot.site.path)
        kind = kind_of(module) if module is not None else None
        if module is None:
            problems.append(f"{site.path}: the base has no such module")
        elif kind is None:
            problems.append(f"{site.path}: {type(module).__name__} is no kind of layer that can be adapted")
        elif KINDS[kind].widths(module) != (site.d_in, site.d_out):
            d_in, d_out = KINDS[kind].widths(module)
            problems.append(f"{site.path}: {d_in} → {d_out} in the base, {site.d_in} → {site.d_out} in the adapter")
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise AdapterError(
            f"{len(problems)} slots do not land on '{base.name}'\n  "
            + "\n  ".join(shown)
            + "\nopen the base it was trained on"
        )
    return modules


def require_bare(base: Base) -> None:
    """Raise AttachError where anything is attached to a site of the base."""
    for site in base.every_site:
        require_bare_module(base.model.get_submodule(site.path), site.path)


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
