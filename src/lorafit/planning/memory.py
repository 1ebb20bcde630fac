"""What a run holds in memory, estimated from a look at the base, and the settings under which it holds less.

What a forward keeps for its backward is most of it, and grows with the tokens that are run at a time: three tiny
forwards are watched, the rest is arithmetic. An allocator takes more than it is asked for, by an amount that hardly
depends on how much is run but much on the base: that is measured on a small step. Bytes throughout, GB are 10⁹.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.state import TrainState
from lorafit.attachment.blocks import blocks_below, blocks_of
from lorafit.attachment.packing import SHORT
from lorafit.bases.base import Base
from lorafit.data.batches import epoch_order
from lorafit.data.render import Row
from lorafit.errors import SettingsError
from lorafit.evaluation.compare import answer_tokens
from lorafit.planning.rules import Decision, hidden_size, told
from lorafit.settings import bytes_of
from lorafit.tasks.runner import EVALUATION_TOKENS, Runner
from lorafit.tasks.task import ForwardMode
from lorafit.training.recipe import Recipe

PROBED = 64  # tokens of the largest tiny forward
LONG = SHORT + 32  # a row whose attention goes another way
# The state in fp32: master, its gradient and the one being summed, two moments, the best, the start; and two for what
# the optimizer needs beside them.
STATE = 9 * 4
MEASURED = 160  # tokens of the step that shows what the allocator takes
TWICE_MEASURED = 640  # and of a second one where blocks are computed twice: holes between their inputs grow with them
SLACK = 0.05  # it takes at least this share more
FEWEST_PLAIN = 256  # tokens at a time below which computing blocks twice costs less than more forwards do
MARGIN = 1.15  # over what is foretold, where it must stay under a limit
USABLE = 0.9  # share of the free memory that is taken by rule


@dataclass(frozen=True)
class Footprint:
    """What a base with an adapter holds while it trains, in bytes.

    state: whatever is in a batch. token, pair: kept for the backward for each token, and for each pair of tokens in one
    product of attention; long_token: for each token of a row that is longer than SHORT, where rows are packed.
    block_input: of one token, of all blocks from the lowest with a site on; blocks: how many these are, 0 where none
    can be computed twice. working: for each token, while its gradient is computed. looking: for each token of a
    validation or a test. logits: for each trained token;
    most_logits: the most of these held at a time. lost: what the allocator takes beside all that and SLACK, whatever is
    in a batch; lost_token: for each token.
    """

    state: float
    token: float
    pair: float
    long_token: float
    block_input: float
    blocks: int
    working: float
    looking: float
    logits: float
    most_logits: float
    lost: float = 0.0
    lost_token: float = 0.0

    def of(self, lengths: Sequence[int], trained: int, mode: ForwardMode, recompute: bool) -> float:
        """Of one micro-batch of rows of these lengths."""
        widths = lengths if mode.packed else [max(lengths)] * len(lengths)
        tokens = sum(widths)
        kept = sum(
            self.long_token * n if mode.packed and n > SHORT else self.token * n + self.pair * n * n for n in widths
        )
        if recompute:
            kept = self.block_input * tokens + kept / self.blocks
        logits = self.logits * (trained if mode.separate_head else tokens)
        return (
            (1 + SLACK) * (kept + self.working * tokens + min(self.most_logits, logits))
            + self.lost
            + (self.lost_token * tokens)
        )


class Gauge(Protocol):
    """Shows how much more memory was held, at most, since it was last set to zero."""

    def zero(self) -> None: ...
    def grown(self) -> int: ...


def with_losses(look: Footprint, runner: Runner, adapter: Adapter, rows: Sequence[Row], gauge: Gauge) -> Footprint:
    """What the allocator takes beside what it is asked for, measured on a step of a few rows of middling length."""
    state, recompute = TrainState(adapter, runner.base.device), runner.recompute
    middle = sorted(len(row.ids) for row in rows)[len(rows) // 2]
    gathering = 2 * 4 * adapter.plan.parameters  # the gradient of the factors, apart and as one; in `state`
    lost: dict[int, float] = {}
    with runner.training(state):
        runner.gradient_of(_probes(runner, rows, [middle // 2 + 2]))
        for size in (MEASURED, TWICE_MEASURED) if recompute else (MEASURED,):
            lengths = [min(middle, size)] * max(1, size // middle)
            batch = runner.batch(_probes(runner, rows, lengths))
            gauge.zero()
            for _ in range(2):  # what is freed comes back in other pieces
                runner.gradient([batch])
            known = look.of(lengths, batch.n_trained, runner.mode, recompute)
            lost[sum(lengths)] = max(0.0, gauge.grown() - known - gathering)
    (least, constant), (most, larger) = min(lost.items()), max(lost.items())
    each = max(0.0, (larger - constant) / (most - least)) if most > least else 0.0
    return replace(look, lost=max(0.0, constant - each * least), lost_token=each)


def footprint(runner: Runner, adapter: Adapter, rows: Sequence[Row], dropout: float = 0.0) -> Footprint:
    """Look at forwards of one short row, of four such, and of one four times as long: three unknowns."""
    base, mode = runner.base, runner.mode
    state = TrainState(adapter, base.device, dropout)
    size = base.dtype.itemsize
    long = min(PROBED, base.context or PROBED) // 8 * 8
    short = long // 4
    with replace(runner, recompute=False).training(state):
        one, four, whole = (kept(runner, state, rows, each) for each in ([short], [short] * 4, [long]))
        pair = max(0.0, (whole - four) / (12 * short**2))
        token = max(0.0, (four - one) / (3 * short) - short * pair)
        fixed = max(0.0, one - short * token - short**2 * pair)
        long_token = token
        if mode.packed and max(len(row.ids) for row in rows) > SHORT:
            long_token = (kept(runner, state, rows, [LONG]) - fixed) / LONG
    hidden, blocks = hidden_size(base), len(blocks_of(base)) - blocks_below(base, adapter.plan)
    words = _vocabulary(base)
    return Footprint(
        state=STATE * adapter.plan.parameters + fixed,
        token=token,
        pair=pair,
        long_token=long_token,
        block_input=blocks * hidden * size,
        blocks=blocks,
        working=size * (3 * base.widest + 6 * hidden),
        looking=size * (4 * base.widest + 6 * hidden),
        logits=words * (8 + (size if size < 4 else 0)),
        most_logits=(runner.task.logits_at_a_time or 0) * (8 + 2 * (size if size < 4 else 0))
        if mode.separate_head
        else float("inf"),
    )


def _vocabulary(base: Base) -> int:
    weights = [getattr(base.model.get_submodule(path), "weight", None) for path in base.head_paths()]
    return max((len(weight) for weight in weights if weight is not None), default=0)


def _probes(runner: Runner, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
    return runner.task.probes(rows[:64], lengths)


def kept(runner: Runner, state: TrainState, rows: Sequence[Row], lengths: Sequence[int]) -> float:
    """Bytes that a forward keeps for its backward up to the head: every storage once, without the weights."""
    model = runner.base.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), state.master)}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()  # held, so that no other takes its place
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):  # type: ignore[arg-type, return-value]
        runner.body(_probes(runner, rows, lengths))
    return float(sum(storage.nbytes() for storage in found.values()))


@dataclass(frozen=True)
class Work:
    """What a run computes: rows by split, and the positions of the training rows in every step."""

    runner: Runner
    rows: dict[str, list[Row]]
    steps: Sequence[Sequence[int]]


def peak(look: Footprint, work: Work, recipe: Recipe) -> float:
    """The most a run holds above what the process holds before it: in its largest micro-batch, or where it scores."""
    rows, train, runner = work.rows, work.rows["train"], work.runner.within(recipe.micro_tokens, recipe.recompute)
    largest = max(
        look.of([len(train[i].ids) for i in part], sum(train[i].n_trained for i in part), runner.mode, recipe.recompute)
        for step in work.steps
        for part in runner.parts(train, step)
    )
    seen = max(EVALUATION_TOKENS, *(len(row.ids) for name in ("valid", "test") for row in rows[name]))
    looking = look.looking * seen + min(look.most_logits, look.logits * seen)
    return look.state + max(largest, (1 + SLACK) * looking)


def room_to_answer(base: Base, rows: dict[str, list[Row]], shots: int) -> int:
    """Tokens of the longest prompt of test or validation with its answer, where so many examples are given in it, at
    most."""
    held_out = [*rows["test"], *rows["valid"]]
    answer = answer_tokens(held_out)
    prompt = max(len(row.ids) for row in held_out)
    whole = prompt + shots * max(len(row.ids) for row in rows["train"]) + answer
    return whole if base.context is None else min(whole, base.context)


def steps_of(rows: Sequence[Row], recipe: Recipe, fixed: bool, packed: bool) -> list[list[int]]:
    """The row positions of every step of a run. fixed, packed: as `epoch_order` takes them."""
    steps: list[list[int]] = []
    for epoch in range(-(-recipe.steps * recipe.batch_size // len(rows)) + 1):
        steps += epoch_order(rows, recipe.batch_size, recipe.seed, epoch, fixed, packed)
    return steps[: recipe.steps]


def _thriftier(recipe: Recipe, blocks: int) -> Iterable[Recipe]:
    """Recipes that hold less and less, each slower than the one before it."""
    sizes = [recipe.micro_tokens >> k for k in range(recipe.micro_tokens.bit_length())]
    for recompute in (False, True) if blocks else (False,):
        for size in sizes:
            if recompute or size >= FEWEST_PLAIN or not blocks:
                yield replace(recipe, micro_tokens=size, recompute=recompute)


Look = Callable[[bool], Footprint]  # whether blocks are computed twice → what is held then
Answering = Callable[[int | None], int]  # bytes that decoding may take, None where there is no limit → what it takes


@dataclass(frozen=True)
class Room:
    """held: bytes of this process as it stands; free: of the machine beside them, None where it does not tell."""

    held: int
    free: int | None


def fit(
    decision: Decision,
    work: Work,
    look: Look,
    answering: Answering,
    room: Room,
    memory: str | None,
) -> tuple[Decision, int]:
    """The decision with how much is run at a time, chosen so that the process stays under `memory`, or by rule under
    what is free here, from opening to the last answer of the evaluation; and the bytes it will hold at most. Raises
    SettingsError where even the least is too much."""
    limit = bytes_of(memory) if memory else None
    bound = limit if limit is not None else None if room.free is None else room.held + USABLE * room.free
    left = None if bound is None else max(0, int((bound - room.held) / MARGIN))
    recipe, least = decision.recipe, float("inf")
    for tried in _thriftier(recipe, look(False).blocks):
        training = peak(look(tried.recompute), work, tried)
        needed = room.held + max(training, answering(left))
        above = max(training, answering(0))
        least = min(least, room.held + MARGIN * above)
        if bound is None or room.held + MARGIN * above <= bound:
            return _with(decision, tried, needed, _reason(recipe, tried, memory)), round(needed)
    if limit is None:
        return _with(decision, tried, needed, "more than is free here, even at its thriftiest"), round(needed)
    raise SettingsError(
        f"--memory {memory}: too little: at its thriftiest this run holds {_up(least)}, of which {_up(room.held)} with "
        "the base alone: raise it to that, leave out the longest examples, or choose a smaller base"
    )


def as_begun(decision: Decision, micro_tokens: int, recompute: bool) -> Decision:
    """The decision with what a run that is gone on with ran at a time: it must end as it would have."""
    recipe = replace(decision.recipe, micro_tokens=micro_tokens, recompute=recompute)
    return _with(decision, recipe, None, "as when it began")


def _with(decision: Decision, recipe: Recipe, needed: float | None, reason: str) -> Decision:
    twice = ", blocks computed twice" if recipe.recompute else ""
    most = "" if needed is None else f"at most about {needed / 1e9:.1f} GB, "
    value = f"{most}{recipe.micro_tokens:,} tokens at a time{twice}"
    return told(replace(decision, recipe=recipe), "memory", value, reason, "--memory")


def _reason(asked: Recipe, taken: Recipe, memory: str | None) -> str:
    under = f"stays under the {memory} you set" if memory else "fits into what is free here"
    if taken == asked:
        return under if memory else "the default; it fits into the memory that is free"
    return f"{under}, at the price of time"


def _up(size: float) -> str:
    """A size as --memory takes it, rounded up."""
    return f"{-(-size // 1e7) / 100:.2f}GB"
