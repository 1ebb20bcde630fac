"""Sites: the places in a model where an adapter can act."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lorafit.errors import TargetError


@dataclass(frozen=True, order=True)
class Site:
    """One module with a weight of shape (d_out, d_in), named by its path in the model.

    `kind` names the file in `layers/` that knows how to read its weight.
    """

    path: str
    kind: str
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        """Last component of the path, as in `q_proj`."""
        return self.path.rpartition(".")[2]


def matches(site: Site, target: str) -> bool:
    """Whether a target names a site: see `select`."""
    return fnmatchcase(site.path, target) or fnmatchcase(site.path, f"*.{target}")


def select(sites: Sequence[Site], targets: Sequence[str]) -> tuple[Site, ...]:
    """The sites that any target names, in the order of the model.

    A target is the end of a path, cut at a dot (`q_proj`, `mlp.down_proj`), or a pattern with `*`.
    Raises TargetError naming *every* target that matches nothing, each with the nearest names: a target
    that is passed over in silence leaves most of a model unadapted.
    """
    unmatched = [target for target in targets if not any(matches(site, target) for site in sites)]
    if unmatched or not targets:
        names = sorted({site.name for site in sites})
        lines = []
        for target in unmatched:
            near = difflib.get_close_matches(target.rpartition(".")[2], names, n=3, cutoff=0.5)
            fix = f"did you mean {', '.join(near)}?" if near else "choose from the sites below"
            lines.append(f"target '{target}' matches no site: {fix}")
        known = ", ".join(names) or "none"
        raise TargetError("\n".join([*lines, f"sites of this model end in: {known}"]))
    return tuple(site for site in sites if any(matches(site, target) for target in targets))
