"""`lorafit route`: questions go in; the adapter that a server's router would choose for each comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.adapters.formats import peft
from lorafit.bases.base import Base, open_base
from lorafit.data.examples import Examples
from lorafit.errors import AdapterError, BaseError
from lorafit.files import whole_file
from lorafit.jobs.listener import Listener, Silent
from lorafit.routing import Features, Router, elsewhere, features_of, fit, learnable


def run_routing(
    texts: Sequence[str],
    adapters: Mapping[str, Path],
    base: str | None = None,
    learn: Mapping[str, Examples] | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Route texts; returns the scores of each.

    Args:
        texts: The questions.
        adapters: Adapter folders, or runs, by name.
        base: The base; None for the one that the adapters name.
        learn: Examples by adapter name; features of their questions are stored in the adapter's folder.
        listener: Receives messages and progress.

    Raises:
        AdapterError: There is nothing to learn from.
    """
    listener, learn = listener or Silent(), learn or {}
    folders = {name: peft.adapter_folder(folder) for name, folder in adapters.items()}
    for folder in folders.values():
        peft.require_adapter_folder(folder)
        peft.require_writes(folder)
    opened = open_base(base or _base_of(folders), None, listener.say, listener.watch)
    for name, given in learn.items():
        found = Features.of(opened, given.train, given.valid, watch=listener.watch)
        if found is None:
            raise AdapterError(
                f"--learn {name}: these examples ask nothing that a router could learn from: give "
                "questions with answers"
            )
        with whole_file(folders[name] / peft.ROUTING) as building:
            building.write_bytes(found.to_bytes())
        listener.say(f"{folders[name]} now stores the features of {len(found.train)} questions")
    router, left_out = router_of(opened, folders, listener)
    routes = [router.route(row) for row in features_of(opened, texts)]
    return {
        "threshold": router.threshold,
        "right": router.right,
        "kept_out": router.kept_out,
        "left_out": left_out,
        "texts": [
            {
                "text": text,
                "adapter": route.adapter,
                "probability": route.probability,
                "scores": {name or "base": score for name, score in route.scores.items()},
            }
            for text, route in zip(texts, routes, strict=True)
        ],
    }


def router_of(base: Base, folders: Mapping[str, Path], listener: Listener) -> tuple[Router, dict[str, str]]:
    """A router between the adapter folders that store features of this base, and why each other folder is left out."""
    kept = {name: content for name, folder in folders.items() if (content := peft.routing_of(folder))}
    others = features_of(base, elsewhere() if kept else [], listener.watch)
    found, left_out = learnable(kept, base, others.shape[1])
    without = {name: "it keeps no questions: give them with --learn NAME=DATA" for name in folders if name not in kept}
    return fit(found, others), without | left_out


def _base_of(folders: Mapping[str, Path]) -> str:
    """The base that the adapter folders name. Raises BaseError if they do not agree on one."""
    named = {name: peft.glance(folder).base_name for name, folder in folders.items() if (folder / peft.OURS).exists()}
    bases = sorted({str(base) for base in named.values() if base})
    if len(bases) != 1:
        raise BaseError(f"the adapters name {', '.join(bases) or 'no base'}: say which with --base")
    return bases[0]
