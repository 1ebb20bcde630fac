"""Plans: which sites are adapted, at which rank and scale, by which variant, in resolved numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorafit.errors import FormatError, PlanError
from lorafit.layers import KINDS
from lorafit.layers.site import Site
from lorafit.variants import VARIANTS
from lorafit.variants.variant import Factor


@dataclass(frozen=True)
class LowRank:
    """A pair of factors on one site; the scale s is alpha / rank."""

    site: Site
    rank: int
    alpha: float
    variant: str = "lora"

    def __post_init__(self) -> None:
        if type(self.alpha) is int:  # 32 and 32.0 are the same plan, and must have the same digest
            object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def scaling(self) -> float:
        """The scale s of the pair, as its method computes it from alpha and rank."""
        return VARIANTS[self.variant].scaling(self.alpha, self.rank)

    def at_rank(self, rank: int) -> LowRank:
        """The slot at another rank, with the same scale."""
        return replace(self, rank=rank, alpha=VARIANTS[self.variant].alpha(self.scaling, rank))

    @property
    def is_pair(self) -> bool:
        """Whether it is only A and B next to a product, so that a part of the pair is a pair too."""
        return self.is_product and set(self.factors()) == {"A", "B"}

    @property
    def is_product(self) -> bool:
        """Whether its layer computes a product with a weight."""
        return KINDS[self.site.kind].is_product

    @property
    def flops(self) -> int:
        """Extra floating-point operations of one forward, per token; of a convolution, per position of its output."""
        inputs = KINDS[self.site.kind].fan_in(self.site) * self.site.groups
        return 2 * self.rank * VARIANTS[self.variant].peft.ranks * (inputs + self.site.d_out)

    def factors(self) -> dict[str, Factor]:
        """The declarations of its factors, by name."""
        return VARIANTS[self.variant].factors(self.site, self.rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its factors, by name."""
        return {name: factor.shape for name, factor in self.factors().items()}

    def problems(self) -> list[str]:
        """Everything that is wrong with this slot.

        A rank above the narrow side of the weight is allowed: it adds nothing, but PEFT makes such adapters.
        """
        problems = []
        if self.variant not in VARIANTS:
            problems.append(f"{self.site.path}: unknown variant '{self.variant}': choose from {', '.join(VARIANTS)}")
        elif not (VARIANTS[self.variant].any_kind or KINDS[self.site.kind].any_variant):
            problems.append(f"{self.site.path}: {self.variant} does not act on an {self.site.kind}: choose another")
        elif self.site.count > 1 and set(self.factors()) != {"A", "B"}:
            problems.append(f"{self.site.path}: {self.variant} does not act on experts: choose lora or rslora")
        if not isinstance(self.rank, int) or self.rank < 1:
            problems.append(f"{self.site.path}: rank {self.rank} cannot be: choose a whole number, 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(f"{self.site.path}: alpha {self.alpha} cannot be: choose a number above 0")
        return problems


@dataclass(frozen=True)
class Whole:
    """A module whose own parameters are trained, rather than a pair: a classifier's head. parameters: name, shape."""

    path: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Plan:
    """Slots in the order of the model, and modules that are trained whole. Raises PlanError with everything that is
    wrong."""

    slots: tuple[LowRank, ...]
    whole: tuple[Whole, ...] = ()

    def __post_init__(self) -> None:
        problems = [problem for slot in self.slots for problem in slot.problems()]
        counts = Counter(slot.site.path for slot in self.slots)
        problems += [f"{path}: {n} slots on one site: leave one of them" for path, n in counts.items() if n > 1]
        problems += [f"{m.path}: both a pair and trained whole: leave one" for m in self.whole if counts[m.path]]
        if not self.slots:
            problems.append("a plan without sites adapts nothing: name at least one target")
        if problems:
            shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
            raise PlanError("\n".join(shown))

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(math.prod(shape) for _, _, shape, trained in self.tensors() if trained)

    @property
    def bytes(self) -> int:
        """The size of the adapter in memory and on disk, in fp32."""
        return 4 * sum(math.prod(shape) for _, _, shape, _ in self.tensors())

    def tensors(self) -> list[tuple[str, str, tuple[int, ...], bool]]:
        """All tensors of an adapter of this plan: path of the module, name, shape, whether it is trained."""
        pairs = [
            (slot.site.path, name, factor.shape, factor.trained)
            for slot in self.slots
            for name, factor in slot.factors().items()
        ]
        return pairs + [(module.path, name, shape, True) for module in self.whole for name, shape in module.parameters]

    @property
    def is_classifier(self) -> bool:
        """Whether it has a head, so that it writes no text."""
        return bool(self.whole)

    @property
    def is_product(self) -> bool:
        """Whether all its layers are linear, so that the adapter can be served together with others."""
        return all(slot.is_product for slot in self.slots)

    @property
    def flops_per_token(self) -> int:
        """Extra floating-point operations of one forward, per token."""
        return sum(slot.flops for slot in self.slots)

    def to_json(self) -> dict[str, Any]:
        whole = {"whole": [asdict(module) for module in self.whole]} if self.whole else {}
        slots = [asdict(slot) for slot in self.slots]
        for slot in slots:
            if not slot["site"]["form"]:
                del slot["site"]["form"]
        return {"slots": slots, **whole}

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str = "plan") -> Plan:
        """Read a plan that `to_json` wrote. `where` names it in errors: PlanError, or FormatError for other values."""
        try:
            slots = tuple(LowRank(**{**slot, "site": Site(**slot["site"])}) for slot in value["slots"])
            whole = tuple(
                Whole(module["path"], tuple((name, tuple(shape)) for name, shape in module["parameters"]))
                for module in value.get("whole", ())
            )
            return Plan(slots, whole)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
            raise FormatError(f"{where}: not a plan of this version ({what}): name a plan.json of a run") from error


def uniform(sites: Sequence[Site], rank: int, alpha: float, variant: str = "lora") -> Plan:
    """A plan with the same rank, scale and variant on every site."""
    return Plan(tuple(LowRank(site, rank, alpha, variant) for site in sites))
