"""Estimates the memory of a run, and chooses settings with which it fits.

Most of it are the activations that a forward keeps for its backward. They grow with the tokens in a micro-batch; they
are measured in three tiny forwards, and the rest is computed. An allocator takes more memory than is requested, by an
amount that depends on the base and hardly on the batch; it is measured in a small step. Sizes are in bytes; 1 GB is 10⁹
bytes.
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
from lorafit.planning.rules import Decision, hidden_size, with_choice
from lorafit.settings import bytes_of
from lorafit.tasks.runner import EVALUATION_TOKENS, Runner
from lorafit.tasks.task import ForwardMode
from lorafit.training.recipe import Recipe

PROBED = 64  # tokens of the largest tiny forward
LONG = SHORT + 32  # the length of a row whose attention is computed in the other way (`attachment.packing`)
# Bytes per parameter of the state, in fp32: the master, its gradient and the sum of gradients, AdamW's two moments, the
# best state, the initial state; and two for temporary values of the optimizer.
STATE = 9 * 4
MEASURED = 160  # tokens of the step in which the allocator's overhead is measured
MEASURED_AGAIN = 640  # and of a second one if blocks are recomputed, because gaps between their inputs grow
SLACK = 0.05  # the least overhead of the allocator, as a share
FEWEST_PLAIN = 256  # with fewer tokens per micro-batch, recomputing blocks costs less time than smaller micro-batches
MARGIN = 1.15  # the factor on an estimate that must stay under a limit
USABLE = 0.9  # the share of the free memory that a run uses if no limit is set


@dataclass(frozen=True)
class Footprint:
    """The memory of a base with an adapter in training, in bytes.

    Args:
        state: Independent of the batch.
        token: Activations kept for the backward, per token.
        pair: Activations kept for the backward, per pair of tokens in one product of attention.
        long_token: Activations kept per token of a row longer than SHORT, if rows are packed.
        block_input: The inputs of one token to all blocks, from the lowest block with a site on.
        blocks: The number of these blocks; 0 if none can be recomputed.
        working: Temporary values per token while its gradient is computed.
        looking: Temporary values per token of a validation or a test.
        logits: The logits of one trained token.
        most_logits: The most logits that are held at a time.
        lost: The allocator's overhead beyond SLACK, independent of the batch.
        lost_token: The allocator's overhead beyond SLACK, per token.
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
        """The bytes of one micro-batch, without the state.

        Args:
            lengths: The lengths of its rows, in tokens.
            trained: The number of its trained tokens.
            mode: How the base is run.
            recompute: Whether blocks are recomputed.
        """
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
    """Measures by how much the memory in use has grown, at most, since it was last set to zero."""

    def zero(self) -> None: ...
    def grown(self) -> int: ...


def with_losses(look: Footprint, runner: Runner, adapter: Adapter, rows: Sequence[Row], gauge: Gauge) -> Footprint:
    """Add the allocator's overhead, measured in a step of a few rows of median length.

    Args:
        look: The footprint without it.
        runner: Runs the base.
        adapter: The adapter that is trained.
        rows: The training rows.
        gauge: Measures the memory of the process.
    """
    state, recompute = TrainState(adapter, runner.base.device), runner.recompute
    median = sorted(len(row.ids) for row in rows)[len(rows) // 2]
    gradients = 2 * 4 * adapter.plan.parameters  # of the factors, separate and joined; counted in `state` already
    lost: dict[int, float] = {}
    with runner.training(state):
        runner.gradient_of(_probes(runner, rows, [median // 2 + 2]))
        for size in (MEASURED, MEASURED_AGAIN) if recompute else (MEASURED,):
            lengths = [min(median, size)] * max(1, size // median)
            batch = runner.batch(_probes(runner, rows, lengths))
            gauge.zero()
            for _ in range(2):  # the second time, freed memory is divided differently
                runner.gradient([batch])
            known = look.of(lengths, batch.n_trained, runner.mode, recompute)
            lost[sum(lengths)] = max(0.0, gauge.grown() - known - gradients)
    (few, overhead), (many, larger) = min(lost.items()), max(lost.items())
    per_token = max(0.0, (larger - overhead) / (many - few)) if many > few else 0.0
    return replace(look, lost=max(0.0, overhead - per_token * few), lost_token=per_token)


def footprint(runner: Runner, adapter: Adapter, rows: Sequence[Row], dropout: float = 0.0) -> Footprint:
    """Measure what a base with an adapter holds in training.

    Three forwards (one short row, four short rows, and one row that is four times as long) give three unknowns: the
    bytes per token, per pair of tokens, and per forward.

    Args:
        runner: Runs the base.
        adapter: The adapter that is trained.
        rows: The training rows.
        dropout: The dropout of the adapter.
    """
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
    """The bytes that a forward up to the head keeps for its backward. Every storage counts once; weights do not.

    Args:
        runner: Runs the base.
        state: The training state, which is attached.
        rows: The rows from which the probes are made.
        lengths: The lengths of the rows in the forward.
    """
    model = runner.base.model
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), state.master)}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()  # a reference is held, so that its address is not used again
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):  # type: ignore[arg-type, return-value]
        runner.body(_probes(runner, rows, lengths))
    return float(sum(storage.nbytes() for storage in found.values()))


@dataclass(frozen=True)
class Work:
    """The work of a run.

    Args:
        runner: Runs the base.
        rows: The rows by split.
        steps: The positions of the training rows in every step.
    """

    runner: Runner
    rows: dict[str, list[Row]]
    steps: Sequence[Sequence[int]]


def peak(look: Footprint, work: Work, recipe: Recipe) -> float:
    """The most bytes that a run holds beyond those of the process before it: in its largest micro-batch, or when it
    scores."""
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
    """An upper bound on the tokens of a prompt of test or validation with its answer.

    Args:
        base: The base, whose context limits them.
        rows: The rows by split.
        shots: The number of examples in a few-shot prompt.
    """
    held_out = [*rows["test"], *rows["valid"]]
    answer = answer_tokens(held_out)
    prompt = max(len(row.ids) for row in held_out)
    whole = prompt + shots * max(len(row.ids) for row in rows["train"]) + answer
    return whole if base.context is None else min(whole, base.context)


def steps_of(rows: Sequence[Row], recipe: Recipe, fixed: bool, packed: bool) -> list[list[int]]:
    """The row positions of every step of a run. fixed, packed: see `epoch_order`."""
    steps: list[list[int]] = []
    for epoch in range(-(-recipe.steps * recipe.batch_size // len(rows)) + 1):
        steps += epoch_order(rows, recipe.batch_size, recipe.seed, epoch, fixed, packed)
    return steps[: recipe.steps]


def _by_memory(recipe: Recipe, blocks: int) -> Iterable[Recipe]:
    """The recipe with settings that need less and less memory, and more and more time."""
    sizes = [recipe.micro_tokens >> k for k in range(recipe.micro_tokens.bit_length())]
    for recompute in (False, True) if blocks else (False,):
        for size in sizes:
            if recompute or size >= FEWEST_PLAIN or not blocks:
                yield replace(recipe, micro_tokens=size, recompute=recompute)


Look = Callable[[bool], Footprint]  # (whether blocks are recomputed) -> the footprint
Answering = Callable[[int | None], int]  # (the bytes that decoding may take, or None) -> the bytes that it takes


@dataclass(frozen=True)
class Room:
    """The memory that is in use and free.

    Args:
        held: The bytes that this process holds now.
        free: The bytes that are free on the machine; None if it does not report them.
    """

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
    """Choose the size of the micro-batches, and whether blocks are recomputed, so that the run fits into memory from
    its beginning to the last answer of the evaluation.

    Args:
        decision: The decision so far.
        work: The work of the run.
        look: Gives the footprint.
        answering: Gives the memory of decoding.
        room: The memory of the machine.
        memory: The limit that the user set, such as 4GB; None to use what is free.

    Returns:
        The decision with these settings, and an estimate of the most bytes that the process will hold.

    Raises:
        SettingsError: If a limit is set, and no setting fits.
    """
    limit = bytes_of(memory) if memory else None
    bound = limit if limit is not None else None if room.free is None else room.held + USABLE * room.free
    left = None if bound is None else max(0, int((bound - room.held) / MARGIN))
    recipe, least = decision.recipe, float("inf")
    for tried in _by_memory(recipe, look(False).blocks):
        training = peak(look(tried.recompute), work, tried)
        needed = room.held + max(training, answering(left))
        above = max(training, answering(0))
        least = min(least, room.held + MARGIN * above)
        if bound is None or room.held + MARGIN * above <= bound:
            return _with(decision, tried, needed, _reason(recipe, tried, memory)), round(needed)
    if limit is None:
        reason = "more than is free on this machine, even with the settings that need least"
        return _with(decision, tried, needed, reason), round(needed)
    raise SettingsError(
        f"--memory {memory}: too little: with the settings that need least, this run takes {_up(least)}, of which "
        f"{_up(room.held)} are in use once the base is open: raise it to {_up(least)}, leave out the longest examples, "
        "or choose a smaller base"
    )


def as_begun(decision: Decision, micro_tokens: int, recompute: bool) -> Decision:
    """The decision of a resumed run, with the settings that it began with, so that it ends with the same result."""
    recipe = replace(decision.recipe, micro_tokens=micro_tokens, recompute=recompute)
    return _with(decision, recipe, None, "as when it began")


def _with(decision: Decision, recipe: Recipe, needed: float | None, reason: str) -> Decision:
    recomputed = ", blocks recomputed" if recipe.recompute else ""
    most = "" if needed is None else f"at most about {needed / 1e9:.1f} GB, "
    value = f"{most}{recipe.micro_tokens:,} tokens at a time{recomputed}"
    return with_choice(replace(decision, recipe=recipe), "memory", value, reason, "--memory")


def _reason(asked: Recipe, taken: Recipe, memory: str | None) -> str:
    fits = f"stays under the {memory} you set" if memory else "fits into the memory that is free"
    if taken == asked:
        return fits if memory else f"the default; it {fits}"
    return f"{fits}, at the price of speed"


def _up(size: float) -> str:
    """A size as --memory takes it, rounded up."""
    return f"{-(-size // 1e7) / 100:.2f}GB"
