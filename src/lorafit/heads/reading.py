"""Runs the tasks whose model reads a text: rows, batches, losses, predictions and their scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.examples import Example, Message
from lorafit.data.rows import Row
from lorafit.data.split import groups_of
from lorafit.data.targets import FIELD
from lorafit.errors import AdapterError, DataError, Problem
from lorafit.evaluation.compare import SAMPLES, Comparison, nll_score
from lorafit.evaluation.counting import counted
from lorafit.evaluation.scores import AnswerScore, Sample
from lorafit.heads.head import RowMaker, Test
from lorafit.heads.texts import Read, Reader, asked
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.tasks.texts import head_outputs, padded

AT_A_TIME = 2048  # the most tokens of one forward pass without gradient


@dataclass(frozen=True)
class ReadRow(Row):
    """The tokens of a text. values: what the model should give at each trained token, in numbers."""

    values: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """ids (B, T) int64, padded on the right; mask (B, T): 1 where a token is; at (B, T): the trained tokens; targets
    (n, values) in fp32, in the order of rows and tokens, standardized where the classes have a scale; owner (n,): the
    row of each."""

    ids: Tensor
    mask: Tensor
    at: Tensor
    targets: Tensor
    owner: Tensor

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def n_trained(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Reading:
    """The task of a model that reads texts. It implements `Task`.

    Args:
        classes: The outputs, and the padding token.
        reader: What the model gives.
        name: The name of the task.
    """

    classes: Classes
    reader: Reader
    name: str
    logits_at_a_time: int | None = None
    starts: bool = False

    def mode(self, base: Base, rows: Sequence[Row]) -> ForwardMode:
        return PLAIN

    def batch(self, base: Base, rows: Sequence[Row], mode: ForwardMode) -> ReadBatch:
        ids, mask = padded(base, [row.ids for row in rows], self.classes.pad)
        at = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            at[i, : len(row.ids)] = torch.tensor(row.trained)
        targets = _targets(rows, self.classes)
        owner = torch.tensor([i for i, row in enumerate(rows) for _ in _values(row)], dtype=torch.int64)
        return ReadBatch(*(tensor.to(base.device) for tensor in (ids, mask, at, targets, owner)))

    def body(self, base: Base, batch: ReadBatch, mode: ForwardMode) -> Tensor:
        """What the head gives for each target, (n, outputs)."""
        outputs = head_outputs(base, batch.ids, batch.mask, self.classes.pad)
        return outputs[batch.at] if outputs.dim() == 3 else outputs

    def nll(self, base: Base, batch: ReadBatch, mode: ForwardMode) -> Tensor:
        return self.reader.loss(self.body(base, batch, mode).float(), batch.targets, self.classes)

    def weight(self, row: Row) -> float:
        return float(row.n_trained)

    def probes(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
        """Rows in which the same share of tokens is trained as in the given rows, and the last one if it is one."""
        ids = [i for row in rows for i in row.ids]
        share = sum(row.n_trained for row in rows) / len(ids)
        of_tokens = any(row.n_trained > 1 for row in rows)
        value = next(value for row in rows for value in _values(row))
        made: list[Row] = []
        for k, n in enumerate(lengths):
            trained = min(n, max(1, round(share * n))) if of_tokens else 1
            whole = tuple((ids * (n // len(ids) + 1))[:n])
            made.append(ReadRow(whole, (*[False] * (n - trained), *[True] * trained), k, values=(value,) * trained))
        return made


def _targets(rows: Sequence[Row], classes: Classes) -> Tensor:
    """The values of rows, (n, values) in fp32 on the CPU. Numbers are standardized before they are rounded: in fp32 the
    seconds since 1970 lie 128 apart."""
    values = torch.tensor([value for row in rows for value in _values(row)], dtype=torch.float64)
    if classes.scale is not None:
        mean, spread = classes.scale
        values = (values - mean) / spread
    return values.float()


def _values(row: Row) -> tuple[tuple[float, ...], ...]:
    assert isinstance(row, ReadRow)
    return row.values


def classes_of(base: Base, labels: Sequence[str], task: str, peft: str) -> Classes:
    """The outputs of a head. If a text ends with the padding token, a decoder uses the token before it."""
    pad = base.tokenizer.pad_token_id
    pad = base.tokenizer.eos_token_id if pad is None else pad
    return Classes(tuple(labels), 0 if pad is None else int(pad), task=task, peft=peft)


@dataclass(frozen=True)
class Texts:
    """Turns texts into rows: their tokens, and the special tokens that the tokenizer adds. It implements `RowMaker`."""

    base: Base
    classes: Classes
    reader: Reader

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text."""
        return tuple(self.base.tokenizer(text)["input_ids"])

    def read_whole(self, example: Example, values: tuple[float, ...]) -> Read:
        """An example for which the model gives one thing, at its last token."""
        ids = self.ids(asked(example))
        return Read(ids, (*[False] * (len(ids) - 1), True), (values,))

    def rows(self, examples: Sequence[Example], max_length: int) -> list[ReadRow]:
        """The rows of examples. Raises DataError that names every example that cannot become one."""
        context = self.base.context
        most = max_length if context is None else min(max_length, context)
        rows: list[ReadRow] = []
        problems: list[Problem] = []
        target = self.reader.target
        for i, example in enumerate(examples):
            fix = f"give text and {FIELD[target]} on every line"
            fits = isinstance(example.target, target)
            read = self.reader.read(self, example) if fits else (f"has no {FIELD[target]}", fix)
            if isinstance(read, tuple):
                problems.append(Problem(example.where, *read))
            elif len(read.ids) > most:
                what, by_setting = f"has {len(read.ids)} tokens", most == max_length
                limit = f"raise --max-length ({max_length})" if by_setting else f"this base reads at most {most}"
                problems.append(Problem(example.where, what, f"{limit}, shorten it, or --skip-bad"))
            elif not any(read.trained) or not asked(example).strip():
                problems.append(Problem(example.where, "has no token", "write a text, or remove the line"))
            else:
                rows.append(ReadRow(read.ids, read.trained, i, values=read.values))
        if problems:
            raise DataError(problems)
        return rows

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether the model gives something there; and its values."""
        values, since, found = iter(_values(row)), 0, []
        for i, trained in enumerate(row.trained):
            if trained and (shown := self.reader.shown(next(values), self.classes)):
                found += [(self.base.tokenizer.decode(list(row.ids[since : i + 1])), False), (f" {shown}", True)]
                since = i + 1
        rest = self.base.tokenizer.decode(list(row.ids[since:]))
        return [*found, *([(rest, False)] if rest else [])]


def texts_of(renderer: RowMaker) -> Texts:
    """The renderer of a task whose model reads texts."""
    assert isinstance(renderer, Texts)
    return renderer


@torch.no_grad()
def outputs_of(
    base: Base, task: Reading, rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """The outputs of each row, (its trained tokens, outputs) in fp32 on the CPU. progress: called with the number of
    rows that are done."""
    found: list[Tensor] = [torch.zeros(0)] * len(rows)
    done = 0
    for part in by_tokens(rows, range(len(rows)), AT_A_TIME):
        batch = task.batch(base, [rows[i] for i in part], PLAIN)
        outputs = task.body(base, batch, PLAIN).float().cpu()
        for i, own in zip(part, outputs.split([rows[i].n_trained for i in part]), strict=True):
            found[i] = own
        done += len(part)
        progress(done)
    return found


def predict(base: Base, adapter: Adapter, texts: Sequence[str]) -> list[Any]:
    """What an adapter gives for texts: a number each for regression, a tuple of labels for multi-label classification.

    Args:
        base: The adapter's base, opened with `opened_for(adapter)`, and with nothing attached.
        adapter: The adapter.
        texts: The texts.

    Raises:
        AdapterError: The adapter is for another kind of task, or belongs to another base.
        DataError: Some texts have no token, or more than the base can read; all of these are listed.
    """
    from lorafit.heads import head_of_adapter
    from lorafit.heads.texts import TextHead

    head = head_of_adapter(adapter)
    if not isinstance(head, TextHead):
        other = "classify()" if adapter.classes else "generate()"
        raise AdapterError(f"this adapter is for the task '{head.name}': use {other}")
    renderer, task, blank = head.renderer_of(base, adapter), head.task_of(adapter), head.reader.target()
    examples = [
        Example((Message("user", text), Message("assistant", "")), f"text {i}", target=blank)
        for i, text in enumerate(texts, 1)
    ]
    rows = renderer.rows(examples, sys.maxsize)
    with attach(base, adapter):
        outputs = outputs_of(base, task, rows)
    return _predictions(renderer, outputs, rows, examples)


def _predictions(
    renderer: Texts, outputs: Sequence[Tensor], rows: Sequence[Row], examples: Sequence[Example]
) -> list[Any]:
    return [
        renderer.reader.predicted(own, Read(row.ids, row.trained, _values(row)), renderer, example)
        for own, row, example in zip(outputs, rows, examples, strict=True)
    ]


def compare_texts(test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
    """Score an adapter on texts, compared with another adapter, or with a guess that reads no text.

    Args:
        test: The texts, as rows. Without known training examples the guess is made from what the adapter keeps.
        adapter: The adapter.
        against: Another adapter to compare with; None for the guess.
    """
    task = test.runner.task
    assert isinstance(task, Reading)
    renderer = replace(texts_of(test.renderer), classes=task.classes)
    rows, examples, reader, classes = test.rows, test.examples, task.reader, task.classes

    def given_by(name: str, one: Adapter) -> list[Tensor]:
        test.watch(name, 0, len(rows))
        with attach(test.runner.base, one, accept_unknown_base=test.accept_unknown_base):
            return outputs_of(test.runner.base, task, rows, lambda done: test.watch(name, done, len(rows)))

    mine = given_by("adapter: predictions", adapter)
    ours = _predictions(renderer, mine, rows, examples)
    if against is None:
        known = [example for example in test.known if isinstance(example.target, reader.target)]
        guess = reader.guess(classes, known)
        other = [torch.tensor([guess.outputs] * row.n_trained) for row in rows]
        theirs = [guess.prediction] * len(rows)
    else:
        other = given_by("other adapter: predictions", against)
        theirs = _predictions(renderer, other, rows, examples)
    truth = [reader.truth(example.target) for example in examples if example.target is not None]
    groups = [example.group for example in examples]
    nll, other_nll = ([_loss(task, own, row) for own, row in zip(one, rows, strict=True)] for one in (mine, other))
    texts, other_texts = (
        [reader.text(one, asked(example)) for one, example in zip(each, examples, strict=True)]
        for each in (ours, theirs)
    )
    correct = [a == b for a, b in zip(ours, truth, strict=True)] if reader.exact else [None] * len(rows)
    others_correct = [a == b for a, b in zip(theirs, truth, strict=True)] if reader.exact else correct
    scores = [_score(each, right, groups) for each, right in ((other_texts, others_correct), (texts, correct))]
    by_name = {"base": scores[0], "adapter": scores[1]}
    answers = {who: score.answers for who, score in by_name.items()}
    right = {who: score.correct for who, score in by_name.items()}
    return Comparison(
        nll_score(other_nll, nll, groups),
        scores[0],
        None,
        scores[1],
        _samples(examples, scores, nll),
        tuple(range(len(rows))),
        tuple(zip(other_nll, nll, strict=True)),
        counted(examples, answers, test.known, right) if reader.exact else None,
        measures=replace(reader.measures(classes, truth, ours, theirs, groups), task=task.name),
    )


def _loss(task: Reading, outputs: Tensor, row: Row) -> float:
    return float(task.reader.loss(outputs, _targets([row], task.classes), task.classes).mean())


def _score(texts: Sequence[str], correct: Sequence[bool | None], groups: Sequence[str | None]) -> AnswerScore:
    known = [one for one in correct if one is not None]
    return AnswerScore(sum(known), len(known), 0, 0, 0, len(set(groups_of(groups))), tuple(texts), tuple(correct))


def _samples(examples: Sequence[Example], scores: Sequence[AnswerScore], nll: Sequence[float]) -> tuple[Sample, ...]:
    """The texts with the largest losses, up to half of the samples, and others spread over the rest."""
    worst = sorted(range(len(nll)), key=lambda i: -nll[i])
    chosen = worst[: SAMPLES // 2]
    rest = worst[SAMPLES // 2 :]
    few = SAMPLES - len(chosen)
    chosen += rest[:: max(1, len(rest) // few)][:few]
    base, adapter = scores
    return tuple(
        Sample(asked(examples[i]), examples[i].answer, base.answers[i], adapter.answers[i], adapter.correct[i])
        for i in chosen
    )


@dataclass(frozen=True)
class HeldOutTexts:
    """Texts whose predictions are right or wrong. It implements `HeldOut`."""

    runner: Runner
    examples: Sequence[Example]
    rows: Sequence[Row]
    renderer: RowMaker

    def right(self, adapter: Adapter, progress: Callable[[int, int], None]) -> int:
        """How many texts the adapter has right. Nothing may be attached to the base."""
        task = self.runner.task
        assert isinstance(task, Reading)
        with attach(self.runner.base, adapter):
            outputs = outputs_of(self.runner.base, task, self.rows, lambda done: progress(done, len(self.rows)))
        renderer = replace(texts_of(self.renderer), classes=task.classes)
        given = _predictions(renderer, outputs, self.rows, self.examples)
        wanted = [task.reader.truth(example.target) for example in self.examples if example.target is not None]
        return sum(a == b for a, b in zip(given, wanted, strict=True))
