"""`lorafit show`: the path of a run, an adapter, a plan or a base goes in; facts about it come out."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.adapters.folder import CONFIG
from lorafit.bases import hub
from lorafit.bases.builtin import BUILTIN
from lorafit.errors import FormatError
from lorafit.files import did_you_mean, put_back, read_json
from lorafit.heads import head_of_adapter
from lorafit.heads.head import listed
from lorafit.runs.folder import PLAN, RUN, openings, read_run, read_summary, standing_folder

if TYPE_CHECKING:
    from lorafit.adapters.plan import Plan


def shown(path: str | Path) -> dict[str, Any]:
    """Facts by name about a run, an adapter, a plan or a base; `kind` says which. Raises FormatError for others."""
    path = Path(path)
    put_back(path)
    if (path / RUN).exists():
        return _run(path)
    if (path / CONFIG).exists():
        return _adapter(path)
    if path.suffix == ".json":
        from lorafit.adapters.plan import Plan

        return {"kind": "plan", **_plan(Plan.from_json(read_json(path), str(path)))}
    require_shown(path)
    from lorafit.bases import locate
    from lorafit.bases.base import open_base

    base = open_base(path, labels=2 if locate.encodes(str(path)) else None)
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    names = dict(Counter(site.name for site in base.sites))
    return {
        "kind": "base",
        "name": base.name,
        "folder": str(base.folder),
        "parameters": parameters,
        "identity": base.identity,
        "sites": len(base.sites),
        "site names": names,
    }


def require_shown(path: Path) -> None:
    """Raise FormatError for a path that cannot be shown. It opens no model and imports no large library."""
    put_back(path)
    if any((path / name).exists() for name in (RUN, CONFIG, "config.json")):
        return
    if str(path) in BUILTIN or (path.suffix in (".json", ".gguf") and path.exists()):
        return
    named = hub.parse(str(path)) if not path.exists() else None
    if named is not None and hub.at_hand(named) is not None:  # showing never downloads
        return
    if not path.exists():
        raise FormatError(f"{path}: there is no such path: {did_you_mean(path, 'check the path')}")
    raise FormatError(
        f"{path}: neither a run, nor an adapter, nor a plan.json, nor a base: name one of these; "
        "lorafit data shows a file of examples"
    )


def _run(path: Path) -> dict[str, Any]:
    asked = read_run(path)
    facts = {"kind": "run", "base": asked["base"], "data": asked["data"]}
    plan = standing_folder(path) / PLAN
    if plan.exists():
        from lorafit.adapters.plan import Plan

        facts |= _plan(Plan.from_json(read_json(plan), str(plan)))
    summary = read_summary(path)
    if summary:
        facts |= {"task": summary.task}
    if summary and (scores := summary.classes or summary.measures) and scores.per_label:
        facts |= {"labels": listed([score.label for score in scores.per_label])}
    if summary is None:
        return {**facts, "state": f"not finished: lorafit train --resume --out {shlex.quote(str(path))} continues it"}
    return {
        **facts,
        "state": "finished",
        "adapter": str(path / "adapter"),
        "best step": summary.best_step,
        "base unchanged": summary.base_unchanged,
        "test openings": openings(path),
    }


def _adapter(path: Path) -> dict[str, Any]:
    from lorafit.adapters.formats import peft

    adapter = peft.read(path)
    rendering, classes = adapter.rendering, adapter.classes
    rendered = {"time told": rendering.now, "template settings": dict(rendering.settings)} if rendering else {}
    return {
        "kind": "adapter",
        "base": adapter.base_name,
        "base identity": adapter.base or "unknown",
        "digest": adapter.digest(),
        **(
            {"labels": listed(classes.labels)}
            if classes
            else {"system prompt": rendering.system if rendering else None}
        ),
        **{name: value for name, value in rendered.items() if value},
        **_plan(adapter.plan),
        "task": head_of_adapter(adapter).name,
    }


def _plan(plan: Plan) -> dict[str, Any]:
    ranks = Counter(slot.rank for slot in plan.slots)
    return {
        "task": "classification" if plan.is_classifier else "completion",
        "sites": len(plan.slots),
        "site names": ", ".join(dict.fromkeys(slot.site.name for slot in plan.slots)),
        "variant": plan.slots[0].variant,
        "ranks": dict(sorted(ranks.items())),
        "parameters": plan.parameters,
        "bytes": plan.bytes,
    }
