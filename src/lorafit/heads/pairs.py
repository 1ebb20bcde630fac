"""Trains and scores embeddings by pairs of texts: the partner of a text among the partners of others (InfoNCE).

The others are drawn once for each example, rather than being those that happen to be in the same batch. So the loss of
an example depends on nothing but the example: not on the size of micro-batches, and validation is the same each time. A
text that several examples of a batch have is embedded once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.examples import Example
from lorafit.data.rows import Row
from lorafit.data.split import groups_of
from lorafit.data.targets import Pair
from lorafit.errors import AdapterError, DataError, Problem
from lorafit.evaluation.compare import SAMPLES, Comparison, nll_score
from lorafit.evaluation.measures import measure
from lorafit.evaluation.scores import AnswerScore, Measures, Sample
from lorafit.heads.head import RowMaker, Test
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.tasks.texts import padded

OTHERS = 7  # partners of other examples, among which a text has to find its own
TEMPERATURE = 0.05  # of the similarities in the loss, as in SimCSE (arXiv 2104.08821)
AT_A_TIME = 2048  # the most tokens of one forward pass without gradient
NEAREST = (1, 10)  # the k of recall@k

Ids = tuple[int, ...]


@dataclass(frozen=True)
class PairRow(Row):
    """The tokens of a text, of its partner, and of the partners of others, one after another. lengths: of each."""

    lengths: tuple[int, ...] = ()

    @property
    def texts(self) -> list[Ids]:
        """The tokens of each text: the anchor, its partner, and others."""
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return [self.ids[end - n : end] for end, n in zip(ends, self.lengths, strict=True)]


@dataclass(frozen=True, eq=False)
class PairBatch:
    """ids (texts, T) int64 of the different texts of all rows, padded on the right; mask (texts, T): 1 where a token
    is; anchors (B,): the text of each row; candidates (B, C): the texts among which its partner is the first, -1 where
    a row has fewer than others."""

    ids: Tensor
    mask: Tensor
    anchors: Tensor
    candidates: Tensor

    @property
    def rows(self) -> int:
        return len(self.anchors)

    @property
    def n_trained(self) -> int:
        return len(self.anchors)

    @property
    def owner(self) -> Tensor:
        return torch.arange(len(self.anchors), device=self.anchors.device)


@dataclass(frozen=True)
class Contrast:
    """The task of an embedding model. It implements `Task`; a row has one target.

    Args:
        classes: The padding token.
    """

    classes: Classes
    name: str = "embedding"
    logits_at_a_time: int | None = None
    starts: bool = False

    def mode(self, base: Base, rows: Sequence[Row]) -> ForwardMode:
        return PLAIN

    def batch(self, base: Base, rows: Sequence[Row], mode: ForwardMode) -> PairBatch:
        places: dict[Ids, int] = {}
        listed = [[places.setdefault(text, len(places)) for text in _pair(row).texts] for row in rows]
        most = max(map(len, listed))
        candidates = torch.tensor([one[1:] + [-1] * (most - len(one)) for one in listed])
        ids, mask = padded(base, list(places), self.classes.pad)
        anchors = torch.tensor([one[0] for one in listed])
        return PairBatch(*(tensor.to(base.device) for tensor in (ids, mask, anchors, candidates)))

    def body(self, base: Base, batch: PairBatch, mode: ForwardMode) -> Tensor:
        """The logits of the candidates, (B, C): similarities by TEMPERATURE, -inf where there is none."""
        vectors = vectors_of(base, batch.ids, batch.mask)
        products = torch.einsum("bd,bcd->bc", vectors[batch.anchors], vectors[batch.candidates.clamp(min=0)])
        return (products / TEMPERATURE).masked_fill(batch.candidates < 0, -torch.inf)

    def nll(self, base: Base, batch: PairBatch, mode: ForwardMode) -> Tensor:
        logits = self.body(base, batch, mode)
        return cross_entropy(
            logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device), reduction="none"
        )

    def weight(self, row: Row) -> float:
        return 1.0

    def probes(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
        """Rows of as many texts as the given rows have at most, in so far as there are tokens for them."""
        ids, most = [i for row in rows for i in row.ids], max(len(_pair(row).lengths) for row in rows)
        made: list[Row] = []
        for k, n in enumerate(lengths):
            count = max(2, min(most, n // 2))
            parts = [n // count + (i < n % count) for i in range(count)]
            made.append(_row([tuple(ids[(i + j) % len(ids)] for j in range(part)) for i, part in enumerate(parts)], k))
        return made


def _row(texts: Sequence[Ids], example: int) -> PairRow:
    ids = tuple(i for text in texts for i in text)
    return PairRow(ids, (*[False] * (len(ids) - 1), True), example, lengths=tuple(map(len, texts)))


def _pair(row: Row) -> PairRow:
    assert isinstance(row, PairRow)
    return row


def vectors_of(base: Base, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean of the last hidden state over the tokens of each text, of length 1, (texts, d) in fp32."""
    model: Any = base.model
    states: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return normalize((states * mask[..., None]).sum(1), dim=-1)


@dataclass(frozen=True)
class PairTexts:
    """Turns pairs of texts into rows. It implements `RowMaker`."""

    base: Base
    classes: Classes

    def ids(self, text: str) -> Ids:
        """The tokens of a text, and the special tokens that the tokenizer adds."""
        return tuple(self.base.tokenizer(text)["input_ids"])

    def problem(self, ids: Ids, max_length: int) -> tuple[str, str] | None:
        """What is wrong with a text, and what to do."""
        context = self.base.context
        most = max_length if context is None else min(max_length, context)
        if len(ids) > most:
            limit = f"raise --max-length ({max_length})" if most == max_length else f"this base reads at most {most}"
            return f"has {len(ids)} tokens", f"{limit}, shorten it, or --skip-bad"
        return None if ids else ("has no token", "write a text, or remove the line")

    def rows(self, examples: Sequence[Example], max_length: int) -> list[PairRow]:
        """The rows of examples. Raises DataError that names every text that cannot be read."""
        without = [example for example in examples if not isinstance(example.target, Pair)]
        if without:
            fix = "give anchor and positive on every line"
            raise DataError([Problem(example.where, "has no positive", fix) for example in without])
        pairs = [(self.ids(example.asked), self.ids(example.answer)) for example in examples]
        problems = [
            Problem(f"{example.where}: {field}", *found)
            for example, pair in zip(examples, pairs, strict=True)
            for field, ids in zip(("anchor", "positive"), pair, strict=True)
            if (found := self.problem(ids, max_length))
        ]
        if problems:
            raise DataError(problems)
        others = drawn(examples)
        return [_row([*pairs[i], *(pairs[k][1] for k in others[i])], i) for i in range(len(examples))]

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """A row as pieces of text: the anchor, and its partner, which is what is learnt."""
        anchor, partner, *_ = _pair(row).texts
        decode = self.base.tokenizer.decode
        return [(decode(list(anchor)), False), (f" ↔ {decode(list(partner))}", True)]


def drawn(examples: Sequence[Example]) -> list[list[int]]:
    """For each example the places of others whose partners are not its own, at most OTHERS, drawn by one seed."""
    draw, every = random.Random(0), range(len(examples))
    partners: dict[str, set[str]] = {}  # of a text that is in several examples
    for example in examples:
        partners.setdefault(example.asked, set()).add(example.answer)
    found: list[list[int]] = []
    for example in examples:
        taken = {*partners[example.asked], example.asked}
        chosen: list[int] = []
        for place in draw.sample(every, min(len(every), 4 * OTHERS)):
            if examples[place].answer not in taken and len(chosen) < OTHERS:
                taken.add(examples[place].answer)
                chosen.append(place)
        found.append(chosen)
    return found


def pairs_of(renderer: RowMaker) -> PairTexts:
    """The renderer of a task of pairs."""
    assert isinstance(renderer, PairTexts)
    return renderer


@torch.no_grad()
def _embedded(
    base: Base, texts: Sequence[Ids], pad: int, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The vectors of texts, (texts, d) on the CPU, in batches of texts of about one length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Tensor] = [torch.zeros(0)] * len(texts)
    at = 0
    while at < len(order):
        end = at + 1
        while end < len(order) and (end + 1 - at) * len(texts[order[end]]) <= AT_A_TIME:
            end += 1
        part = order[at:end]
        ids, mask = padded(base, [texts[i] for i in part], pad)
        for i, vector in zip(part, vectors_of(base, ids.to(base.device), mask.to(base.device)).cpu(), strict=True):
            found[i] = vector
        at = end
        progress(at)
    return torch.stack(found)


def embed(base: Base, adapter: Adapter | None, texts: Sequence[str]) -> Tensor:
    """The vectors of texts, (texts, d) in fp32 on the CPU, each of length 1.

    Args:
        base: The base, opened with `opened_for(adapter)`, and with nothing attached.
        adapter: An adapter of the task `embedding`; None for the base's own vectors.
        texts: The texts.

    Raises:
        AdapterError: The adapter is for another task, or belongs to another base.
        DataError: Some texts have no token, or more than the base can read; all of these are listed.
    """
    from lorafit.heads.reading import classes_of

    if adapter and (adapter.classes is None or adapter.classes.task != "embedding"):
        raise AdapterError("this adapter gives no vectors: use predict(), classify() or generate()")
    classes = (
        adapter.classes if adapter and adapter.classes else classes_of(base, (), "embedding", "FEATURE_EXTRACTION")
    )
    renderer = PairTexts(base, classes)
    ids = [renderer.ids(text) for text in texts]
    found = [(i, problem) for i, one in enumerate(ids, 1) if (problem := renderer.problem(one, sys.maxsize))]
    if found:
        raise DataError([Problem(f"text {i}", *problem) for i, problem in found])
    if adapter is None:
        return _embedded(base, ids, classes.pad)
    with attach(base, adapter):
        return _embedded(base, ids, classes.pad)


def compare_pairs(test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
    """Score embeddings: the loss of each pair, and how near the partner of each text is among all partners.

    Args:
        test: The pairs, as rows.
        adapter: The adapter.
        against: Another adapter to compare with; None for the vectors of the bare base.
    """
    base, examples, rows = test.runner.base, test.examples, [_pair(row) for row in test.rows]
    task = test.runner.task
    assert isinstance(task, Contrast)
    corpus = list(dict.fromkeys(example.answer for example in examples))
    place = {text: i for i, text in enumerate(corpus)}
    own = [{place[other.answer] for other in examples if other.asked == example.asked} for example in examples]
    texts = [row.texts[0] for row in rows] + [pairs_of(test.renderer).ids(text) for text in corpus]

    def looked(name: str, one: Adapter | None) -> tuple[list[float], list[int], list[str]]:
        """NLL, the place of the partner, and the nearest text, of each example."""
        with attach(base, one, accept_unknown_base=test.accept_unknown_base) if one else nullcontext():
            nll = test.runner.nll(rows, lambda done, of: test.watch(f"{name}: NLL", done, of))
            vectors = _embedded(
                base, texts, task.classes.pad, lambda done: test.watch(f"{name}: vectors", done, len(texts))
            )
        near = vectors[: len(rows)] @ vectors[len(rows) :].T
        places, nearest = [], []
        for i, example in enumerate(examples):
            right = place[example.answer]
            rivals = torch.ones(len(corpus), dtype=torch.bool)
            rivals[list(own[i])] = False  # other right partners are no rivals
            places.append(1 + int((near[i][rivals] >= near[i, right]).sum()))
            nearest.append(corpus[int(near[i].argmax())])
        return nll, places, nearest

    other = "base" if against is None else "other adapter"
    their_nll, their_places, their_texts = looked(other, against)
    nll, places, nearest = looked("adapter", adapter)
    groups = [example.group for example in examples]
    n = len(set(groups_of(groups)))
    scores = [AnswerScore(0, 0, 0, 0, 0, n, tuple(each), (None,) * len(rows)) for each in (their_texts, nearest)]
    ours, theirs = ((np.asarray(each),) for each in (places, their_places))
    measures = [
        measure(f"recall@{k}", lambda at, k=k: float((at <= k).mean()), ours, theirs, groups, percent=True)
        for k in NEAREST
    ]
    measures.append(measure("MRR", lambda at: float((1 / at).mean()), ours, theirs, groups))
    worst = sorted(range(len(rows)), key=lambda i: -nll[i])
    shown = worst[: SAMPLES // 2] + worst[SAMPLES // 2 :: max(1, len(worst) // SAMPLES)][: SAMPLES - SAMPLES // 2]
    return Comparison(
        nll_score(their_nll, nll, groups),
        scores[0],
        None,
        scores[1],
        tuple(
            Sample(examples[i].asked, examples[i].answer, their_texts[i], nearest[i], nearest[i] == examples[i].answer)
            for i in shown
        ),
        tuple(range(len(rows))),
        tuple(zip(their_nll, nll, strict=True)),
        None,
        measures=Measures("embedding", len(rows), tuple(measures)),
    )
