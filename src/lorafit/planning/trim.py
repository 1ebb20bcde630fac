"""Makes an adapter smaller: each pair keeps the directions with the largest effect.

The effect of a pair is s·B A. In coordinates in which A x and Bᵀ g are white, it is a small matrix M = s·√Gᴮ √Gᴬ
(rank × rank). Among all pairs of rank k, the one that keeps the k largest singular values of M is the closest (Eckart
and Young 1936). Gᴬ and Gᴮ define the distance: they are the second moments of A x and Bᵀ g on the user's rows, or
A Aᵀ and Bᵀ B, with which all directions count equally. Over the whole adapter, the directions with the smallest effect
per parameter are removed first.
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

SMALLEST = 1e-12  # eigenvalues of a moment below this share of the largest are treated as rounding errors


@dataclass(frozen=True)
class Moments:
    """Second moments of a pair on the user's rows.

    Args:
        inputs: Of A x, (rank, rank); None if all directions of the input count equally.
        outputs: Of Bᵀ g, (rank, rank), where g is the gradient of the output; None if all directions of the output
            count equally.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class _Spectrum:
    """A pair with its directions sorted by effect: A (rank, d_in), B (d_out, rank), and the effects (rank,), largest
    first."""

    slot: LowRank
    a: Tensor
    b: Tensor
    values: Tensor


def require_pairs(adapter: Adapter) -> list[LowRank]:
    """The slots that can be trimmed. Raises AdapterError if there are none, or if all their B are zero."""
    pairs = [slot for slot in adapter.plan.slots if slot.is_pair]
    if not any(slot.is_product for slot in adapter.plan.slots):
        raise AdapterError(
            "nothing to trim: only pairs of linear layers can be trimmed, and this adapter has none: name another"
        )
    if not pairs:
        raise AdapterError(
            "nothing to trim: this adapter has no plain pairs (DoRA's magnitudes belong to a whole pair): train with "
            "--variant lora"
        )
    if not any(adapter.tensors[f"{slot.site.path}.B"].any() for slot in pairs):
        raise AdapterError("nothing to trim: this adapter has no effect, because every B is zero: train it first")
    return pairs


def untrimmable(adapter: Adapter) -> str | None:
    """The reason why the adapter cannot be trimmed; None if it can."""
    try:
        require_pairs(adapter)
    except AdapterError as error:
        return str(error)
    return None


def smallest_share(adapter: Adapter) -> float:
    """The share of an adapter's parameters below which trimming may leave nothing."""
    pairs = require_pairs(adapter)
    return max(_cost(slot) for slot in pairs) / sum(_cost(slot) * slot.rank for slot in pairs)


def trimmed(adapter: Adapter, share: float, moments: Mapping[str, Moments] | None = None) -> tuple[Adapter, float]:
    """Trim an adapter. The rank of each pair falls, its scale stays, and a pair of rank 0 leaves the plan. Slots that
    are not plain pairs are kept as they are.

    Args:
        adapter: The adapter.
        share: The share of its parameters in pairs to keep, at most.
        moments: The moments of every pair, by site path; None to count all directions equally.

    Returns:
        The smaller adapter, and the share of the effect that is left: of the squared singular values, summed over the
        sites.

    Raises:
        AdapterError: If no pair has an effect, or nothing would be left.
    """
    pairs = require_pairs(adapter)
    spectra = {
        slot.site.path: _spectrum(adapter, slot, (moments or {}).get(slot.site.path, Moments())) for slot in pairs
    }
    effect = sum(float(each.values.square().sum()) for each in spectra.values())
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
    return replace(adapter, plan=replace(adapter.plan, slots=tuple(slots)), tensors=tensors), kept / effect


def _spectrum(adapter: Adapter, slot: LowRank, moments: Moments) -> _Spectrum:
    a, b = (adapter.tensors[f"{slot.site.path}.{name}"].double() for name in ("A", "B"))
    inward, back = _roots(a @ a.T if moments.inputs is None else moments.inputs.double())
    outward, _ = _roots(b.T @ b if moments.outputs is None else moments.outputs.double())
    _, values, right = torch.linalg.svd(slot.scaling * outward @ inward)
    return _Spectrum(slot, right @ back @ a, b @ inward @ right.T, values)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """√G and its pseudoinverse."""
    values, vectors = torch.linalg.eigh(moment)
    kept = values > SMALLEST * values.max().clamp_min(1e-300)
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(kept, root.clamp_min(1e-300).reciprocal(), 0.0)
    return (vectors * torch.where(kept, root, 0.0)) @ vectors.T, (vectors * inverse) @ vectors.T


def _cost(slot: LowRank) -> int:
    """The parameters of one direction."""
    return slot.site.d_in + slot.site.d_out


def _ranks(spectra: Mapping[str, _Spectrum], share: float) -> dict[str, int]:
    """The number of directions to keep of each pair: those with the largest effect per parameter, within the budget."""
    budget = share * sum(_cost(each.slot) * each.slot.rank for each in spectra.values())
    effects = [(float(value) ** 2 / _cost(each.slot), path) for path, each in spectra.items() for value in each.values]
    ranks = dict.fromkeys(spectra, 0)
    for effect, path in sorted(effects, key=lambda pair: -pair[0]):
        budget -= _cost(spectra[path].slot)
        if budget < 0 or effect == 0:
            break
        ranks[path] += 1
    return ranks
