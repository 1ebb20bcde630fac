"""The training loop: a fresh adapter and rows go in; the best adapter by validation comes out.

Read `examples/training_loop.py` first: it is the same loop in plain PyTorch.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.state import TrainState
from lorafit.attachment.checks import require_bare
from lorafit.bases.base import Base
from lorafit.data.batches import ORDER, epoch_order
from lorafit.data.render import Row
from lorafit.data.split import seed_of
from lorafit.digests import canonical, digest_of, digest_of_format_1
from lorafit.errors import AdapterError, AttachError, BaseError, DivergedError, Interrupted, RunError
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.runner import Runner, means, require_finite
from lorafit.training import optimizer as adamw
from lorafit.training.checkpoint import Progress
from lorafit.training.interrupt import interruptible
from lorafit.training.journal import Journal
from lorafit.training.processes import ALONE, Processes
from lorafit.training.recipe import Recipe
from lorafit.training.trunk import Trunk, room_for

RESUME_HINT = "repeat the command with --resume"
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Moment:
    """The measurements after a step or a validation. NLL is in nats per token; None if it was not measured."""

    step: int
    steps: int
    train_nll: float | None
    valid_nll: float | None
    learning_rate: float
    seconds_left: float
    tokens_per_second: float


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Args:
        adapter: The best adapter by validation.
        history: (step, mean validation NLL) of every validation.
        best_step: The step of that adapter.
        each: Validation NLL of every example under that adapter.
        steps: Steps that were done.
        seconds: The time of steps, validations and checkpoints.
        tokens: Tokens of the steps, without padding.
        trained_tokens: Those of them that count in the loss.
        tokens_per_second: The speed of the steps only.
    """

    adapter: Adapter
    history: tuple[tuple[int, float], ...]
    best_step: int
    each: tuple[float, ...]
    steps: int
    seconds: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float


class Options(TypedDict, total=False):
    """Optional arguments of `train` and `train_steps`.

    folder: The folder for checkpoints and metrics.jsonl; None to write nothing.
    resume: Continue from the folder's last checkpoint; the result is bit-identical to that of a run which never
        stopped.
    runner: How the base is run; by default this is measured on the rows.
    known: Validation NLL of every example before the first step, if it has been measured.
    watch: Called during a validation with the number of rows that are done, and of all rows.
    processes: The processes of the run. Each makes the same call and gets the same result; only the first writes into
        the folder. If one of them ends, the first saves the last whole step, and all others raise Interrupted.
    trunk_bytes: The most bytes of the lowest blocks' outputs that are kept on disk, if the plan adapts none of these
        blocks and the family allows it. This saves time and changes no bit.
    trunk_in: Another folder for these outputs, in which they stay for further trainings on the same rows.
    """

    folder: str | Path | None
    resume: bool
    runner: Runner | None
    known: Sequence[float] | None
    watch: Watch
    processes: Processes
    trunk_bytes: int
    trunk_in: str | Path | None


def train(
    base: Base,
    adapter: Adapter,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row],
    recipe: Recipe,
    *,
    tell: Callable[[Moment], None] = lambda moment: None,
    **options: Unpack[Options],
) -> Trained:
    """Train a fresh adapter; returns the best one by mean validation NLL per example. The base is not changed.

    The first Ctrl-C (or SIGTERM, SIGHUP) saves and stops after the step in progress; a second one stops at once.

    Args:
        base: The base, with nothing attached.
        adapter: The adapter from which training starts.
        train_rows: The rows to train on.
        valid_rows: The rows by which the best adapter is chosen.
        recipe: The numbers of the training.
        tell: Called after every step and validation.
        options: See `Options`. With these it has more than six parameters; they are optional and set by name.

    Raises:
        DivergedError: The loss is no longer a number, or rises.
        Interrupted: It was stopped, and saved if it has a folder.
    """
    processes = options.get("processes", ALONE)
    with interruptible(processes.count > 1) as stop:
        loop = _Loop(base, adapter, train_rows, valid_rows, recipe, stop, **options)
        with loop.attached():
            steps = loop.steps()
            while True:
                try:
                    tell(next(steps))
                except StopIteration as end:
                    result: Trained = end.value
                    return result


def train_steps(
    base: Base,
    adapter: Adapter,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row],
    recipe: Recipe,
    **options: Unpack[Options],
) -> Generator[Moment, None, Trained]:
    """`train` as a generator: yields after every step and validation, and returns the result of `train`.

    Between the steps nothing is attached to the base, so that other code may use it. No signal is caught; `close()`
    saves if there is a folder.
    """
    loop = _Loop(base, adapter, train_rows, valid_rows, recipe, threading.Event(), **options)
    steps = loop.steps()
    while True:
        try:
            with loop.attached():
                try:
                    moment = next(steps)
                except StopIteration as end:
                    result: Trained = end.value
                    return result
        except AttachError:  # other code has attached something to the base
            loop.save()
            raise
        try:
            yield moment
        except GeneratorExit:
            loop.save()
            raise


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """Make torch use deterministic algorithms on a GPU. It warns about operations that have none."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Loop:
    """One training; `steps` runs inside `attached`. It has more than six parameters: those of `train`, and `stop`, the
    event that stops it."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        train_rows: Sequence[Row],
        valid_rows: Sequence[Row],
        recipe: Recipe,
        stop: threading.Event,
        *,
        folder: str | Path | None = None,
        resume: bool = False,
        runner: Runner | None = None,
        known: Sequence[float] | None = None,
        watch: Watch = lambda done, of: None,
        processes: Processes = ALONE,
        trunk_bytes: int = 0,
        trunk_in: str | Path | None = None,
    ):
        processes.require_work(recipe.batch_size)
        require_bare(base)
        folder, trunk_in = (None if path is None else Path(path) for path in (folder, trunk_in))
        self.base, self.rows, self.valid_rows, self.recipe = base, train_rows, valid_rows, recipe
        self.stop, self.resume, self.known, self.watch, self.processes = stop, resume, known, watch, processes
        if adapter.classes is not None and runner is None:
            raise AdapterError(
                "this adapter is a classifier: give train a runner of its task, Runner.of(base, rows, task)"
            )
        self.runner = (runner or Runner.of(base, train_rows)).within(recipe.micro_tokens, recipe.recompute)
        self.others_stop = False
        self.each: tuple[float, ...] | None = None  # of the best adapter; None if that is from before a resume
        self.state = TrainState(adapter, base.device, recipe.dropout)
        self.optimizer = adamw.make_optimizer(self.state)
        self.at = Progress(0, [], self.state.master.detach().clone(), 0.0, 0.0, 0, 0)
        self.one_validation = 0.0
        # The trunk, the cached hidden states of the lowest blocks, needs the same packs in every epoch.
        self.blocks = self.runner.free_blocks(adapter.plan)
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.trunk_bytes, self.trunk_in, self.shares_trunk = trunk_bytes, trunk_in or folder, trunk_in is not None
        self.trunk: Trunk | None = None
        self.identity = self._identity(adapter)
        self.journal = Journal(folder, processes.first, self.identity)

    def _identity(self, adapter: Adapter) -> dict[str, Any]:
        """Everything that the bits of the result depend on."""
        mode, task = self.runner.mode, self.runner.task
        return {
            **({} if task == COMPLETION else {"task": canonical(task)}),
            "base": self.base.identity,
            "trainable": f"{adapter.plan.parameters} parameters on {len(adapter.plan.slots)} sites",
            "start": adapter.digest(),
            "rows": digest_of(self._rows_of_run()),
            "recipe": asdict(self.recipe),
            "way": {"apart": mode.separate_head, "packed": mode.packed},
            "order": ORDER,
            "dtype": str(self.base.dtype),
            "device": self.base.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": torch.__version__,
        }

    def _rows_of_run(self) -> tuple[list[Row], list[Row]]:
        return list(self.rows), list(self.valid_rows)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the trained factors for the length of the block, with deterministic algorithms."""
        with same_bits(self.base.device), self.runner.training(self.state):
            yield

    def steps(self) -> Generator[Moment, None, Trained]:
        """Train to the end; yields a `Moment` after every step and validation."""
        try:
            self._begin()
            result: Trained = yield from self._to_the_end()
            return result
        except (DivergedError, AdapterError, BaseError):  # the training failed and cannot be resumed
            self._end_trunk()
            raise

    def _begin(self) -> None:
        if self.resume:
            older = {"rows": digest_of_format_1(self._rows_of_run())}
            self.at = self.journal.restore(self.state, self.optimizer, older) or self.at
        self._require_alike()
        self.journal.trim(self.at)
        with torch.no_grad():  # finds the sites that share their input, so that a resumed run computes the same bits
            self.runner.task.nll(self.base, self.runner.batch(self.rows[:1]), self.runner.mode)
        read_again = self.shares_trunk or self.recipe.steps > self._per_epoch()
        if self.trunk_in and self.trunk_bytes and self.blocks and read_again:
            self.trunk = self._keep_trunk(self.trunk_in)

    def _to_the_end(self) -> Generator[Moment, None, Trained]:
        recipe, at = self.recipe, self.at
        try:
            while True:
                due = at.step % recipe.validate_every == 0 or at.step in (recipe.early, recipe.steps)
                if due and (not at.history or at.history[-1][0] < at.step):
                    yield self._validated()
                if at.step == recipe.steps or self._stale() >= recipe.patience:
                    break
                yield self._stepped()
                if self.others_stop or (self.stop.is_set() and self.processes.count == 1):
                    raise _Stopped
                self.journal.save_if_cheap(self.state, self.optimizer, at)
        except (_Stopped, Interrupted) as why:
            self.save()
            where = f"stopped after step {at.step} of {recipe.steps}"
            if isinstance(why, Interrupted):
                where = f"another process of the run has ended, {where}"
            if self.journal.checkpoint is None:
                raise Interrupted(f"{where}, nothing was saved: give train a folder to resume from") from None
            raise Interrupted(f"{where}: {RESUME_HINT}") from None
        return self._trained()

    def save(self) -> None:
        """Replace the checkpoint if there is a folder."""
        self.journal.save(self.state, self.optimizer, self.at)

    def _require_alike(self) -> None:
        """Raise RunError if the processes differ in their inputs. It waits until all have read the folder, so that none
        writes what another is still reading."""
        master = hashlib.sha256(self.state.master.detach().cpu().numpy().tobytes()).hexdigest()
        if odd := self.processes.differing({**self.identity, "step": self.at.step, "master": master}):
            raise RunError(f"the processes of this run differ in {', '.join(odd)}: give all of them the same files")

    def _stepped(self) -> Moment:
        recipe, at, runner = self.recipe, self.at, self.runner
        start = time.monotonic()
        epoch, index = divmod(at.step, self._per_epoch())
        if self.order[0] != epoch:
            self.order = (epoch, self._order(epoch))
        positions = self.order[1][index]
        batches = [self._batch(part) for part in self._parts(positions)]
        rank = (self.processes.rank,) if self.processes.count > 1 else ()
        torch.manual_seed(seed_of(recipe.seed, "step", at.step, *rank))  # dropout: the same whether resumed or not
        self.state.training = True
        nll = self._joined(runner.gradient(batches, sum(runner.task.weight(self.rows[i]) for i in positions)))
        rate = adamw.rate_at(at.step, recipe.steps, recipe.warmup, recipe.learning_rate)
        norm = adamw.step(self.state, self.optimizer, rate, recipe.weight_decay, recipe.clip)
        if at.step == 0 and norm == 0:
            raise AdapterError(
                "no factor receives a gradient at the first step, the adapter would learn nothing: "
                "choose sites on which the answer depends"
            )
        at.step += 1
        self._require_finite(nll + norm)
        if norm == 0 and nll > 1:  # weights so large that every answer is equally likely
            self._diverged("the gradient has vanished")
        at.seconds += time.monotonic() - start
        at.tokens += sum(len(self.rows[i].ids) for i in positions)
        at.trained += sum(self.rows[i].n_trained for i in positions)
        return self._moment(nll, None, rate)

    def _parts(self, positions: Sequence[int]) -> list[list[int]]:
        """This process's share of a step, in micro-batches."""
        mine = [positions[i] for i in self.processes.share([len(self.rows[i].ids) for i in positions])]
        return self.runner.parts(self.rows, mine)

    def _batch(self, part: Sequence[int]) -> Any:
        batch = self.runner.batch([self.rows[i] for i in part])
        return self.trunk.begin(batch, part) if self.trunk else batch

    def _order(self, epoch: int) -> list[list[int]]:
        recipe = self.recipe
        packed = self.runner.mode.packed
        return epoch_order(self.rows, recipe.batch_size, recipe.seed, epoch, self.blocks > 0, packed)

    def _keep_trunk(self, folder: Path) -> Trunk:
        parts = [part for positions in self._order(0) for part in self._parts(positions)]
        packs = {tuple(part): self.runner.batch([self.rows[i] for i in part]).ids.numel() for part in parts}
        name = f"trunk-{self.processes.rank}"
        same = {key: self.identity[key] for key in ("way", "order", "dtype", "device", "threads", "torch")}
        same["rows"] = digest_of(list(self.rows))
        room = room_for(folder, self.trunk_bytes) // self.processes.count
        return Trunk(folder / name, self.runner, repr(same), packs, self.blocks, room)

    def _end_trunk(self) -> None:
        """Remove the trunk, unless other trainings may still read it."""
        if self.trunk and not self.shares_trunk:
            self.trunk.remove()

    def _joined(self, nll: float) -> float:
        """Sum gradient and loss over all processes in one all-reduce; returns the loss. Requests to stop are summed
        too, so that all processes stop after the same step."""
        if self.processes.count == 1:
            return nll
        master = self.state.master
        gradient = torch.zeros_like(master) if master.grad is None else master.grad
        whole = torch.cat([gradient.detach(), master.new_tensor([nll, self.stop.is_set()])])
        self.processes.sum(whole)
        master.grad = whole[:-2]
        self.others_stop = bool(whole[-1])
        return float(whole[-2])

    def _per_epoch(self) -> int:
        return -(-len(self.rows) // self.recipe.batch_size)

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            self._diverged("the loss or its gradient is no longer a number")

    def _diverged(self, what: str) -> None:
        lower = self.recipe.learning_rate / 3
        raise DivergedError(
            f"training diverged at step {self.at.step}: {what}: lower the learning rate, "
            f"e.g. --learning-rate {lower:.1e}, and name another --out"
        )

    def _validated(self) -> Moment:
        def watch(done: int, of: int) -> None:
            if self.stop.is_set():
                raise _Stopped
            if done < of:  # the end is reported with the result
                self.watch(done * len(self.valid_rows) // of, len(self.valid_rows))

        at, start = self.at, time.monotonic()
        self.state.training = False
        values = self.known if self.known and not at.history else self._measured(watch)
        nll = sum(values) / len(values)
        if not at.history:
            require_finite(self.base, values)
        self._require_finite(nll)
        if at.history and nll > 2 * at.history[0][1] + 1:
            self._diverged(f"validation NLL rose from {at.history[0][1]:.2f} to {nll:.2f}")
        if not at.history or nll < min(value for _, value in at.history):
            at.best, self.each = self.state.master.detach().clone(), tuple(values)
        at.history.append((at.step, nll))
        self.one_validation = time.monotonic() - start
        at.overhead += self.one_validation
        moment = self._moment(None, nll, 0.0)
        self.save()
        return moment

    def _measured(self, watch: Watch) -> list[float]:
        """NLL of every validation example; each process measures a share. If one process is stopped, all stop."""
        rows = self.valid_rows
        sums, stopped = [0.0] * (max(row.example for row in rows) + 1), False
        try:
            sums = self.runner.nll_sums(rows, self.processes.share([len(row.ids) for row in rows]), watch)
        except _Stopped:
            stopped = True
        whole = torch.tensor([*sums, stopped], dtype=torch.float64)
        self.processes.sum(whole)
        if whole[-1]:
            raise _Stopped
        return means(rows, whole[:-1].tolist())

    def _best(self) -> tuple[int, float]:
        return min(self.at.history, key=lambda entry: entry[1])

    def _stale(self) -> int:
        """Validations since the best one. The early one does not count, because the rate is still rising then."""
        return sum(step > self._best()[0] for step, _ in self.at.history if step != self.recipe.early)

    def _moment(self, train_nll: float | None, valid_nll: float | None, rate: float) -> Moment:
        at = self.at
        steps = self.recipe.steps - at.step
        validations = self.recipe.validations_after(at.step)
        left = steps * at.seconds / at.step + validations * self.one_validation if at.step else math.nan
        speed = at.tokens / at.seconds if at.seconds else 0.0
        self.journal.note(at, train_nll, valid_nll, rate)
        return Moment(at.step, self.recipe.steps, train_nll, valid_nll, rate, left, speed)

    def _trained(self) -> Trained:
        at = self.at
        self._end_trunk()
        self.state.load(at.best)
        self.state.training = False
        each = self.each or tuple(self._measured(lambda done, of: None))
        speed = at.tokens / at.seconds if at.seconds else 0.0
        return Trained(
            self.state.freeze(),
            tuple(at.history),
            self._best()[0],
            each,
            at.step,
            at.seconds + at.overhead,
            at.tokens,
            at.trained,
            speed,
        )


class _Stopped(Exception):
    """The training was asked to stop; caught in `_to_the_end`."""
