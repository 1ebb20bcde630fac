"""Plans: which sites, at which rank and scale, by which variant. Always resolved numbers."""

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
        if type(self.alpha) is int:  # 32 and 32.0 are one plan, and must have one digest
            object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def scaling(self) -> float:
        """The scale s of the pair, as the method takes it from alpha and rank."""
        return VARIANTS[self.variant].scaling(self.alpha, self.rank)

    def at_rank(self, rank: int) -> LowRank:
        """The slot at another rank, and of the same scale."""
        return replace(self, rank=rank, alpha=VARIANTS[self.variant].alpha(self.scaling, rank))

    @property
    def is_pair(self) -> bool:
        """Whether it is A and B beside a product and nothing else, so that a part of the pair is a pair too."""
        return self.is_product and set(self.factors()) == {"A", "B"}

    @property
    def is_product(self) -> bool:
        """Whether its layer computes a product with a weight."""
        return KINDS[self.site.kind].is_product

    @property
    def flops(self) -> int:
        """Extra floating-point operations of one forward, per token."""
        inputs = KINDS[self.site.kind].fan_in(self.site)
        return 2 * self.rank * VARIANTS[self.variant].peft.ranks * (inputs + self.site.d_out)

    def factors(self) -> dict[str, Factor]:
        """What the method declares of every factor, by name."""
        return VARIANTS[self.variant].factors(self.site, self.rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every factor by name."""
        return {name: factor.shape for name, factor in self.factors().items()}

    def problems(self) -> list[str]:
        """What cannot be about this slot.

        A rank above the narrow side of the weight is allowed: it adds nothing, but PEFT makes such adapters.
        """
        found = []
        if self.variant not in VARIANTS:
            found.append(f"{self.site.path}: unknown variant '{self.variant}': choose from {', '.join(VARIANTS)}")
        elif not (VARIANTS[self.variant].any_kind or self.is_product):
            found.append(f"{self.site.path}: {self.variant} does not act beside an {self.site.kind}: choose another")
        if not isinstance(self.rank, int) or self.rank < 1:
            found.append(f"{self.site.path}: rank {self.rank} cannot be: choose a whole number, 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            found.append(f"{self.site.path}: alpha {self.alpha} cannot be: choose a number above 0")
        return found


@dataclass(frozen=True)
class Plan:
    """Slots in the order of the model. Raises PlanError listing everything that cannot be."""

    slots: tuple[LowRank, ...]

    def __post_init__(self) -> None:
        problems = [problem for slot in self.slots for problem in slot.problems()]
        counts = Counter(slot.site.path for slot in self.slots)
        problems += [f"{path}: {n} slots on one site: leave one of them" for path, n in counts.items() if n > 1]
        if not self.slots:
            problems.append("a plan without sites adapts nothing: name at least one target")
        if problems:
            shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
            raise PlanError("\n".join(shown))

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(one.shape) for slot in self.slots for one in slot.factors().values() if one.trained)

    @property
    def bytes(self) -> int:
        """Size of the adapter in memory and on disk, in fp32."""
        return 4 * sum(math.prod(shape) for slot in self.slots for shape in slot.shapes().values())

    @property
    def is_product(self) -> bool:
        """Whether all its layers compute products: others are not served to many at once."""
        return all(slot.is_product for slot in self.slots)

    @property
    def flops_per_token(self) -> int:
        """Extra floating-point operations of one forward, per token."""
        return sum(slot.flops for slot in self.slots)

    def to_json(self) -> dict[str, Any]:
        return {"slots": [asdict(slot) for slot in self.slots]}

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str = "plan") -> Plan:
        """A plan as `to_json` gives it. `where` names it in errors: PlanError, or FormatError for what is no plan."""
        try:
            return Plan(tuple(LowRank(**{**slot, "site": Site(**slot["site"])}) for slot in value["slots"]))
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error
        except (KeyError, TypeError) as error:
            what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
            raise FormatError(f"{where}: not a plan of this version ({what}): name a plan.json of a run") from error


def uniform(sites: Sequence[Site], rank: int, alpha: float, variant: str = "lora") -> Plan:
    """The same rank, scale and variant on every site."""
    return Plan(tuple(LowRank(site, rank, alpha, variant) for site in sites))
