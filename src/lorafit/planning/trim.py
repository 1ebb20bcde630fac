"""Adapters of fewer parameters that compute nearly the same: each pair cut to the directions that do most.

What a pair does is s·B A. In coordinates in which A x and Bᵀ g are white it is a small matrix, M = s·√Gᴮ √Gᴬ (rank ×
rank), and of all pairs of rank k the one that keeps the k largest singular values of M is nearest to the whole (Eckart
and Young 1936). G says what is near: the second moments of A x and Bᵀ g on the user's rows, or with A Aᵀ and Bᵀ B every
direction alike. Over the whole adapter, those directions go first that do least for each parameter they take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import LowRank
from lorafit.errors import AdapterError

SMALLEST = 1e-12  # singular values of a moment below this share of the largest are taken for rounding


@dataclass(frozen=True)
class Moments:
    """Second moments of a pair's inside, (rank, rank) each: `inputs` of A x, `outputs` of Bᵀ g, g the gradient at its
    output. None where every direction of that side counts alike."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class _Spectrum:
    """A pair whose directions are sorted: A (rank, d_in), B (d_out, rank), and what each does, (rank,) descending."""

    slot: LowRank
    a: Tensor
    b: Tensor
    values: Tensor


def require_pairs(adapter: Adapter) -> list[LowRank]:
    """The slots that can be trimmed. Raises AdapterError where there are none, or they do nothing."""
    pairs = [slot for slot in adapter.plan.slots if slot.is_pair]
    if not any(slot.is_product for slot in adapter.plan.slots):
        raise AdapterError(
            "nothing to trim: only the pairs of linear layers are cut, and this adapter has none: name another"
        )
    if not pairs:
        raise AdapterError(
            "nothing to trim: no slot of this adapter is a plain pair (DoRA's magnitudes belong to the "
            "whole pair): train with --variant lora"
        )
    if not any(adapter.tensors[f"{slot.site.path}.B"].any() for slot in pairs):
        raise AdapterError("nothing to trim: this adapter does nothing, its B are zero: train it first")
    return pairs


def untrimmable(adapter: Adapter) -> str | None:
    """Why nothing of the adapter can be trimmed; None where something can."""
    try:
        require_pairs(adapter)
    except AdapterError as error:
        return str(error)
    return None


def smallest_share(adapter: Adapter) -> float:
    """Below it nothing of an adapter might be left."""
    pairs = require_pairs(adapter)
    return max(_cost(slot) for slot in pairs) / sum(_cost(slot) * slot.rank for slot in pairs)


def trimmed(adapter: Adapter, share: float, moments: Mapping[str, Moments] | None = None) -> tuple[Adapter, float]:
    """The adapter with at most `share` of its parameters in pairs, and how much of what these do is left, squared and
    summed over the sites, in the sense of the moments. The scale of a pair stays, its rank falls, and a pair of which
    nothing is left leaves the plan. Slots that are more than a pair are kept as they are.

    moments: by site path, of every pair, or of none. Raises AdapterError where there are no pairs that do anything,
    or nothing would be left.
    """
    pairs = require_pairs(adapter)
    spectra = {
        slot.site.path: _spectrum(adapter, slot, (moments or {}).get(slot.site.path, Moments())) for slot in pairs
    }
    does = sum(float(each.values.square().sum()) for each in spectra.values())
    ranks = _ranks(spectra, share)
    slots: list[LowRank] = []
    heads = [f"{one.path}.{name}" for one in adapter.plan.whole for name, _ in one.parameters]
    tensors = {key: adapter.tensors[key] for key in heads}
    for slot in adapter.plan.slots:
        path = slot.site.path
        if path not in spectra:
            slots.append(slot)
            tensors |= {f"{path}.{name}": adapter.tensors[f"{path}.{name}"] for name in slot.shapes()}
        elif rank := ranks[path]:
            slots.append(slot.at_rank(rank))
            tensors[f"{path}.A"] = spectra[path].a[:rank].float()
            tensors[f"{path}.B"] = spectra[path].b[:, :rank].float()
    if not any(ranks.values()):
        least = math.ceil(1e4 * smallest_share(adapter)) / 100
        raise AdapterError(
            f"{share:.2%} of this adapter is less than one direction of a pair: keep {least:.2f}% or more"
        )
    kept = sum(float(each.values[: ranks[path]].square().sum()) for path, each in spectra.items())
    return replace(adapter, plan=replace(adapter.plan, slots=tuple(slots)), tensors=tensors), kept / does


def _spectrum(adapter: Adapter, slot: LowRank, moments: Moments) -> _Spectrum:
    a, b = (adapter.tensors[f"{slot.site.path}.{name}"].double() for name in ("A", "B"))
    inward, back = _roots(a @ a.T if moments.inputs is None else moments.inputs.double())
    outward, _ = _roots(b.T @ b if moments.outputs is None else moments.outputs.double())
    _, values, right = torch.linalg.svd(slot.scaling * outward @ inward)
    return _Spectrum(slot, right @ back @ a, b @ inward @ right.T, values)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """√G and its inverse on what G reaches."""
    values, vectors = torch.linalg.eigh(moment)
    kept = values > SMALLEST * values.max().clamp_min(1e-300)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(kept, root.clamp_min(1e-300).reciprocal(), 0.0)
    return (vectors * torch.where(kept, root, 0.0)) @ vectors.T, (vectors * inverse) @ vectors.T


def _cost(slot: LowRank) -> int:
    """Parameters of one direction."""
    return slot.site.d_in + slot.site.d_out


def _ranks(spectra: Mapping[str, _Spectrum], share: float) -> dict[str, int]:
    """How many directions of each pair are kept: the most useful for their cost, until the budget is spent."""
    budget = share * sum(_cost(each.slot) * each.slot.rank for each in spectra.values())
    uses = [(float(value) ** 2 / _cost(each.slot), path) for path, each in spectra.items() for value in each.values]
    ranks = dict.fromkeys(spectra, 0)
    for use, path in sorted(uses, key=lambda one: -one[0]):
        budget -= _cost(spectra[path].slot)
        if budget < 0 or use == 0:
            break
        ranks[path] += 1
    return ranks
