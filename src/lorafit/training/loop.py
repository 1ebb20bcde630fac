"""The training loop. `examples/training_loop.py` is the same in plain PyTorch, flat, to read first."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import free_blocks, recomputing
from lorafit.bases.base import Base
from lorafit.data.batches import ORDER, Batch, by_tokens, epoch_order
from lorafit.data.render import Row
from lorafit.data.split import seed_of
from lorafit.digests import digest_of, digest_of_format_1
from lorafit.errors import AdapterError, BaseError, DivergedError, Interrupted, RunError
from lorafit.evaluation.nll import means, nll_sums, require_finite
from lorafit.files import write_text
from lorafit.runs.folder import CHECKPOINTS, LAST, METRICS, clear_left_by_kills
from lorafit.tasks.completion import Way, batch_of, token_nll
from lorafit.tasks.probe import way_of
from lorafit.training import checkpoint
from lorafit.training import optimizer as adamw
from lorafit.training.processes import ALONE, Processes
from lorafit.training.recipe import Recipe
from lorafit.training.trunk import Trunk, room_for

RESUME_HINT = "go on with --resume"
CHECKPOINT_SHARE = 0.02  # of the run's time that may go into writing checkpoints between validations


@dataclass(frozen=True)
class Moment:
    """What is told after every step and validation. NLL in nats per token; None where it was not measured."""

    step: int
    steps: int
    train_nll: float | None
    valid_nll: float | None
    learning_rate: float
    seconds_left: float
    tokens_per_second: float


@dataclass(frozen=True)
class Trained:
    """The best adapter by validation, the (step, validation NLL) history, and what it took.

    each: validation NLL of every example under that adapter. seconds: all of it, validation and checkpoints included.
    tokens_per_second: of the steps alone.
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


def train(
    base: Base,
    adapter: Adapter,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row],
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    trunk_bytes: int = 0,
    trunk_in: str | Path | None = None,
    way: Way | None = None,
    known: Sequence[float] | None = None,
    tell: Callable[[Moment], None] = lambda moment: None,
    watch: Callable[[int, int], None] = lambda done, of: None,
    processes: Processes = ALONE,
) -> Trained:
    """Train a fresh adapter; the best by mean validation NLL per example is returned, the base is not written to.

    folder: where checkpoints and metrics.jsonl go; None keeps nothing. With `resume` the run goes on from its last
    checkpoint and ends bit-identical to one that never stopped. The first Ctrl-C (or SIGTERM, SIGHUP) ends after the
    step in progress, saved, with Interrupted; a second at once. Raises DivergedError when the loss leaves the numbers.
    trunk_bytes: what the lowest blocks make of the rows is kept in `folder`, up to so much, where the plan adapts none
    of them and the family allows; it saves time and changes no bit. trunk_in: another folder for it, where it stays for
    other trainings on the same rows, and one that is there is used. way: as `way_of` measured it; measured here where
    it is not given. known: validation NLL of every example before the first step, where it has been measured.
    tell hears of every step, and of every validation with its result; watch of the rows of one while it goes on.
    processes: called alike in each of them, all return the same; the first alone writes into the folder. Where one has
    ended, the first saves what all had after the last whole step, and the others raise Interrupted as it does.
    """
    folder, trunk_in = (None if path is None else Path(path) for path in (folder, trunk_in))
    if folder and processes.first:
        clear_left_by_kills(folder)
    processes.require_work(recipe.batch_size)
    run = _Run(
        base, adapter, train_rows, valid_rows, recipe, folder, trunk_bytes, trunk_in, way, known, tell, watch, processes
    )
    with (
        own_randomness(base),
        same_bits(base.device),
        _interruptible(processes.count > 1) as stop,
        attach(base, run.state),
        packing(base, run.way.packed),
        recomputing(base, recipe.recompute),
    ):
        try:
            return run.go(resume, stop)
        except (DivergedError, AdapterError, BaseError):  # it has come to its end, and not to a good one
            run.end_trunk()
            raise


def gradient_step(base: Base, state: TrainState, batches: Sequence[Batch], way: Way, n: int | None = None) -> float:
    """Accumulate the gradient of the mean NLL over all trained tokens of all batches; returns that mean.

    The sum is divided by the tokens of the whole step, so any division of the step gives the same gradient. n: these
    tokens, where the batches are a share of the step.
    """
    n = n or sum(batch.n_trained for batch in batches)
    total = torch.zeros((), device=base.device)
    for batch in batches:
        loss = token_nll(base, batch, way).sum() / n
        loss.backward()
        total += loss.detach()
    return float(total)


def own_randomness(base: Base) -> AbstractContextManager[None]:
    """What is drawn inside leaves what is drawn afterwards as it was, on the processor and on the base's device."""
    return torch.random.fork_rng([base.device] if base.device.type == "cuda" else [])


@contextmanager
def same_bits(device: torch.device) -> Iterator[None]:
    """On a GPU, have torch take the algorithms that give the same bits each time. It warns of an operation that has
    none."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Run:
    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        train_rows: Sequence[Row],
        valid_rows: Sequence[Row],
        recipe: Recipe,
        folder: Path | None,
        trunk_bytes: int,
        trunk_in: Path | None,
        way: Way | None,
        known: Sequence[float] | None,
        tell: Callable[[Moment], None],
        watch: Callable[[int, int], None],
        processes: Processes,
    ):
        self.base, self.rows, self.valid_rows, self.recipe = base, train_rows, valid_rows, recipe
        self.tell, self.watch, self.processes = tell, watch, processes
        self.others_stop = False
        self.known = known
        self.each: tuple[float, ...] | None = None  # of the best; None where it was found before a resume
        self.checkpoint = folder / CHECKPOINTS / LAST if folder else None
        self.metrics = folder / METRICS if folder and processes.first else None
        self.state = TrainState(adapter, base.device, recipe.dropout)
        self.optimizer = adamw.make_optimizer(self.state)
        self.at = checkpoint.Progress(0, [], self.state.master.detach().clone(), 0.0, 0.0, 0, 0)
        self.saving = self.last_save = self.one_validation = 0.0
        self.began = time.monotonic()
        self.way = way or way_of(base, train_rows)
        # Packs must be the same in every epoch for the trunk to be: they are, whether it is kept or not.
        self.blocks = free_blocks(base, adapter.plan)
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.trunk_bytes, self.trunk_in, self.shares_trunk = trunk_bytes, trunk_in or folder, trunk_in is not None
        self.trunk: Trunk | None = None
        self.identity = self._identity(adapter)

    def _identity(self, adapter: Adapter) -> dict[str, Any]:
        """All that takes part in the bits of the result."""
        return {
            "base": self.base.identity,
            "trainable": f"{adapter.plan.parameters} parameters on {len(adapter.plan.slots)} sites",
            "start": adapter.digest(),
            "rows": digest_of(self._rows_of_run()),
            "recipe": asdict(self.recipe),
            "way": asdict(self.way),
            "order": ORDER,
            "dtype": str(self.base.dtype),
            "device": self.base.device.type,
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": torch.__version__,
        }

    def _rows_of_run(self) -> tuple[list[Row], list[Row]]:
        return list(self.rows), list(self.valid_rows)

    def go(self, resume: bool, stop: threading.Event) -> Trained:
        if resume and self.checkpoint and self.checkpoint.exists():
            older = {"rows": digest_of_format_1(self._rows_of_run())}
            self.at = checkpoint.restore(self.checkpoint, self.state, self.optimizer, self.identity, older)
        self._require_alike()
        self._trim_metrics()
        self._look()
        read_again = self.shares_trunk or self.recipe.steps > self._per_epoch()
        if self.trunk_in and self.trunk_bytes and self.blocks and read_again:
            self.trunk = self._keep_trunk(self.trunk_in)
        recipe, at = self.recipe, self.at
        try:
            while True:
                due = at.step % recipe.validate_every == 0 or at.step in (recipe.early, recipe.steps)
                if due and (not at.history or at.history[-1][0] < at.step):
                    self._validate(stop)
                if at.step == recipe.steps or self._stale() >= recipe.patience:
                    break
                self._step(stop)
                if self.others_stop or (stop.is_set() and self.processes.count == 1):
                    raise _Stopped
                self._save_if_cheap()
        except (_Stopped, Interrupted) as why:
            self._save()
            where = f"stopped after step {at.step} of {recipe.steps}"
            if isinstance(why, Interrupted):
                where = f"another process of the run has ended, {where}"
            if self.checkpoint is None:
                raise Interrupted(f"{where}, nothing saved: give train a folder, and it can go on") from None
            raise Interrupted(f"{where}: {RESUME_HINT}") from None
        return self._finish()

    def _require_alike(self) -> None:
        """All processes begin with the same; none has written anything yet that another may still be reading."""
        master = hashlib.sha256(self.state.master.detach().cpu().numpy().tobytes()).hexdigest()
        if odd := self.processes.differing({**self.identity, "step": self.at.step, "master": master}):
            raise RunError(f"the processes of this run differ in {', '.join(odd)}: give all of them the same files")

    def _look(self) -> None:
        """One forward, in which the attachment finds the sites that share their input: resumed or not, every step
        computes in the same order, and so the same bits."""
        with torch.no_grad():
            token_nll(self.base, batch_of(self.base, self.rows[:1], self.way), self.way)

    def _step(self, stop: threading.Event) -> None:
        recipe, at = self.recipe, self.at
        start = time.monotonic()
        epoch, index = divmod(at.step, self._per_epoch())
        if self.order[0] != epoch:
            self.order = (epoch, self._order(epoch))
        positions = self.order[1][index]
        batches = [self._batch(part) for part in self._parts(positions)]
        own = (self.processes.rank,) if self.processes.count > 1 else ()
        torch.manual_seed(seed_of(recipe.seed, "step", at.step, *own))  # dropout: the same whether resumed or not
        self.state.training = True
        n = sum(sum(self.rows[i].trained[1:]) for i in positions)
        nll = self._joined(gradient_step(self.base, self.state, batches, self.way, n), stop)
        rate = adamw.rate_at(at.step, recipe.steps, recipe.warmup, recipe.learning_rate)
        norm = adamw.step(self.state, self.optimizer, rate, recipe.weight_decay, recipe.clip)
        if at.step == 0 and norm == 0:
            raise AdapterError(
                "no factor receives a gradient at the first step, the adapter would learn nothing: "
                "choose sites on which the answer depends"
            )
        at.step += 1
        self._require_finite(nll + norm)
        if norm == 0 and nll > 1:  # weights so large that every answer is as likely, whatever they do
            self._diverged("the gradient has vanished")
        at.seconds += time.monotonic() - start
        at.tokens += sum(len(self.rows[i].ids) for i in positions)
        at.trained += sum(self.rows[i].n_trained for i in positions)
        self._tell(nll, None, rate)

    def _parts(self, positions: Sequence[int]) -> list[list[int]]:
        """The micro-batches that this process computes of a step."""
        mine = [positions[i] for i in self.processes.share([len(self.rows[i].ids) for i in positions])]
        return by_tokens(self.rows, mine, self.recipe.micro_tokens, self.way.packed)

    def _batch(self, part: Sequence[int]) -> Batch:
        batch = batch_of(self.base, [self.rows[i] for i in part], self.way)
        return self.trunk.begin(batch, part) if self.trunk else batch

    def _order(self, epoch: int) -> list[list[int]]:
        recipe = self.recipe
        return epoch_order(self.rows, recipe.batch_size, recipe.seed, epoch, self.blocks > 0, self.way.packed)

    def _keep_trunk(self, folder: Path) -> Trunk:
        parts = [part for positions in self._order(0) for part in self._parts(positions)]
        packs = {tuple(part): batch_of(self.base, [self.rows[i] for i in part], self.way).ids.numel() for part in parts}
        name = f"trunk-{self.processes.rank}"
        same = {key: self.identity[key] for key in ("way", "order", "dtype", "device", "threads", "torch")}
        same["rows"] = digest_of(list(self.rows))
        room = room_for(folder, self.trunk_bytes) // self.processes.count
        return Trunk(folder, name, self.base, repr(same), packs, self.blocks, room)

    def end_trunk(self) -> None:
        """Remove it, unless others may still read it."""
        if self.trunk and not self.shares_trunk:
            self.trunk.remove()

    def _joined(self, nll: float, stop: threading.Event) -> float:
        """Gradient and loss of the whole step, from the shares of all processes, in one all-reduce; returns the loss.
        A wish to stop goes with them, so that all stop after the same step."""
        if self.processes.count == 1:
            return nll
        master = self.state.master
        gradient = torch.zeros_like(master) if master.grad is None else master.grad
        whole = torch.cat([gradient.detach(), master.new_tensor([nll, stop.is_set()])])
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

    def _validate(self, stop: threading.Event) -> None:
        def watch(done: int, of: int) -> None:
            if stop.is_set():
                raise _Stopped
            if done < of:  # the end is told with its result
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
        at.beside += self.one_validation
        self._tell(None, nll, 0.0)
        self._save()

    def _measured(self, watch: Callable[[int, int], None]) -> list[float]:
        """NLL of every validation example, each process measuring a share. Where one is stopped, all are."""
        rows = self.valid_rows
        sums, stopped = [0.0] * (max(row.example for row in rows) + 1), False
        try:
            sums = nll_sums(self.base, rows, self.processes.share([len(row.ids) for row in rows]), watch, self.way)
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
        """Validations since the best one. The early one does not count: the rate is still rising then."""
        return sum(step > self._best()[0] for step, _ in self.at.history if step != self.recipe.early)

    def _tell(self, train_nll: float | None, valid_nll: float | None, rate: float) -> None:
        at = self.at
        steps = self.recipe.steps - at.step
        validations = self.recipe.validations_after(at.step)
        left = steps * at.seconds / at.step + validations * self.one_validation if at.step else math.nan
        speed = at.tokens / at.seconds if at.seconds else 0.0
        self.tell(Moment(at.step, self.recipe.steps, train_nll, valid_nll, rate, left, speed))
        if self.metrics:
            measured = {"train_nll": train_nll, "valid_nll": valid_nll}
            line = {"step": at.step, **{k: v for k, v in measured.items() if v is not None}, "learning_rate": rate}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "seconds": round(at.seconds, 3)}) + "\n")

    def _trim_metrics(self) -> None:
        """Drop lines of what a killed run had done after its last checkpoint: it is done again."""
        if self.metrics and self.metrics.exists():
            validated = {step for step, _ in self.at.history}
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            told = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            kept = [
                line
                for line, said in told
                if said["step"] <= self.at.step and ("valid_nll" not in said or said["step"] in validated)
            ]
            write_text(self.metrics, "".join(kept))

    def _save(self) -> None:
        if self.checkpoint and self.processes.first:
            start = time.monotonic()
            checkpoint.save(self.checkpoint, self.state, self.optimizer, self.at, self.identity)
            self.last_save = time.monotonic() - start
            self.saving += self.last_save
            self.at.beside += self.last_save

    def _save_if_cheap(self) -> None:
        """So often that a killed run loses little, so seldom that writing stays within CHECKPOINT_SHARE."""
        if self.saving + self.last_save < CHECKPOINT_SHARE * (time.monotonic() - self.began):
            self._save()

    def _finish(self) -> Trained:
        at = self.at
        self.end_trunk()
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
            at.seconds + at.beside,
            at.tokens,
            at.trained,
            speed,
        )


class _Stopped(Exception):
    """The user asked to stop; caught in `go`."""


@contextmanager
def _interruptible(launched: bool) -> Iterator[threading.Event]:
    """The first SIGINT, SIGTERM or SIGHUP sets the event; a second SIGINT or SIGTERM ends the process as it would
    without us. Not where it was launched among others: the launcher repeats what the process may have had already, and
    kills what does not end. A terminal that closes sends SIGHUP, often twice; under nohup it stays ignored.

    Python delivers signals to the main thread only; in any other, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP") and (hangup := signal.getsignal(signal.SIGHUP)) is not signal.SIG_IGN:
        before[signal.SIGHUP] = hangup

    def first(number: int, frame: object) -> None:
        stop.set()
        if launched:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, first)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
