"""The layer card: the energy of the gradient at every site on the user's rows, measured before training.

In a fresh adapter, B = 0, so the gradient of B is s·G Aᵀ, where G is the gradient of the site's weight. A is random, so
this is a random sketch of G, with the energy E‖G Aᵀ‖² = ‖G‖²·‖A‖²/d_in. K backwards of the fresh adapter therefore show
the same as K dense gradients, within the error of the sketch, in the memory of one adapter. The squared norm of the
mean gradient would count noise as signal; (‖Σ G_k‖² − Σ ‖G_k‖²) / (K(K − 1)), which uses only pairs of different
batches, does not.
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

BATCHES, FEWEST = 16, 4  # the gradients of a card; with fewer than four, signal and noise cannot be told apart
SHARE = 0.02  # the largest share of the run's rows that a card may use


@dataclass(frozen=True)
class Signal:
    """One site of the card.

    Args:
        path: The path of the site.
        block: The number of its block; None outside the blocks.
        energy: The energy of its weight's gradient, in (nats per token)² per unit of weight². The estimate is unbiased,
            so it may be below zero if there is only noise.
        parameters: The parameters per unit of rank: d_in + d_out, of every expert.
    """

    path: str
    block: int | None
    energy: float
    parameters: int

    @property
    def part(self) -> str:
        """The part of the block in which the site lies, such as `mlp`; `others` if it lies in none."""
        inside = within(self.path).split(".")
        return inside[0] if self.block is not None and len(inside) > 1 else "others"


@dataclass(frozen=True)
class Card:
    """The layer card.

    Args:
        sites: The sites in the order of the model.
        batches: The number of batches on which they were measured.
        rows: The number of rows in all batches.
    """

    sites: tuple[Signal, ...]
    batches: int
    rows: int

    def share(self, paths: Sequence[str]) -> float:
        """The share of the total energy that lies at these sites. An energy below zero counts as zero."""
        wanted = set(paths)
        total = sum(max(0.0, signal.energy) for signal in self.sites)
        at_paths = sum(max(0.0, signal.energy) for signal in self.sites if signal.path in wanted)
        return at_paths / total if total else 0.0


def within(path: str) -> str:
    """The part of a path after the number of the block; the whole path if it has no number."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path, maxsplit=1)[-1]


def kinds_of(paths: Sequence[str]) -> dict[str, str]:
    """The kind of module of each site, which is the same in every block.

    Returns:
        By path, the name of the module, such as `q_proj`; or its path within the block, such as `mlp.c_proj`, if
        several modules of a block have the same name.
    """
    inside = {path: within(path) for path in paths}
    names = Counter(one.rpartition(".")[2] for one in set(inside.values()))
    return {path: name if names[name := one.rpartition(".")[2]] == 1 else one for path, one in inside.items()}


def block_of(site: Site | str) -> int | None:
    """The number of the block in which a site lies, which is the first number in its path; None if it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site if isinstance(site, str) else site.path)
    return int(found[1]) if found else None


def card_of(
    runner: Runner,
    fresh: Adapter,
    rows: Sequence[Row],
    recipe: Recipe,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Card | None:
    """Measure the layer card on at most the share SHARE of the rows of the run. No more than two gradients are held.

    Args:
        runner: Runs the base.
        fresh: A fresh adapter, with B = 0.
        rows: The training rows.
        recipe: The recipe of the run.
        watch: Called with the number of batches that are done, and of all.

    Returns:
        The card; None if that share of the rows is fewer than FEWEST rows.
    """
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
            assert state.master.grad is not None  # it was set by the backward above
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
    """‖gradient of B‖² by site path."""
    energies = {}
    for name, gradient in state.gradients().items():
        path, _, factor = name.rpartition(".")
        if factor == "B":
            energies[path] = float(gradient.double().square().sum())
    return energies
