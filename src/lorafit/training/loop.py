"""The training loop. `examples/training_loop.py` is the same in plain PyTorch, flat, to read first."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit.adapter import Adapter
from lorafit.attachment import attach, packing, recomputing
from lorafit.base import Base
from lorafit.data.batches import Batch, by_tokens, epoch_order
from lorafit.data.render import Row
from lorafit.data.split import seed_of
from lorafit.errors import AdapterError, BaseError, DivergedError, Interrupted
from lorafit.evaluation.nll import example_nll
from lorafit.files import write_text
from lorafit.run import CHECKPOINTS, METRICS
from lorafit.tasks.completion import Way, batch_of, token_nll, way_of
from lorafit.training import checkpoint
from lorafit.training import optimizer as adamw
from lorafit.training.recipe import Recipe
from lorafit.training.state import TrainState

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

    seconds: all of it, validation and checkpoints included. tokens_per_second: of the steps alone.
    """

    adapter: Adapter
    history: tuple[tuple[int, float], ...]
    best_step: int
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
    folder: Path | None = None,
    resume: bool = False,
    tell: Callable[[Moment], None] = lambda moment: None,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Trained:
    """Train a fresh adapter; the best by mean validation NLL per example is returned, the base is not written to.

    folder: where checkpoints and metrics.jsonl go; None keeps nothing. With `resume` the run goes on from its last
    checkpoint and ends bit-identical to one that never stopped. The first Ctrl-C (or SIGTERM) ends after the step in
    progress, saved, with Interrupted; a second one at once. Raises DivergedError when the loss leaves the numbers.
    tell hears of every step, and of every validation with its result; watch of the rows of one while it goes on.
    """
    run = _Run(base, adapter, train_rows, valid_rows, recipe, folder, tell, watch)
    with (
        torch.random.fork_rng(), _interruptible() as stop,
        attach(base, run.state), packing(base, run.way.packed), recomputing(base, recipe.recompute),
    ):  # fmt: skip
        return run.go(resume, stop)


def gradient_step(base: Base, state: TrainState, batches: Sequence[Batch], way: Way) -> float:
    """Accumulate the gradient of the mean NLL over all trained tokens of all batches; returns that mean.

    The sum is divided by the tokens of the whole step, so any division of the step gives the same gradient.
    """
    n = sum(batch.n_trained for batch in batches)
    total = torch.zeros((), device=base.device)
    for batch in batches:
        loss = token_nll(base, batch, way).sum() / n
        loss.backward()
        total += loss.detach()
    return float(total)


class _Run:
    def __init__(
        self, base: Base, adapter: Adapter, train_rows: Sequence[Row], valid_rows: Sequence[Row],
        recipe: Recipe, folder: Path | None, tell: Callable[[Moment], None], watch: Callable[[int, int], None],
    ):  # fmt: skip
        self.base, self.rows, self.valid_rows, self.recipe = base, train_rows, valid_rows, recipe
        self.tell, self.watch = tell, watch
        self.checkpoint = folder / CHECKPOINTS / "last.safetensors" if folder else None
        self.metrics = folder / METRICS if folder else None
        self.state = TrainState(adapter, base.device, recipe.dropout)
        self.optimizer = adamw.make_optimizer(self.state)
        self.at = checkpoint.Progress(0, [], self.state.master.detach().clone(), 0.0, 0.0, 0, 0)
        self.saving = self.last_save = self.one_validation = 0.0
        self.began = time.monotonic()
        self.way = way_of(base, train_rows)
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.identity = self._identity(adapter)

    def _identity(self, adapter: Adapter) -> dict[str, Any]:
        """All that takes part in the bits of the result."""
        rows = hashlib.sha256(repr((list(self.rows), list(self.valid_rows))).encode()).hexdigest()
        return {
            "base": self.base.identity,
            "trainable": f"{adapter.plan.parameters} parameters on {len(adapter.plan.slots)} sites",
            "start": adapter.digest(),
            "rows": rows,
            "recipe": asdict(self.recipe),
            "dtype": str(self.base.dtype),
            "device": self.base.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def go(self, resume: bool, stop: threading.Event) -> Trained:
        if resume and self.checkpoint and self.checkpoint.exists():
            self.at = checkpoint.restore(self.checkpoint, self.state, self.optimizer, self.identity)
        self._trim_metrics()
        self._look()
        recipe, at = self.recipe, self.at
        try:
            while True:
                due = at.step % recipe.validate_every == 0 or at.step == recipe.steps
                if due and (not at.history or at.history[-1][0] < at.step):
                    self._validate(stop)
                if at.step == recipe.steps or self._stale() >= recipe.patience:
                    break
                self._step()
                if stop.is_set():
                    raise _Stopped
                self._save_if_cheap()
        except _Stopped:
            self._save()
            where = f"stopped after step {at.step} of {recipe.steps}"
            if self.checkpoint is None:
                raise Interrupted(f"{where}, nothing saved: give train a folder, and it can go on") from None
            raise Interrupted(f"{where}: {RESUME_HINT}") from None
        return self._finish()

    def _look(self) -> None:
        """One forward, in which the attachment finds the sites that share their input: resumed or not, every step
        computes in the same order, and so the same bits."""
        with torch.no_grad():
            token_nll(self.base, batch_of(self.base, self.rows[:1], self.way), self.way)

    def _step(self) -> None:
        recipe, at = self.recipe, self.at
        start = time.monotonic()
        epoch, index = divmod(at.step, self._per_epoch())
        if self.order[0] != epoch:
            self.order = (epoch, epoch_order(self.rows, recipe.batch_size, recipe.seed, epoch))
        positions = self.order[1][index]
        parts = by_tokens(self.rows, positions, recipe.micro_tokens, self.way.packed)
        batches = [batch_of(self.base, [self.rows[i] for i in part], self.way) for part in parts]
        torch.manual_seed(seed_of(recipe.seed, "step", at.step))  # dropout: the same whether resumed or not
        self.state.training = True
        nll = gradient_step(self.base, self.state, batches, self.way)
        rate = adamw.rate_at(at.step, recipe.steps, recipe.warmup, recipe.learning_rate)
        norm = adamw.step(self.state, self.optimizer, rate, recipe.weight_decay, recipe.clip)
        if at.step == 0 and norm == 0:
            raise AdapterError("no factor receives a gradient at the first step, the adapter would learn nothing: "
                               "choose sites on which the answer depends")  # fmt: skip
        at.step += 1
        self._require_finite(nll + norm)
        if norm == 0 and nll > 1:  # weights so large that every answer is as likely, whatever they do
            self._diverged("the gradient has vanished")
        at.seconds += time.monotonic() - start
        at.tokens += sum(len(self.rows[i].ids) for i in positions)
        at.trained += sum(self.rows[i].n_trained for i in positions)
        self._tell(nll, None, rate)

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
                self.watch(done, of)

        at, start = self.at, time.monotonic()
        self.state.training = False
        values = example_nll(self.base, self.valid_rows, watch, self.way)
        nll = sum(values) / len(values)
        if not at.history and not math.isfinite(nll):
            raise BaseError(f"'{self.base.name}' gives validation examples no finite NLL ({nll}): the fault is in the "
                            "base or its dtype, not in the training; try --dtype fp32, or another base")  # fmt: skip
        self._require_finite(nll)
        if at.history and nll > 2 * at.history[0][1] + 1:
            self._diverged(f"validation NLL rose from {at.history[0][1]:.2f} to {nll:.2f}")
        if not at.history or nll < min(value for _, value in at.history):
            at.best = self.state.master.detach().clone()
        at.history.append((at.step, nll))
        self.one_validation = time.monotonic() - start
        at.beside += self.one_validation
        self._tell(None, nll, 0.0)
        self._save()

    def _best(self) -> tuple[int, float]:
        return min(self.at.history, key=lambda entry: entry[1])

    def _stale(self) -> int:
        """Validations since the best one."""
        return sum(step > self._best()[0] for step, _ in self.at.history)

    def _tell(self, train_nll: float | None, valid_nll: float | None, rate: float) -> None:
        at = self.at
        steps = self.recipe.steps - at.step
        validations = math.ceil(steps / self.recipe.validate_every)
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
        if self.checkpoint:
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
        self.state.load(at.best)
        speed = at.tokens / at.seconds if at.seconds else 0.0
        return Trained(self.state.freeze(), tuple(at.history), self._best()[0], at.step, at.seconds + at.beside,
                       at.tokens, at.trained, speed)  # fmt: skip


class _Stopped(Exception):
    """The user asked to stop; caught in `go`."""


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event; a second one ends the process as it would without us.

    Python delivers signals to the main thread only; in any other, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(number: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, first)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
