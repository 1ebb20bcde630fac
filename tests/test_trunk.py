"""The trunk: computed once, the same bits whether it is kept, read again, half lost or out of room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import capitals, tiny_gpt2, tiny_llama

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import free_blocks
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base
from lorafit.data.batches import Batch, Start, epoch_order
from lorafit.data.examples import Example, Message
from lorafit.data.render import Row, render, renderer_for
from lorafit.errors import DivergedError
from lorafit.layers.site import select
from lorafit.planning import decide
from lorafit.settings import settings_from
from lorafit.tasks import forward, probe
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN
from lorafit.testing import random_adapter
from lorafit.training import trunk as trunks
from lorafit.training.loop import train
from lorafit.training.recipe import Recipe

RECIPE = Recipe(learning_rate=1e-2, batch_size=4, steps=9, warmup=1, validate_every=4)  # three epochs of twelve rows


@pytest.fixture
def rows(tiny_base: Base) -> list[Row]:
    turns = [(Message("user", str(r["prompt"])), Message("assistant", str(r["completion"]))) for r in capitals(16)]
    return render(renderer_for(tiny_base), [Example(pair, f"test:{i}") for i, pair in enumerate(turns)], 512)


def upper(base: Base) -> Adapter:
    return fresh(base, uniform(select(base.sites, ["layers.1.*"]), 4, 32.0), seed=0)


def trained(base: Base, rows: list[Row], folder: Path | None = None, trunk_bytes: int = 0, **given: object) -> str:
    recipe = replace(RECIPE, **given)  # type: ignore[arg-type]
    return train(
        base, upper(base), rows[:12], rows[12:], recipe, folder=folder, trunk_bytes=trunk_bytes
    ).adapter.digest()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every trunk that is computed rather than read."""
    sizes: list[int] = []

    def counted(base: Base, batch: Batch, blocks: int) -> torch.Tensor:
        sizes.append(batch.ids.numel())
        return forward.trunk(base, batch, blocks)

    monkeypatch.setattr("lorafit.tasks.runner.trunk", counted)
    return sizes


@pytest.mark.parametrize("micro_tokens", [1024, 60])
def test_a_kept_trunk_is_computed_once_and_changes_no_bit(
    tiny_base: Base, rows: list[Row], tmp_path: Path, computed: list[int], micro_tokens: int
) -> None:
    plain = trained(tiny_base, rows, micro_tokens=micro_tokens)
    assert computed == []
    assert trained(tiny_base, rows, tmp_path, 1 << 30, micro_tokens=micro_tokens) == plain
    assert sum(computed) == sum(len(row.ids) for row in rows[:12])
    assert not list(tmp_path.glob("trunk-*")), "it is of no use once training has ended"


@pytest.mark.parametrize("most", [0, 5_000, 10_000])
def test_what_has_no_room_is_computed_every_time(
    tiny_base: Base, rows: list[Row], tmp_path: Path, computed: list[int], most: int
) -> None:
    assert trained(tiny_base, rows, tmp_path, most) == trained(tiny_base, rows)
    token = 4 * 32
    assert sum(computed) * token <= most


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    tiny_base: Base, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, real, calls = trained(tiny_base, rows), trunks._checksum, []

    def full(content: bytes) -> bytes:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(content)

    monkeypatch.setattr(trunks, "_checksum", full)
    assert trained(tiny_base, rows, tmp_path, 1 << 30) == plain


def test_a_pack_that_was_left_half_is_computed_again(
    tiny_base: Base, rows: list[Row], tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(tiny_base, rows)
    monkeypatch.setattr(trunks.Trunk, "remove", lambda self: None)
    trained(tiny_base, rows, tmp_path, 1 << 30)
    (file,) = tmp_path.glob("trunk-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    computed.clear()
    assert trained(tiny_base, rows, tmp_path, 1 << 30) == plain
    assert len(computed) == 1


def test_trainings_on_the_same_rows_share_a_trunk_that_stays(
    tiny_base: Base, rows: list[Row], tmp_path: Path, computed: list[int]
) -> None:
    """Arms of a search differ in rate and in steps, and are validated on fewer examples."""

    def arm(folder: str, valid: int, trunk_in: Path | None, **given: object) -> str:
        recipe = replace(RECIPE, **given)  # type: ignore[arg-type]
        return train(
            tiny_base,
            upper(tiny_base),
            rows[:12],
            rows[12 : 12 + valid],
            recipe,
            folder=tmp_path / folder,
            trunk_bytes=1 << 30,
            trunk_in=trunk_in,
        ).adapter.digest()

    for folder in ("a", "b", "c", "d"):
        (tmp_path / folder).mkdir()
    plain = arm("a", 3, None, steps=3, learning_rate=2e-2)
    computed.clear()
    arm("b", 4, tmp_path, steps=3)
    assert len(computed) == 3  # one pass, which a training by itself would not write down
    assert arm("c", 3, tmp_path, steps=3, learning_rate=2e-2) == plain
    assert len(computed) == 3
    arm("d", 4, None, steps=9)
    assert len([*tmp_path.glob("trunk-*.bin")]) == 1


@pytest.mark.parametrize("changed", ["base", "rows", "blocks"])
def test_a_trunk_of_something_else_is_not_taken(
    tiny_base: Base, rows: list[Row], tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(tiny_base, COMPLETION, PLAIN)
    packs = {(0, 1): len(rows[0].ids) + len(rows[1].ids)}
    trunks.Trunk(tmp_path / "trunk", runner, "rows", packs, 1, 1 << 30)
    (before,) = tmp_path.glob("trunk-*")
    if changed == "base":
        with torch.no_grad():
            next(tiny_base.model.parameters()).view(-1)[0] += 1
    others, blocks = "others" if changed == "rows" else "rows", 2 if changed == "blocks" else 1
    trunks.Trunk(tmp_path / "trunk", runner, others, packs, blocks, 1 << 30)
    (after,) = tmp_path.glob("trunk-*")
    assert after != before


def test_starting_at_a_block_computes_what_the_whole_model_does_bit_for_bit(tiny_base: Base, rows: list[Row]) -> None:
    way = probe.mode_of(tiny_base, rows)
    batch = forward.batch_of(tiny_base, rows[:4], way)
    adapter = random_adapter(tiny_base, uniform(select(tiny_base.sites, ["layers.1.*"]), 4, 8.0))
    with attach(tiny_base, adapter), packing(tiny_base), torch.no_grad():
        whole = forward.token_nll(tiny_base, batch, way)
        start = Start(forward.trunk(tiny_base, batch, 1), 1)
        assert torch.equal(forward.token_nll(tiny_base, replace(batch, start=start), way), whole)
    assert not any("forward" in vars(module) for module in tiny_base.model.modules())


@pytest.mark.parametrize(
    ("targets", "free"),
    [(["layers.1.*"], 1), (["layers.0.mlp.up_proj"], 0), (["layers.1.*", "layers.0.self_attn.q_proj"], 0)],
)
def test_blocks_are_free_below_the_lowest_site(tiny_base: Base, targets: list[str], free: int) -> None:
    assert free_blocks(tiny_base, uniform(select(tiny_base.sites, targets), 2, 8.0)) == free


def test_an_adapted_head_leaves_all_blocks_but_the_last_free(tiny_folder: Path) -> None:
    model = tiny_llama()
    base = Base.of(model, "tiny")
    assert free_blocks(base, uniform(select(base.sites, ["lm_head"]), 2, 8.0)) == 1


def test_a_family_that_does_not_declare_it_is_never_started_above() -> None:
    base = Base.of(tiny_gpt2(), "gpt2")
    assert free_blocks(base, uniform(select(base.sites, ["h.1.*"]), 2, 8.0)) == 0
    settings = settings_from({"targets": ["h.1.*"], "epochs": 2, "rank": 2})
    row = Row((1, 2, 3), (False, True, True), 0)
    (said,) = [choice for choice in decide(base, [row] * 8, settings).choices if choice.name == "trunk"]
    assert said.value == "not available"
    assert "in this family of models" in said.reason
    assert "(1)" in said.reason
    asked = settings_from({"rank": 2, "trunk_gb": 1.0})
    (said,) = [choice for choice in decide(base, [row] * 8, asked).choices if choice.name == "trunk"]
    assert said.value == "not kept"


def test_packs_are_the_same_in_every_epoch_in_another_order(rows: list[Row]) -> None:
    first, second = (epoch_order(rows, 3, 0, epoch, fixed=True) for epoch in (0, 1))
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
    assert first != second


def test_one_pass_writes_nothing_that_would_never_be_read(
    tiny_base: Base, rows: list[Row], tmp_path: Path, computed: list[int]
) -> None:
    trained(tiny_base, rows, tmp_path, 1 << 30, steps=3)
    assert computed == []


def test_a_run_that_diverged_leaves_no_trunk(tiny_base: Base, rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        trained(tiny_base, rows, tmp_path, 1 << 30, learning_rate=1e30)
    assert not list(tmp_path.glob("trunk-*"))
