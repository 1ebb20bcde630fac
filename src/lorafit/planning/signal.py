"""The layer card: how strongly the user's rows pull at every site, measured before anything is trained.

At B = 0 the gradient of B is s·G Aᵀ, G being that of the site's weight: A, drawn at random, takes a sketch of G whose
energy is E‖G Aᵀ‖² = ‖G‖²·‖A‖²/d_in. So K backwards of the fresh adapter tell of all sites what K dense gradients would,
within the error of the sketch, and hold no more than one adapter does. The squared norm of a mean gradient counts its
noise as signal; (‖Σ G_k‖² − Σ ‖G_k‖²) / (K(K − 1)), over pairs of different batches, does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.state import TrainState
from lorafit.data.render import Row
from lorafit.data.split import seed_of
from lorafit.layers.site import Site
from lorafit.tasks.runner import Runner
from lorafit.training.recipe import Recipe

BATCHES, FEWEST = 16, 4  # gradients that a card is made of; below four, signal and noise cannot be told apart
SHARE = 0.02  # of the run's rows that may be spent on it


@dataclass(frozen=True)
class Signal:
    """One site of the card. energy: of the gradient of its weight, (nats per token)² per unit of weight², unbiased and
    so below zero where there is but noise. parameters: of one unit of rank, d_in + d_out of every expert; an adapter's
    extra operations per token are twice that and its rank."""

    path: str
    block: int | None
    energy: float
    parameters: int

    @property
    def part(self) -> str:
        """The part of its block a site lies in, as in `mlp`; `others` where it lies in none."""
        inside = within(self.path).split(".")
        return inside[0] if self.block is not None and len(inside) > 1 else "others"


@dataclass(frozen=True)
class Card:
    """The sites in the order of the model, measured on `batches` batches of `rows` rows in all."""

    sites: tuple[Signal, ...]
    batches: int
    rows: int

    def share(self, paths: Sequence[str]) -> float:
        """Of the energy of all sites that have any, how much lies at these."""
        wanted = set(paths)
        whole = sum(max(0.0, one.energy) for one in self.sites)
        return sum(max(0.0, one.energy) for one in self.sites if one.path in wanted) / whole if whole else 0.0


def within(path: str) -> str:
    """What follows the number of the block in a path; all of one that has none."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[-1]


def kinds_of(paths: Sequence[str]) -> dict[str, str]:
    """By path, the kind of module a site is, the same in every block: its name, as `q_proj`, or where parts of a block
    use one name for several, that with its part, as `mlp.c_proj`."""
    inside = {path: within(path) for path in paths}
    names = Counter(one.rpartition(".")[2] for one in set(inside.values()))
    return {path: name if names[name := one.rpartition(".")[2]] == 1 else one for path, one in inside.items()}


def block_of(site: Site | str) -> int | None:
    """The number of the block a site lies in: the first number in its path."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site if isinstance(site, str) else site.path)
    return int(found[1]) if found else None


def card_of(
    runner: Runner,
    fresh: Adapter,
    rows: Sequence[Row],
    recipe: Recipe,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Card | None:
    """Measure it on `fresh`, an adapter with B = 0, in at most SHARE of the rows that the run will see; None where this
    is not enough for FEWEST batches of a row each. The gradients go past and are not kept."""
    spent = int(SHARE * recipe.steps * recipe.batch_size)
    count = min(BATCHES, spent, len(rows))
    if count < FEWEST:
        return None
    size = min(recipe.batch_size, spent // count, len(rows) // count)
    drawn = np.random.default_rng(seed_of(recipe.seed, "card")).permutation(len(rows))[: count * size].tolist()
    state = TrainState(fresh, runner.base.device)
    runner = runner.within(recipe.micro_tokens, recipe.recompute)
    total = torch.zeros_like(state.master)
    squares: dict[str, float] = dict.fromkeys((slot.site.path for slot in fresh.plan.slots), 0.0)
    with runner.training(state):
        for k in range(count):
            watch(k, count)
            runner.gradient_of(rows, runner.parts(rows, drawn[k * size : (k + 1) * size]))
            for path, square in _energies(state).items():
                squares[path] += square
            assert state.master.grad is not None  # a backward has just been through
            total += state.master.grad
            state.master.grad = None
        state.master.grad = total
        joined = _energies(state)
    watch(count, count)
    sites = []
    for slot in fresh.plan.slots:
        path = slot.site.path
        sketch = slot.site.count * slot.site.d_in / (slot.scaling**2 * float(fresh.tensors[f"{path}.A"].square().sum()))
        energy = sketch * (joined[path] - squares[path]) / (count * (count - 1))
        sites.append(Signal(path, block_of(path), energy, slot.site.per_rank))
    return Card(tuple(sites), count, count * size)


def _energies(state: TrainState) -> dict[str, float]:
    """‖gradient of B‖² by site."""
    found = {}
    for name, gradient in state.gradients().items():
        path, _, factor = name.rpartition(".")
        if factor == "B":
            found[path] = float(gradient.double().square().sum())
    return found
