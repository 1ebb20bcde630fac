"""The scores of an evaluation, as values that are written to disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class NllScore:
    """Mean completion NLL of base and adapter, in nats per trained token, averaged over examples.

    Args:
        base: Under the base.
        adapter: Under the adapter.
        difference: adapter − base, paired by example; below zero the adapter is better.
        ci95: The 95 % interval of the difference; None if there are too few independent examples.
        n: Examples.
    """

    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class AnswerScore:
    """The answers of one model, decoded greedily.

    Args:
        right: Right answers to questions that can be scored.
        n: Questions that can be scored, without those to decline.
        declined: Questions to decline that were declined.
        off_desk_n: Questions to decline.
        natural_stops: Answers that ended with an end-of-turn token.
        groups: Groups of independent examples among the `n`.
        answers: The texts.
        correct: Whether each answer is right; None if it cannot be scored.
    """

    right: int
    n: int
    declined: int
    off_desk_n: int
    natural_stops: int
    groups: int
    answers: tuple[str, ...] = ()
    correct: tuple[bool | None, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None if no question can be scored."""
        return self.right / self.n if self.n else None


@dataclass(frozen=True)
class Share:
    """The share of right answers. ci95: Wilson's interval, in which a group counts as one example."""

    share: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """The adapter against another model on the same questions.

    Args:
        more: Groups in which the adapter is right more often.
        fewer: Groups in which it is right less often.
        p: The p-value of the difference (`statistics.sign_test`).
    """

    more: int
    fewer: int
    p: float


@dataclass(frozen=True)
class Recall:
    """The adapter's recall of one answer.

    Args:
        answer: The answer.
        n: How often it is the reference.
        right: How often the adapter is right on these.
        given: How often the adapter gives it.
    """

    answer: str
    n: int
    right: int
    given: int


@dataclass(frozen=True)
class Confusion:
    """An answer that the adapter gave `n` times instead of the reference."""

    reference: str
    given: str
    n: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Right answers counted, without the questions to decline.

    The shares are by the name of who answers: base, base_few_shot, adapter, most_frequent (the constant answer) and
    classifier. The last two are missing if no constant answer is right twice, or if no classifier could be fitted.

    Args:
        by: What makes an answer right: "check" (the example's check, or the calls that it asks for), or "equality" with
            the reference. A call is equal to its reference if it is right.
        n: Questions.
        checked: Those of the n that have a check; the others have few different references, and count by equality.
        unchecked: Further questions that cannot be scored and do not count.
        json: References that are JSON objects or arrays; answers are compared with them by content.
        distinct: Different references.
        few: Whether these are few, used again and again.
        right: Shares of right answers.
        equal: Shares of answers that are equal to the reference.
        against: The adapter against each of the others, by `right`.
        most_frequent: The constant answer that is right most often.
        recall: If answers are few, those that went wrong most often, at most LISTED.
        confusions: The most frequent ones.
        other: Wrong answers that are no example's reference.
        classifier_missing: Why there is no classifier although one would be useful, such as "not installed".
        classifier_learnt: How many training examples the classifier has learnt from, and how many there are.
    """

    by: str
    n: int
    checked: int = 0  # as in the files of earlier versions
    unchecked: int = 0
    json: int
    distinct: int
    few: bool
    right: dict[str, Share]
    equal: dict[str, Share]
    against: dict[str, Paired]
    most_frequent: str | None
    recall: tuple[Recall, ...]
    confusions: tuple[Confusion, ...]
    other: int
    classifier_missing: str | None
    classifier_learnt: tuple[int, int] | None = None

    @property
    def tells(self) -> bool:
        """Whether the shares measure the quality of the answers. For free text, which has many right wordings, equality
        with the reference does not."""
        return self.by == "check" or self.few or self.json == self.n


@dataclass(frozen=True)
class Label:
    """The scores of one label. n: examples that have it. precision: None if it is never given."""

    label: str
    n: int
    precision: float | None
    recall: float | None
    f1: float


@dataclass(frozen=True)
class Bin:
    """The examples whose confidence, the probability of the most likely label, is in one of BINS equal ranges.

    Args:
        n: Examples.
        confidence: Mean confidence.
        right: Share of right labels.
    """

    n: int
    confidence: float
    right: float


@dataclass(frozen=True)
class ClassScores:
    """The scores of a classifier on `n` examples.

    Args:
        accuracy: Share of right labels.
        macro_f1: Mean F1 of the labels that examples have or the classifier gives.
        per_label: Scores of every label, in the order of the head.
        confusion: The number of examples by (their label, the given label), in the order of `per_label`; None for more
            than LISTED labels.
        calibration_error: Mean distance between confidence and share of right labels, weighted by bin (Naeini et al.
            2015, doi 10.1609/aaai.v29i1.9602).
        bins: From the lowest confidence to the highest, without empty ones.
        learnt_from: Training examples from which the guess has the frequencies of labels; 0 for equal frequencies.
        weighted: Whether labels have weights, by which NLL is multiplied. All other scores count examples equally.
    """

    n: int
    accuracy: float
    macro_f1: float
    per_label: tuple[Label, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    calibration_error: float
    bins: tuple[Bin, ...]
    learnt_from: int = 0
    weighted: bool = False


@dataclass(frozen=True)
class Measure:
    """A score of the adapter, and of what it is compared with.

    Args:
        name: Its name in tables.
        adapter: Of the adapter; None if it is not defined.
        base: Of the other; None if it is not defined.
        ci95: The 95 % interval of `adapter`; None if there are too few independent examples.
        difference: The 95 % interval of adapter − base, on the same draws; None like `ci95`.
        percent: Whether it is shown as a percentage.
    """

    name: str
    adapter: float | None
    base: float | None
    ci95: tuple[float, float] | None = None
    difference: tuple[float, float] | None = None
    percent: bool = False


@dataclass(frozen=True)
class Measures:
    """The scores of a task that has other scores than right answers.

    Args:
        task: The name of the task.
        n: Examples.
        scores: The scores, the most important first.
        per_label: Scores of every label; empty for a task without labels.
    """

    task: str
    n: int
    scores: tuple[Measure, ...]
    per_label: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One question with its reference and both answers. right: whether the adapter's answer is right; None if it cannot
    be scored."""

    question: str
    reference: str
    base: str
    adapter: str
    right: bool | None = None
