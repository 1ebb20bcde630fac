"""Scores a classifier by label, confusion and calibration, and compares it with a guess by the labels' frequency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.data.examples import Example
from lorafit.data.render import Row
from lorafit.data.split import groups_of
from lorafit.evaluation.compare import SAMPLES, Comparison, Watch, nll_score
from lorafit.evaluation.counting import counted
from lorafit.evaluation.scores import AnswerScore, Bin, ClassScores, Label, Sample
from lorafit.tasks.classification import Classification, LabelledRow, probabilities
from lorafit.tasks.runner import Runner

BINS = 10  # of confidence, for calibration
LISTED = 60  # labels of which the whole confusion matrix is kept


def class_scores(classes: Classes, truth: Sequence[int], likely: Tensor, learnt_from: int = 0) -> ClassScores:
    """The scores of predicted probabilities.

    Args:
        classes: The labels in the order of the head, and their weights.
        truth: The number of every example's label.
        likely: Probabilities, (examples, labels); each row sums to one.
        learnt_from: See ClassScores.
    """
    labels = classes.labels
    confidence, given = (part.tolist() for part in likely.max(-1))
    pairs = Counter(zip(truth, given, strict=True))
    have, gave = Counter(truth), Counter(given)
    per_label = []
    for i, label in enumerate(labels):
        right = pairs[i, i]
        f1 = 2 * right / (have[i] + gave[i]) if have[i] + gave[i] else 0.0
        precision, recall = (right / of[i] if of[i] else None for of in (gave, have))
        per_label.append(Label(label, have[i], precision, recall, f1))
    f1_scores = [label.f1 for i, label in enumerate(per_label) if have[i] + gave[i]]
    n, right_ones = len(truth), [a == b for a, b in zip(truth, given, strict=True)]
    bins = []
    for number in range(BINS):
        inside = [i for i, sure in enumerate(confidence) if min(BINS - 1, int(sure * BINS)) == number]
        if inside:
            mean, share = (sum(values[i] for i in inside) / len(inside) for values in (confidence, right_ones))
            bins.append(Bin(len(inside), mean, share))
    size = range(len(labels))
    return ClassScores(
        n,
        sum(right_ones) / n,
        sum(f1_scores) / len(f1_scores),
        tuple(per_label),
        tuple(tuple(pairs[i, k] for k in size) for i in size) if len(labels) <= LISTED else None,
        sum(bin_.n * abs(bin_.confidence - bin_.right) for bin_ in bins) / n,
        tuple(bins),
        learnt_from,
        bool(classes.weights),
    )


def compare_classes(
    runner: Runner,
    adapter: Adapter,
    examples: Sequence[Example],
    rows: Sequence[Row],
    *,
    known: Sequence[Example] = (),
    against: Adapter | None = None,
    watch: Watch = lambda what, done, of: None,
    accept_unknown_base: bool = False,
) -> Comparison:
    """Score a classifier on examples, compared with another adapter or with a guess that reads no text. The guess uses
    the frequencies of the labels in training, or equal ones if the labels have weights.

    Args:
        runner: A base that was opened as a classifier, and how it is run.
        adapter: The classifier.
        examples: The examples to classify.
        rows: The examples as rows.
        known: Training examples, for the frequencies of the labels and for a simple classifier. Without any, all labels
            count as equally frequent.
        against: Another adapter to compare with; None for the guess.
        watch: Called with the name of the work, the rows that are done, and the number of rows.
        accept_unknown_base: Attach adapters that do not say which base they belong to.

    It has more than six parameters; those that are set by name are optional.
    """
    task = runner.task
    assert isinstance(task, Classification)
    classes, labels = task.classes, task.classes.labels
    truth = [row.label for row in rows if isinstance(row, LabelledRow)]

    def likely_of(name: str, classifier: Adapter) -> Tensor:
        watch(name, 0, len(rows))
        with attach(runner.base, classifier, accept_unknown_base=accept_unknown_base):
            return probabilities(runner.base, task, rows, lambda done: watch(name, done, len(rows)))

    likely = likely_of("adapter: labels", adapter)
    if against is None:
        times = Counter(example.label for example in known)
        guessed = [1 if classes.weights else times[label] + 1 for label in labels]
        other_nll = _weighted(classes, [-math.log(guessed[i] / sum(guessed)) for i in truth], truth)
        usual = max(labels, key=lambda label: times[label])
        other_labels = [usual] * len(truth)
    else:
        other = likely_of("other adapter: labels", against)
        other_nll = _nll(classes, other, truth)
        other_labels = [labels[i] for i in other.argmax(-1).tolist()]
    given = [labels[i] for i in likely.argmax(-1).tolist()]
    base_score, adapter_score = (_score(examples, labels) for labels in (other_labels, given))
    correct = {"base": base_score.correct, "adapter": adapter_score.correct}
    counts = counted(examples, {"base": other_labels, "adapter": given}, known, correct)
    nll = _nll(classes, likely, truth)
    groups = [example.group for example in examples]
    return Comparison(
        nll_score(other_nll, nll, groups),
        base_score,
        None,
        adapter_score,
        _samples(examples, other_labels, given, adapter_score.correct),
        tuple(range(len(examples))),
        tuple(zip(other_nll, nll, strict=True)),
        counts,
        classes=class_scores(classes, truth, likely, len(known)),
    )


@dataclass(frozen=True)
class LabelQuestions:
    """Texts with known labels: the counterpart of `Questions` for classifiers."""

    runner: Runner
    examples: Sequence[Example]
    rows: Sequence[Row]

    def right(self, adapter: Adapter, progress: Callable[[int, int], None]) -> int:
        """How many texts the adapter labels right. Nothing may be attached to the base."""
        task = self.runner.task
        assert isinstance(task, Classification)
        with attach(self.runner.base, adapter):
            likely = probabilities(self.runner.base, task, self.rows, lambda done: progress(done, len(self.rows)))
        truth = [row.label for row in self.rows if isinstance(row, LabelledRow)]
        return sum(a == b for a, b in zip(likely.argmax(-1).tolist(), truth, strict=True))


def _nll(classes: Classes, likely: Tensor, truth: Sequence[int]) -> list[float]:
    smallest = 1e-12  # a bound for probabilities that fp32 rounds to 0
    return _weighted(
        classes, [-math.log(max(smallest, float(likely[i, label]))) for i, label in enumerate(truth)], truth
    )


def _weighted(classes: Classes, nll: list[float], truth: Sequence[int]) -> list[float]:
    """Each NLL times the weight of its label, as a share of the mean weight of these examples."""
    if not classes.weights:
        return nll
    weights = [classes.weights[i] for i in truth]
    mean = sum(weights) / len(weights)
    return [weight / mean * value for weight, value in zip(weights, nll, strict=True)]


def _score(examples: Sequence[Example], given: Sequence[str]) -> AnswerScore:
    correct = tuple(example.label == label for example, label in zip(examples, given, strict=True))
    groups = len(set(groups_of([example.group for example in examples])))
    return AnswerScore(sum(correct), len(correct), 0, 0, 0, groups, tuple(given), correct)


def _samples(
    examples: Sequence[Example], base: Sequence[str], given: Sequence[str], correct: Sequence[bool | None]
) -> tuple[Sample, ...]:
    """A few examples, spread over the set; up to half of them are wrong ones."""
    wrong = [i for i, fine in enumerate(correct) if not fine]
    right = [i for i, fine in enumerate(correct) if fine]
    few = min(len(wrong), max(SAMPLES // 2, SAMPLES - len(right)))
    chosen = wrong[:: max(1, len(wrong) // max(1, few))][:few]
    left = SAMPLES - len(chosen)
    chosen += right[:: max(1, len(right) // max(1, left))][:left]
    return tuple(
        Sample(examples[i].messages[-2].text, examples[i].answer, base[i], given[i], bool(correct[i])) for i in chosen
    )
