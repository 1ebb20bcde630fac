"""The lorafit arm of `bench/train.py`: `lorafit.train`, as a user calls it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from train_child import DTYPES, Job, Pace, Seen, random_model

from lorafit import Base, Recipe, attach, fresh, open_base, read_adapter, train, uniform
from lorafit.adapters.formats import peft
from lorafit.data.render import Row
from lorafit.tasks.runner import Runner
from lorafit.training.loop import Moment


def rows_of(pairs: list[tuple[list[int], list[bool]]]) -> list[Row]:
    return [Row(tuple(ids), tuple(trained), i) for i, (ids, trained) in enumerate(pairs)]


def run(job: Job) -> None:
    """Train through the windows; the adapter is written as PEFT's folder, from which all arms are scored."""
    pace = Pace(job)
    if job.shape is not None or job.base is None:
        base = Base.of(random_model(job), "random")
    else:
        base = open_base(job.base, DTYPES[job.dtype])
    if job.start is None:
        sites = [site for site in base.sites if site.path not in base.head_paths()]
        start = fresh(base, uniform(sites, job.rank, job.alpha), job.seed)
    else:
        start = read_adapter(Path(job.start))
    pace.memory.base_is_loaded()
    seen = Seen(base.model.get_input_embeddings(), job)  # type: ignore[operator]
    counted = [0, 0]

    def tell(moment: Moment) -> None:
        if moment.train_nll is None:  # a validation: before the first window, or after the last
            seen.looked_up.clear()
            pace.began = time.perf_counter()
            return
        counts = seen.take()
        counted[0] += counts[1]
        counted[1] += counts[2]
        pace.stepped(counts)

    recipe = Recipe(
        job.learning_rate,
        job.batch,
        job.all_steps,
        job.rate_warmup,
        validate_every=job.all_steps,
        patience=job.all_steps + 1,
        seed=job.seed,
    )
    trained = train(base, start, rows_of(job.rows), rows_of(job.valid[:2]), recipe, tell=tell)
    if counted != [trained.tokens, trained.trained_tokens]:
        raise RuntimeError(f"counted {counted} tokens, the loop {[trained.tokens, trained.trained_tokens]}")
    if trained.best_step != job.all_steps:
        raise RuntimeError("validation grew worse, so the adapter is not the last one: choose a lower rate")
    peft.write(trained.adapter, Path(job.out) / "adapter")
    pace.finish(adapter=str(Path(job.out) / "adapter"))


def score(job: Job, adapters: list[str]) -> None:
    """Print the NLL per validation example of the base and of each `name=folder`, as JSON."""
    assert job.base is not None
    base = open_base(job.base, DTYPES[job.dtype])
    rows = rows_of(job.valid)
    found = {"base": Runner.of(base, rows).nll(rows)}
    for name, _, folder in (each.partition("=") for each in adapters):
        with attach(base, read_adapter(Path(folder)), accept_unknown_base=True):
            found[name] = Runner.of(base, rows).nll(rows)
    print(json.dumps(found))
