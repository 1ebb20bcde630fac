"""The task of token classification: to find the entities of a text, each a span with a label."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import regex

from lorafit.bases.opening import Opening
from lorafit.data.examples import Example, Examples
from lorafit.data.iob import spans_of, tags_of
from lorafit.data.targets import Span, Spans, Target, shown_spans
from lorafit.errors import BaseError, DataError, Problem, SettingsError
from lorafit.heads.head import Terms, listed
from lorafit.heads.texts import Guess, Read, TextHead, asked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lorafit.adapters.rendering import Classes
    from lorafit.evaluation.scores import Measures
    from lorafit.heads.reading import Texts

UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces between words
# A character of such a script, the characters of another word, or one sign, once or several times in a row (++, ...).
# Marks, such as the accents of decomposed letters, belong to what they stand on.
WORD = regex.compile(
    rf"[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}])[\w\p{{M}}\p{{N}}])+|([^\w\s\p{{M}}\p{{N}}])\1*\p{{M}}*"
)

ENTITIES = Terms(
    "tag",
    "text",
    "a guess by tag frequency",
    "tag frequencies, and no entity",
    "word",
    "right tags",
    "get the right tags",
    "It finds entities of the labels it was trained on, in texts like those it was trained on.",
    reads=False,
    field="entities",
    needs="them",
    labelled="entities",
    notes=(
        "an entity is right if its start, its end and its label are right",
        "precision: share of right ones among the entities found; recall: share of the entities that are found; F1: "
        "their harmonic mean; macro-F1: mean of F1 over the labels",
    ),
)
Predicted = tuple[Span, ...]


@dataclass(frozen=True)
class Tags:
    """Reads a text and gives each word an IOB tag. It implements `Reader`; a prediction is a tuple of spans."""

    target: type[Target] = Spans
    exact: bool = False

    def labels(self, examples: Examples) -> tuple[str, ...]:
        names = sorted({span.label for example in examples.train for span in spans_in(example.target)})
        if not names:
            what = "no training example has an entity, so there is nothing to learn"
            raise DataError([Problem(examples.train[0].where, what, "add examples with entities")])
        return ("O", *(f"{kind}-{name}" for name in names for kind in "BI"))

    def fitted(self, classes: Classes, train: Sequence[Example]) -> Classes:
        if not any(spans_in(example.target) for example in train):
            raise SettingsError("--skip-bad: leaves no training example with an entity: raise --max-length")
        return classes

    def read(self, texts: Texts, example: Example) -> Read | tuple[str, str]:
        spans, known = spans_in(example.target), {label[2:] for label in texts.classes.labels}
        if unknown := sorted({span.label for span in spans} - known):
            what = f"has label {', '.join(map(repr, unknown))}, which no training example has"
            return what, "correct it, or add examples of it to training"
        ids, words, first = aligned(texts, asked(example))
        tags = tags_of(words, spans)
        if (marked := spans_of(words, tags)) != spans:
            return _unmarkable(asked(example), spans, marked)
        numbers = {label: i for i, label in enumerate(texts.classes.labels)}
        values = tuple((float(numbers[tag]),) for tag in tags)
        return Read(ids, tuple(i in first for i in range(len(ids))), values)

    def loss(self, outputs: Tensor, values: Tensor, classes: Classes) -> Tensor:
        """The cross-entropy of each word's tag."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, values[:, 0].long(), reduction="none")

    def truth(self, target: Target) -> Predicted:
        return spans_in(target)

    def predicted(self, outputs: Tensor, read: Read, texts: Texts, example: Example) -> Predicted:
        _, words, _ = aligned(texts, asked(example))
        return spans_of(words, [texts.classes.labels[i] for i in outputs.argmax(-1).tolist()])

    def guess(self, classes: Classes, train: Sequence[Example]) -> Guess:
        """The log-frequency of each tag, counted once more; and no entity."""
        times = Counter(tag for e in train for tag in tags_of(words_of(asked(e)), spans_in(e.target)))
        whole = sum(times.values()) + len(classes.labels)
        return Guess(tuple(math.log((times[label] + 1) / whole) for label in classes.labels), ())

    def text(self, prediction: Predicted, text: str) -> str:
        return shown_spans(text, prediction)

    def shown(self, values: Sequence[float], classes: Classes) -> str:
        tag = classes.labels[int(values[0])]
        return "" if tag == "O" else tag

    def measures(
        self,
        classes: Classes,
        truth: Sequence[Predicted],
        adapter: Sequence[Predicted],
        base: Sequence[Predicted],
        groups: Sequence[str | None],
    ) -> Measures:
        import numpy as np

        from lorafit.evaluation.measures import label_scores, measure
        from lorafit.evaluation.scores import Measures

        names = [label[2:] for label in classes.labels if label.startswith("B-")]

        def counts(spans: Sequence[Predicted]) -> NDArray[np.int64]:
            """(texts, labels)"""
            return np.asarray([[sum(one.label == name for one in each) for name in names] for each in spans])

        def pair(given: Sequence[Predicted]) -> tuple[NDArray[np.int64], ...]:
            both = [tuple({*a} & {*b}) for a, b in zip(truth, given, strict=True)]
            return counts(both), counts(given), counts(truth)

        ours, theirs = pair(adapter), pair(base)
        scores = {"entity F1": f1_of, "precision": precision_of, "recall": recall_of, "macro-F1": macro_f1_of}
        return Measures(
            "entities",
            len(truth),
            tuple(measure(name, score, ours, theirs, groups) for name, score in scores.items()),
            label_scores(names, *([int(n) for n in each.sum(0)] for each in ours)),
        )

    def said(self, classes: Classes) -> str:
        names = [label[2:] for label in classes.labels if label.startswith("B-")]
        return f"It finds the entities of a text, of {len(names)} labels: {listed(names, '`')}."

    def after(self, classes: Classes) -> list[str]:
        return ['print([classes["labels"][i] for i in logits.argmax(-1)])  # only the first token of a word counts']


def spans_in(target: Target | None) -> Predicted:
    """The entities of an example."""
    assert isinstance(target, Spans)
    return target.spans


def _unmarkable(text: str, spans: Predicted, marked: Predicted) -> tuple[str, str]:
    """What is wrong with entities that are no whole words, and what to do. marked: what their tags say instead."""

    def named(some: Sequence[Span]) -> str:
        return " and ".join(f"{text[one.start : one.end]!r} ({one.start} to {one.end}, {one.label})" for one in some)

    wrong = [one for one in spans if one not in marked]
    instead = [one for one in marked if one not in spans]
    fix = f"mark {named(instead)} instead" if instead else "leave it out"
    return f"entities that are not whole words to this base: {named(wrong)}", f"{fix}, or --skip-bad"


def words_of(text: str) -> list[tuple[int, int]]:
    """Start and end of each word and sign."""
    return [match.span() for match in WORD.finditer(text)]


def aligned(texts: Texts, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]], set[int]]:
    """The tokens of a text, its words, and the first token of each word.

    Of words that share a token, letters belong to the word before them, and signs to no word. Raises BaseError for a
    tokenizer that does not say where its tokens are.
    """
    tokenizer = texts.base.tokenizer
    if not tokenizer.is_fast:
        raise BaseError(
            f"'{texts.base.name}': its tokenizer does not say where in a text its tokens are, which entities need: "
            "choose a base with a tokenizer.json"
        )
    coded = tokenizer(text, return_offsets_mapping=True)
    places: list[tuple[int, int]] = [(int(start), int(end)) for start, end in coded["offset_mapping"]]
    words: list[tuple[int, int]] = []
    first: list[int] = []
    at = 0
    for start, end in words_of(text):
        while at < len(places) and (places[at][1] <= start or places[at][0] == places[at][1]):
            at += 1
        if at < len(places) and places[at][0] < end and (not first or at > first[-1]):
            words.append((start, end))
            first.append(at)
        elif words and text[start].isalnum():  # the t of don't; a sign in one token with the sign before is left out
            words[-1] = (words[-1][0], end)
    return tuple(coded["input_ids"]), words, set(first)


def f1_of(hits: NDArray[np.int64], given: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Of all entities of all texts together. Each (texts, labels)."""
    below = int(given.sum() + wanted.sum())
    return 2 * int(hits.sum()) / below if below else math.nan


def precision_of(hits: NDArray[np.int64], given: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    return int(hits.sum()) / int(given.sum()) if given.sum() else math.nan


def recall_of(hits: NDArray[np.int64], given: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    return int(hits.sum()) / int(wanted.sum()) if wanted.sum() else math.nan


def macro_f1_of(hits: NDArray[np.int64], given: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """The mean over the labels that some text has or is given."""
    below = given.sum(0) + wanted.sum(0)
    return float((2 * hits.sum(0)[below > 0] / below[below > 0]).mean()) if below.any() else math.nan


HEAD = TextHead(
    name="entities",
    model="a tagger",
    pipeline="token-classification",
    opening=Opening(
        "AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "tagger of tokens"
    ),
    peft="TOKEN_CLS",
    words=ENTITIES,
    reader=Tags(),
)
