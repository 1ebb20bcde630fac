"""Sites: the places in a model where an adapter can act."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lorafit.errors import TargetError


@dataclass(frozen=True, order=True)
class Site:
    """One weight of shape (d_out, d_in), named by the path of its module in the model; of a module that has several,
    by that of the weight itself, as in `mlp.experts.down_proj`.

    `kind` names how the weight is read, by its key in `lorafit.layers.KINDS`. `form`: of a convolution, its groups and
    the sides of its kernel; of experts, how many there are, with a pair each.
    """

    path: str
    kind: str
    d_in: int
    d_out: int
    form: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", tuple(self.form))  # JSON has lists

    @property
    def name(self) -> str:
        """Last component of the path, as in `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def parameter(self) -> str:
        """Name of the weight in its module: what follows the dot in the name of the kind, or `weight`."""
        return self.kind.partition(".")[2] or "weight"

    @property
    def module(self) -> str:
        """Path of the module that holds the weight."""
        return self.path.removesuffix(f".{self.parameter}") if "." in self.kind else self.path

    @property
    def key(self) -> str:
        """Of the weight in the model's state dict."""
        return f"{self.module}.{self.parameter}"

    @property
    def per_rank(self) -> int:
        """Numbers in A and B for one unit of rank."""
        return self.count * (self.d_in + self.d_out)

    @property
    def groups(self) -> int:
        """In how many parts a convolution takes its input, each with the same A."""
        return self.form[0] if len(self.form) > 1 else 1

    @property
    def count(self) -> int:
        """How many experts lie in the weight (count, d_out, d_in), each with factors of its own."""
        return self.form[0] if len(self.form) == 1 else 1


def matches(site: Site, target: str) -> bool:
    """Whether a target names a site: see `select`."""
    paths = {site.path, site.module, site.key.removesuffix(".weight")}
    return any(fnmatchcase(path, pattern) for path in paths for pattern in (target, f"*.{target}"))


def select(sites: Sequence[Site], targets: Sequence[str]) -> tuple[Site, ...]:
    """The sites that any target names, in the order of the model.

    A target is the end of a path, cut at a dot (`q_proj`, `mlp.down_proj`; `experts` for all weights of a module), or a
    pattern with `*`.
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
