"""Sites: the weights of a model that an adapter can act on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lorafit.errors import TargetError


@dataclass(frozen=True, order=True)
class Site:
    """One weight of shape (d_out, d_in).

    Args:
        path: The path of its module in the model. If a module has several weights that can be adapted, the path of the
            weight itself, such as `mlp.experts.down_proj`.
        kind: The key in `lorafit.layers.KINDS` of the kind that reads the weight.
        d_in: The number of inputs.
        d_out: The number of outputs.
        form: For a convolution (groups, *kernel_size); for experts (number of experts,); otherwise empty.
    """

    path: str
    kind: str
    d_in: int
    d_out: int
    form: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", tuple(self.form))  # a list, if it comes from JSON

    @property
    def name(self) -> str:
        """The last component of the path, such as `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def parameter(self) -> str:
        """The name of the weight in its module: the part after the first dot in `kind`, or `weight`."""
        return self.kind.partition(".")[2] or "weight"

    @property
    def module(self) -> str:
        """The path of the module that holds the weight."""
        return self.path.removesuffix(f".{self.parameter}") if "." in self.kind else self.path

    @property
    def key(self) -> str:
        """The key of the weight in the model's state dict."""
        return f"{self.module}.{self.parameter}"

    @property
    def per_rank(self) -> int:
        """The number of parameters in A and B for each unit of rank."""
        return self.count * (self.d_in + self.d_out)

    @property
    def groups(self) -> int:
        """The groups of a convolution, which all have the same A; otherwise 1."""
        return self.form[0] if len(self.form) > 1 else 1

    @property
    def count(self) -> int:
        """The number of experts in the weight (count, d_out, d_in), each with its own factors; otherwise 1."""
        return self.form[0] if len(self.form) == 1 else 1


def matches(site: Site, target: str) -> bool:
    """Whether a target names a site. `select` describes targets."""
    paths = {site.path, site.module, site.key.removesuffix(".weight")}
    return any(fnmatchcase(path, pattern) for path in paths for pattern in (target, f"*.{target}"))


def select(sites: Sequence[Site], targets: Sequence[str]) -> tuple[Site, ...]:
    """The sites that at least one target names, in the order of the model.

    Args:
        sites: The sites to choose from.
        targets: Ends of paths that begin after a dot (`q_proj`, `mlp.down_proj`; `experts` names all weights of that
            module), or patterns with `*`.

    Raises:
        TargetError: If targets match no site. The message lists all of them, each with similar names, because a typo
            that goes unnoticed could leave most of a model without an adapter.
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
