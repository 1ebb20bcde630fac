"""Train the control of the demo and record it: the same run on shuffled answers, scored on the same test questions.

What this adapter gets right it owes to the form of the answers, not to the handbook. As long as the demo to run.

    python scripts/make_control.py [OUT: where to write, default the package's own control.json]
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lorafit.attachment.pure import fresh
from lorafit.bases.base import open_base
from lorafit.data.reading import BUILTIN, BUILTIN_FOLDER, read_examples
from lorafit.data.render import render, renderer_for
from lorafit.evaluation.answers import prompts_of, score_answers, shuffled_answers
from lorafit.evaluation.decoding import Decoding
from lorafit.files import write_json
from lorafit.jobs.demo import BASE, SETTINGS
from lorafit.jobs.machine import keep_freed_memory
from lorafit.planning import decide
from lorafit.runs.folder import versions
from lorafit.settings import settings_from
from lorafit.training.loop import Moment, train

MAX_NEW_TOKENS = 64


def run() -> dict[str, Any]:
    """The control's scores, with what they were measured with."""
    keep_freed_memory()
    settings = settings_from(SETTINGS)
    base = open_base(BASE, None, print)
    examples = read_examples(BUILTIN)
    shuffled = replace(examples, train=tuple(shuffled_answers(examples.train, settings.seed)))
    renderer = renderer_for(base, settings.system)
    rows = render(renderer, shuffled.train, settings.max_length)
    valid = render(renderer, examples.valid, settings.max_length)
    decision = decide(base, rows, settings)
    start = fresh(base, decision.plan, settings.seed, renderer.rendering)
    trained = train(base, start, rows, valid, decision.recipe, tell=_tell)
    prompts = prompts_of(renderer, examples.test)
    with Decoding(base, renderer, max(map(len, prompts)), MAX_NEW_TOKENS) as decoding:
        score = score_answers(examples.test, decoding.answers(prompts, trained.adapter), renderer)
    return {
        "facts": score.accuracy,
        "right": score.right,
        "n": score.n,
        "best_step": trained.best_step,
        "recipe": asdict(decision.recipe),
        "dtype": str(base.dtype),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _tell(moment: Moment) -> None:
    if moment.step % 25 == 0:
        print(f"step {moment.step}/{moment.steps}: {moment.train_nll}, {moment.seconds_left:.0f} s left", flush=True)


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else BUILTIN_FOLDER / "control.json"
    found = run()
    write_json(out, found)
    print(f"{found['right']} of {found['n']} right; written to {out}")
