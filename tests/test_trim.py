"""Trimming: exact where nothing is lost, nearest where something is, and told where nothing can be decided."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import LowRank, Plan, uniform
from lorafit.errors import AdapterError, SettingsError
from lorafit.layers.site import Site
from lorafit.planning.trim import Moments, trimmed
from lorafit.settings import share_of

SITES = tuple(Site(name, "linear", d_in, d_out) for name, d_in, d_out in (("a", 24, 16), ("b", 16, 40), ("c", 16, 16)))


def adapter_of(plan: Plan | None = None, seed: int = 0) -> Adapter:
    plan = plan or uniform(SITES, 6, 12.0)
    g = torch.Generator().manual_seed(seed)
    return Adapter(
        plan,
        {
            f"{slot.site.path}.{name}": torch.randn(shape, generator=g)
            for slot in plan.slots
            for name, shape in slot.shapes().items()
        },
    )


def delta(adapter: Adapter, path: str) -> Tensor:
    for slot in adapter.plan.slots:
        if slot.site.path == path:
            b, a = (adapter.tensors[f"{path}.{name}"].double() for name in ("B", "A"))
            return slot.scaling * b @ a
    return torch.zeros(1, dtype=torch.float64)


def moments_of(adapter: Adapter, n: int = 400) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Moments]]:
    """Inputs and output gradients of very different size by direction, and the moments they make."""
    g = torch.Generator().manual_seed(1)
    x, back, moments = {}, {}, {}
    for slot in adapter.plan.slots:
        path = slot.site.path
        x[path] = torch.randn(n, slot.site.d_in, generator=g).double() * torch.logspace(-2, 1, slot.site.d_in)
        back[path] = torch.randn(n, slot.site.d_out, generator=g).double() * torch.logspace(1, -2, slot.site.d_out)
        u, v = x[path] @ adapter.tensors[f"{path}.A"].double().T, back[path] @ adapter.tensors[f"{path}.B"].double()
        moments[path] = Moments(u.T @ u / n, v.T @ v / n)
    return x, back, moments


@pytest.mark.parametrize("weighted", ["plain", "inputs", "both"])
def test_the_whole_is_what_it_was(weighted: str) -> None:
    adapter = adapter_of()
    _, _, moments = moments_of(adapter)
    given = {
        path: Moments(m.inputs if weighted != "plain" else None, m.outputs if weighted == "both" else None)
        for path, m in moments.items()
    }
    found, _ = trimmed(adapter, 1.0, given)
    assert found.plan == adapter.plan
    for site in SITES:
        whole = delta(adapter, site.path)
        assert (delta(found, site.path) - whole).norm() <= 1e-5 * whole.norm()


def test_a_pair_of_lower_rank_than_it_has_room_for_loses_nothing() -> None:
    plan = uniform(SITES, 6, 12.0)
    whole = adapter_of(plan)
    tensors = {key: t.clone() for key, t in whole.tensors.items()}
    for site in SITES:
        tensors[f"{site.path}.B"][:, 3:] = tensors[f"{site.path}.B"][:, :3] @ torch.ones(3, 3)
    found, _ = trimmed(Adapter(plan, tensors), 0.5)
    assert [slot.rank for slot in found.plan.slots] == [3, 3, 3]
    assert [slot.scaling for slot in found.plan.slots] == [2.0, 2.0, 2.0]
    for site in SITES:
        exact = delta(Adapter(plan, tensors), site.path)
        assert (delta(found, site.path) - exact).norm() <= 1e-5 * exact.norm()


def test_plain_trimming_is_the_truncated_svd_of_what_the_pair_does() -> None:
    adapter = adapter_of()
    found, _ = trimmed(adapter, 0.5)
    for slot in found.plan.slots:
        u, s, vh = torch.linalg.svd(delta(adapter, slot.site.path), full_matrices=False)
        best = (u[:, : slot.rank] * s[: slot.rank]) @ vh[: slot.rank]
        assert (delta(found, slot.site.path) - best).norm() <= 1e-5 * best.norm()


def test_weighted_by_inputs_what_comes_out_on_those_inputs_is_nearest() -> None:
    """Against the plain cut of the same ranks, measured on the inputs, and for both sides on the gradients too."""
    adapter = adapter_of()
    x, back, moments = moments_of(adapter)
    for both in (False, True):
        found, _ = trimmed(
            adapter, 0.5, {p: Moments(m.inputs, m.outputs if both else None) for p, m in moments.items()}
        )
        for slot in found.plan.slots:
            path = slot.site.path
            u, s, vh = torch.linalg.svd(delta(adapter, path), full_matrices=False)
            plain = (u[:, : slot.rank] * s[: slot.rank]) @ vh[: slot.rank]
            lost = [(x[path] @ (delta(adapter, path) - other).T) for other in (delta(found, path), plain)]
            if both:  # E[gᵀ (ΔW − ΔW') x]² where g and x are independent
                lost = [each @ torch.linalg.cholesky(back[path].T @ back[path]) for each in lost]
            assert lost[0].norm() < 0.9 * lost[1].norm()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
def test_no_more_is_kept_than_asked_for(share: float) -> None:
    adapter = adapter_of()
    assert trimmed(adapter, share)[0].plan.parameters <= share * adapter.plan.parameters


def test_what_is_left_is_told() -> None:
    adapter = adapter_of()
    found, left = trimmed(adapter, 0.5)
    squares = [sum(delta(one, site.path).square().sum() for site in SITES) for one in (found, adapter)]
    assert left == pytest.approx(float(squares[0] / squares[1]), rel=1e-5)
    assert trimmed(adapter, 1.0)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["0%", "100%", "-5%", "1", "25 percent", "", "nan"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="not a share of an adapter: write 25%"):
        share_of(text)


def test_a_share_may_be_written_either_way() -> None:
    assert share_of("25%") == share_of(" 0.25 ") == 0.25


def test_what_does_least_goes_first_wherever_it_is() -> None:
    adapter = adapter_of()
    tensors = dict(adapter.tensors)
    tensors["c.B"] = 1e-3 * tensors["c.B"]
    found, _ = trimmed(Adapter(adapter.plan, tensors), 0.5)
    assert [slot.site.path for slot in found.plan.slots] == ["a", "b"]


def test_slots_that_are_more_than_a_pair_stay_whole() -> None:
    plan = Plan((LowRank(SITES[0], 4, 8.0), LowRank(SITES[1], 4, 8.0, "dora")))
    adapter = adapter_of(plan)
    found, _ = trimmed(adapter, 0.5)
    assert [slot.rank for slot in found.plan.slots] == [2, 4]
    assert torch.equal(found.tensors["b.m"], adapter.tensors["b.m"])
    assert [slot.is_pair for slot in plan.slots] == [True, False]
    with pytest.raises(AdapterError, match="this adapter has no plain pairs"):
        trimmed(adapter_of(uniform(SITES, 2, 4.0, "dora")), 0.5)


def test_a_share_below_the_smallest_direction_is_refused_and_the_one_named_will_do() -> None:
    with pytest.raises(AdapterError, match=r"keep ([\d.]+)% or more") as refused:
        trimmed(adapter_of(), 0.01)
    named = re.search(r"keep ([\d.]+)%", str(refused.value))
    assert named is not None
    assert trimmed(adapter_of(), float(named[1]) / 100)[0].plan.slots


def test_an_adapter_that_does_nothing_has_nothing_to_keep() -> None:
    plan = uniform(SITES, 2, 4.0)
    idle = Adapter(
        plan, {key: torch.zeros_like(t) if key.endswith("B") else t for key, t in adapter_of(plan).tensors.items()}
    )
    with pytest.raises(AdapterError, match="has no effect"):
        trimmed(idle, 0.5)
