"""The task of a classifier: texts with labels go in; the loss of the label, and its probabilities, come out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.examples import Example, Examples
from lorafit.data.render import Row
from lorafit.errors import AdapterError, DataError, Problem
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.tasks.texts import head_outputs, padded

NAME = "classification"
TOO_LONG = "shorten it, or --skip-bad"  # what to do about a row of a file
AT_A_TIME = 2048  # the most tokens of one forward pass without gradient


@dataclass(frozen=True)
class LabelledRow(Row):
    """The tokens of a text, and the number of its label. It has one target, at the last token."""

    label: int = 0


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """ids (B, T) int64, padded on the right; mask (B, T): 1 where a token is; targets (B,): numbers of the labels."""

    ids: Tensor
    mask: Tensor
    targets: Tensor

    @property
    def rows(self) -> int:
        return len(self.targets)

    @property
    def n_trained(self) -> int:
        return len(self.targets)

    @property
    def owner(self) -> Tensor:
        return torch.arange(len(self.targets), device=self.targets.device)


@dataclass(frozen=True)
class Classification:
    """The task of a classifier, a base that was opened with `labels`. It implements `Task`; a row has one target.

    Args:
        classes: The labels, their weights, and the padding token.
    """

    classes: Classes
    name: str = NAME
    logits_at_a_time: int | None = None
    starts: bool = False

    def mode(self, base: Base, rows: Sequence[Row]) -> ForwardMode:
        return PLAIN

    def batch(self, base: Base, rows: Sequence[Row], mode: ForwardMode) -> LabelledBatch:
        ids, mask = padded(base, [row.ids for row in rows], self.classes.pad)
        targets = torch.tensor([_label(row) for row in rows])
        return LabelledBatch(*(tensor.to(base.device) for tensor in (ids, mask, targets)))

    def body(self, base: Base, batch: LabelledBatch, mode: ForwardMode) -> Tensor:
        """Logits (B, labels)."""
        return head_outputs(base, batch.ids, batch.mask, self.classes.pad)

    def nll(self, base: Base, batch: LabelledBatch, mode: ForwardMode) -> Tensor:
        """The cross-entropy of each row, times the weight of its label."""
        nll = F.cross_entropy(self.body(base, batch, mode).float(), batch.targets, reduction="none")
        weights = self.classes.weights
        return nll * torch.tensor(weights, device=nll.device)[batch.targets] if weights else nll

    def weight(self, row: Row) -> float:
        return self.classes.weights[_label(row)] if self.classes.weights else 1.0

    def probes(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
        ids = [i for row in rows for i in row.ids]
        return [_row((ids * (n // len(ids) + 1))[:n], k, 0) for k, n in enumerate(lengths)]


def _row(ids: Sequence[int], example: int, label: int) -> LabelledRow:
    return LabelledRow(tuple(ids), (*[False] * (len(ids) - 1), True), example, label=label)


def _label(row: Row) -> int:
    assert isinstance(row, LabelledRow)
    return row.label


@dataclass(frozen=True)
class LabelRenderer:
    """Turns texts into rows for a classifier: the tokens of a text, and the special tokens that the tokenizer adds."""

    base: Base
    classes: Classes

    @staticmethod
    def of(base: Base, labels: Sequence[str]) -> LabelRenderer:
        """A renderer for these labels. If a text ends with the padding token, a decoder uses the token before it."""
        pad = base.tokenizer.pad_token_id
        pad = base.tokenizer.eos_token_id if pad is None else pad
        return LabelRenderer(base, Classes(tuple(labels), 0 if pad is None else int(pad)))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self.base.tokenizer(text)["input_ids"]
        return ids

    def row(self, text: str, example: int = 0, label: int = 0) -> Row:
        """A text as a row. label: the number of its label, if that is known."""
        return _row(self.ids(text), example, label)

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """A row as pieces of text, each with whether it is trained: the text that the model reads, and the label."""
        label = self.classes.labels[_label(row)]
        return [(self.base.tokenizer.decode(list(row.ids)), False), (f" label: {label}", True)]


def labels_of(examples: Examples) -> list[str]:
    """The different labels of the training examples, sorted. Raises DataError if they cannot be learnt."""
    fix = "give text and label on every line, or learn answers with --task completion and a causal language model"
    unlabelled = [e for split in examples.by_name().values() for e in split if e.label is None]
    if unlabelled:
        raise DataError([Problem(e.where, "has no label, but a classifier needs one", fix) for e in unlabelled])
    labels = sorted({str(example.label) for example in examples.train})
    if len(labels) < 2:
        what = f"all training examples have the label {labels[0]!r}, so there is nothing to tell apart"
        raise DataError([Problem(examples.train[0].where, what, "add examples of another label")])
    return labels


def balanced(labels: Sequence[str], examples: Sequence[Example]) -> tuple[float, ...]:
    """Weights under which every label counts alike: n / (labels · examples of the label)."""
    counts = Counter(example.label for example in examples)
    return tuple(len(examples) / (len(labels) * counts[label]) for label in labels)


def labelled_rows(renderer: LabelRenderer, examples: Sequence[Example], max_length: int) -> list[Row]:
    """The rows of examples. Raises DataError for all examples with no known label, no token, or too many tokens."""
    numbers = {label: i for i, label in enumerate(renderer.classes.labels)}
    rows: list[Row] = []
    problems: list[Problem] = []
    for i, example in enumerate(examples):
        text = example.messages[-2].text if len(example.messages) > 1 else ""
        number = None if example.label is None else numbers.get(example.label)
        if number is None:
            what = "no label" if example.label is None else f"label {example.label!r}, which no training example has"
            problems.append(Problem(example.where, f"has {what}", "correct it, or add examples of it to training"))
        elif isinstance(ids := _ids(renderer, example.where, text, max_length, TOO_LONG), Problem):
            problems.append(ids)
        else:
            rows.append(_row(ids, i, number))
    if problems:
        raise DataError(problems)
    return rows


def text_rows(renderer: LabelRenderer, texts: Sequence[tuple[str, str]], fix: str = "shorten it") -> list[Row]:
    """The rows of texts whose labels are not known, each given with its place. Raises DataError for all texts with no
    token, or more than the base can read. fix: what to do about the latter."""
    read = [_ids(renderer, where, text, sys.maxsize, fix) for where, text in texts]
    if problems := [ids for ids in read if isinstance(ids, Problem)]:
        raise DataError(problems)
    return [_row(ids, i, 0) for i, ids in enumerate(read) if not isinstance(ids, Problem)]


def _ids(renderer: LabelRenderer, where: str, text: str, max_length: int, fix: str) -> list[int] | Problem:
    """The tokens of a text, or why it cannot be classified."""
    ids, context = renderer.ids(text), renderer.base.context
    most = max_length if context is None else min(max_length, context)
    if len(ids) > most:
        limit = f"raise --max-length ({max_length})" if most == max_length else f"this base reads at most {most}"
        return Problem(where, f"has {len(ids)} tokens", f"{limit}, {fix}")
    return ids or Problem(where, "has no token", "write a text, or remove the line")


def classify(base: Base, adapter: Adapter, texts: Sequence[str]) -> Tensor:
    """The probability of each label of `adapter.classes`, (texts, labels) in fp32 on the CPU.

    Args:
        base: The adapter's base, opened with `labels` set to the number of its labels, and with nothing attached.
        adapter: A classifier.
        texts: The texts to classify.

    Raises:
        AdapterError: The adapter is no classifier, or belongs to another base.
        DataError: Some texts have no token, or more than the base can read; all of these are listed.
    """
    classes = adapter.classes
    if classes is None:
        raise AdapterError("this adapter writes text and has no labels: use generate()")
    rows = text_rows(LabelRenderer(base, classes), [(f"text {i}", text) for i, text in enumerate(texts, 1)])
    with attach(base, adapter):
        return probabilities(base, Classification(classes), rows)


@torch.no_grad()
def probabilities(
    base: Base, task: Classification, rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The probability of each label, (rows, labels) in fp32 on the CPU. progress: called with the number of rows that
    are done."""
    likely = torch.zeros(len(rows), len(task.classes.labels))
    done = 0
    for part in by_tokens(rows, range(len(rows)), AT_A_TIME):
        batch = task.batch(base, [rows[i] for i in part], PLAIN)
        likely[part] = task.body(base, batch, PLAIN).float().softmax(-1).cpu()
        done += len(part)
        progress(done)
    return likely
