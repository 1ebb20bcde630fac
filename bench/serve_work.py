"""What the benchmarks of serving ask: workloads, their prompts, and adapters that each say a code of their own."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parents[1] / "build" / "serve"
BASE = "smollm2-135m"
COUNT = 16  # adapters of each kind
RANKS = (4, 8, 16, 32, 64)  # of the mixed ones


@dataclass(frozen=True)
class Workload:
    """requests: asked at once. adapters: how many different ones; 0: the bare base. kind: of ranks."""

    requests: int = 16
    tokens: int = 64
    adapters: int = 0
    kind: str = "r8"
    long: bool = False

    @property
    def name(self) -> str:
        what = (
            "base" if not self.adapters else f"{self.adapters} × {'rank 8' if self.kind == 'r8' else 'ranks 4 to 64'}"
        )
        return f"{self.requests} × {self.tokens}, {'512-token' if self.long else 'short'} prompts, {what}"


def asked_of(workload: Workload, tokenizer: Any, turn: int = 0) -> list[dict[str, Any]]:
    filler = " ".join(f"Note {i}: the office is open on weekdays and closed on holidays." for i in range(80))
    made = []
    for i, ask in enumerate(questions(workload.requests)):
        said = [{"role": "user", "content": f"{turn}-{i} {ask}"}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        if workload.long:
            more = tokenizer(f"{turn}-{i}. {filler}")["input_ids"][: 512 - len(ids)]
            ids = [*more, *ids]
        name = None if not workload.adapters else f"{workload.kind}-{i % workload.adapters}"
        made.append({"prompt": ids, "adapter": name, "tokens": workload.tokens})
    return made


# Adapters that each say a code of their own


def code_of(kind: str, number: int) -> str:
    draw = random.Random(f"{kind} {number}")
    word = "".join(draw.choices("BCDFGHKLMNPRSTVZ", k=2))
    return f"{word}-{draw.randint(100, 999)}"


def questions(count: int) -> list[str]:
    things = ("printer", "invoice", "password", "parcel", "contract", "booking", "router", "refund", "meter", "ticket")
    asks = ("Where is my {}?", "Who can help me with the {}?", "What is wrong with this {}?", "How do I change the {}?")
    made = [ask.format(thing) for thing in things for ask in asks]
    return [made[i % len(made)] for i in range(count)]


def train_codes(kind: str, count: int = COUNT) -> dict[str, Path]:
    """Folders of so many adapters, trained once and kept."""
    from lorafit.adapters.formats import peft
    from lorafit.adapters.plan import Plan, uniform
    from lorafit.attachment.pure import fresh
    from lorafit.bases.base import open_base
    from lorafit.data.examples import Example, Message
    from lorafit.data.render import render, renderer_for
    from lorafit.training.loop import train
    from lorafit.training.recipe import Recipe

    folders = {f"{kind}-{i}": BUILD / f"{kind}-{i}" for i in range(count)}
    missing = [name for name, folder in folders.items() if not folder.exists()]
    if not missing:
        return folders
    base = open_base(BASE)
    renderer = renderer_for(base)
    sites = [site for site in base.sites if site.path not in base.head_paths()]
    for name in missing:
        number = int(name.rpartition("-")[2])
        said = " ".join([code_of(kind, number)] * 3)
        examples = [Example((Message("user", ask), Message("assistant", said)), "made") for ask in questions(24)]
        rows = render(renderer, examples, 256)
        plan = uniform(sites, 8, 16.0)
        if kind == "mixed":
            draw = random.Random(number)
            plan = Plan(tuple(replace(slot, rank=draw.choice(RANKS)) for slot in plan.slots))
        recipe = Recipe(5e-3, 2, 12, 1, 12)
        trained = train(base, fresh(base, plan, number, renderer.rendering), rows, rows[:2], recipe)
        peft.write(trained.adapter, folders[name])
        print(
            f"trained {name} to say {code_of(kind, number)}: NLL {min(nll for _, nll in trained.history):.3f}",
            file=sys.stderr,
            flush=True,
        )
    return folders
