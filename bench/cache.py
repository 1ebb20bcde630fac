"""The trunk cache: the same training with and without, on the upper half of the blocks. `make bench-cache`

Both arms take the same steps on the same packs, so they are compared pack by pack: seconds of a step without the cache
over seconds of the very same step with it, in the epochs after the first. The adapters must be equal bit for bit.

The bound, counting products of matrices alone: without, every block runs forward and the upper half backward to its
input; with, the upper half runs forward and backward. F a block's forward: (30 + 15) F against (15 + 15) F, and the
head at trained tokens, forward and backward, on both sides: 1.5 without the head, less with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table

from lorafit import Recipe, fresh, open_base, read_examples, render, renderer_for, train, uniform
from lorafit.attachment.blocks import blocks_of, free_blocks
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.jobs.machine import keep_freed_memory
from lorafit.planning.rules import all_linear

EPOCHS, BATCH, RANK, ALPHA, RATE = 3, 8, 8, 32.0, 1.3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2, help="of both arms, in turn")
    parser.add_argument("--record", action="store_true", help="append the table to bench/RESULTS.md")
    asked = parser.parse_args()
    about = circumstances()
    keep_freed_memory()
    base = open_base(asked.base)
    examples = read_examples("builtin")
    renderer = renderer_for(base, system="Help desk")
    rows = render(renderer, examples.train[: asked.examples], 512)
    valid = render(renderer, examples.valid[:4], 512)
    sites = all_linear(base)
    plan = uniform(sites[len(sites) // 2 :], RANK, ALPHA)
    blocks = free_blocks(base, plan)
    all_blocks = len(blocks_of(base))
    start = fresh(base, plan, seed=0)
    per_epoch = -(-len(rows) // BATCH)
    steps = EPOCHS * per_epoch
    recipe = Recipe(RATE, BATCH, steps, warmup=1, validate_every=steps)

    def run(trunk_bytes: int) -> tuple[list[float], str]:
        """Seconds of every step, and the digest of the adapter."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            digest = train(base, start, rows, valid, recipe, folder=folder, trunk_bytes=trunk_bytes).adapter.digest()
            told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        at = [0.0, *(line["seconds"] for line in told if "train_nll" in line)]
        return [after - before for before, after in pairwise(at)], digest

    without: list[float] = []
    with_cache: list[float] = []
    first: list[float] = []
    digests = set()
    for i in range(asked.repeats):
        for seconds, trunk_bytes in ((without, 0), (with_cache, 1 << 40)):
            print(f"repeat {i + 1} of {asked.repeats}, {'with' if trunk_bytes else 'without'} the cache")
            steps_taken, digest = run(trunk_bytes)
            seconds += steps_taken[per_epoch:]
            first += steps_taken[:per_epoch] if trunk_bytes else []
            digests.add(digest)
    ratios = [a / b for a, b in zip(without, with_cache, strict=True)]
    found = {
        "benchmark": "cache",
        **about,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "bound": round(bound(base, rows, all_blocks, blocks), 3),
        "free_blocks": blocks,
        "blocks": all_blocks,
        "seconds_per_step_without": round(statistics.median(without), 3),
        "seconds_per_step_with": round(statistics.median(with_cache), 3),
        "seconds_per_step_first_epoch": round(statistics.median(first), 3),
        "bit_identical": len(digests) == 1,
        "steps": len(ratios),
        "dtype": str(base.dtype).removeprefix("torch."),
    }
    low, high = found["ratio_quartiles"]
    head = ["a step of the epochs after the first", "seconds, median"]
    lines = [
        ["without the cache", f"{found['seconds_per_step_without']:.2f}"],
        ["with the cache", f"{found['seconds_per_step_with']:.2f}"],
        ["one of the first epoch, the cache being written", f"{found['seconds_per_step_first_epoch']:.2f}"],
        ["ratio, step by step (quartiles)", f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"],
        ["bound of the ratio, in products of matrices", f"{found['bound']:.2f}"],
    ]
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    print(json.dumps(found))
    if asked.record:
        same = "bit for bit equal" if found["bit_identical"] else "NOT equal"
        said = (
            f"The lowest {blocks} of {all_blocks} blocks kept, {len(ratios)} steps of {BATCH} examples, "
            f"{found['dtype']}; the adapters of both ways are {same}."
        )
        record("The trunk cache", found, f"{markdown(head, lines)}\n\n{said}")


def bound(base: Base, rows: Sequence[Row], blocks: int, kept: int) -> float:
    """What the ratio cannot exceed, by parameters of the blocks and of the head and the share of trained tokens."""
    forward = sum(site.d_in * site.d_out for site in all_linear(base)) / blocks
    (head,) = (site for site in base.sites if site.path in base.head_paths())
    share = sum(row.n_trained for row in rows) / sum(len(row.ids) for row in rows)
    both = 2 * head.d_in * head.d_out * share
    return ((2 * blocks - kept) * forward + both) / (2 * (blocks - kept) * forward + both)


if __name__ == "__main__":
    main()
