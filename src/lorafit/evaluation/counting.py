"""Right answers counted: against the base, against one answer given to everything, answer by answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lorafit.data.equality import compared, json_of, key_of, label_of
from lorafit.data.examples import Example
from lorafit.evaluation.answers import is_equal, is_right
from lorafit.evaluation.classifier import MOST_ANSWERS, classified
from lorafit.evaluation.statistics import groups_of, sign_test, wilson

USES = 4  # examples for each different answer, on average, from which on answers are few
LISTED = 200  # answers of which a summary says how the adapter does on them
CONFUSED = 12  # pairs of answers in a summary that are taken for each other
TRIED, MOST_TRIED = 40_000, 20  # checks of answers tried as the constant one; different answers of a source, at most
ADAPTER, CONSTANT, SIMPLE = "adapter", "most_frequent", "classifier"


@dataclass(frozen=True)
class Share:
    """Share of right answers. ci95: Wilson's interval, in which a group counts as one piece of evidence."""

    share: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """The adapter against another on the same questions: groups in which it is right more often, groups in which it is
    right less often, and the probability that a coin parts them as unevenly (`statistics.sign_test`)."""

    more: int
    fewer: int
    p: float


@dataclass(frozen=True)
class Recall:
    """An answer: how often it is the reference, on how many of these the adapter is right, how often the adapter gives
    it."""

    answer: str
    n: int
    right: int
    given: int


@dataclass(frozen=True)
class Confusion:
    """An answer that the adapter gave where another one is the reference, `n` times."""

    reference: str
    given: str
    n: int


@dataclass(frozen=True)
class Counts:
    """Right answers to n questions, those that must be turned away left out.

    by: what makes an answer right: "check" where examples are scored (by their checks, or by the calls that they ask
    for), else "equality" with the reference. A call is equal to its reference where it is right.
    checked: of the n, those that are scored; the others, whose references are few, are right by equality. unchecked:
    further questions, beside scored ones, of which nothing says what is right, and which do not count.
    json: references that are JSON objects or arrays, to which an answer is equal by content.
    few: whether the references are few different answers (`distinct`), used again and again.
    right, equal: shares by name of who answers: base, base_few_shot, adapter; most_frequent, which gives one answer to
    everything, the one that is right most often; classifier. The last two are missing where no answer is right twice,
    and where none could be fitted. most_frequent: that answer.
    against: the adapter and each of the others, by `right`.
    recall: where answers are few, those that most often went wrong, LISTED at most; confusions: the most frequent ones;
    other: wrong answers that are nobody's reference.
    classifier_missing: why there is none where one would be of use, such as "not installed". classifier_learnt: from
    how many examples it has learnt, and of how many, where there is one.
    """

    by: str
    n: int
    checked: int
    unchecked: int
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
    classifier_learnt: tuple[int, int] | None

    @property
    def tells(self) -> bool:
        """Whether the shares say how good the answers are: of free text, which has no one right wording, equality
        does not."""
        return self.by == "check" or self.few or self.json == self.n


def counted(
    questions: Sequence[Example],
    answers: Mapping[str, Sequence[str]],
    known: Sequence[Example] = (),
    correct: Mapping[str, Sequence[bool | None]] | None = None,
    unasked: int = 0,
) -> Counts | None:
    """Count the answers to these questions.

    Args:
        questions: examples that were asked. Where some are scored, the others count where their answers are few.
        answers: by name of who answers, one to each question; `adapter` among them.
        known: examples of training, from which a classifier learns.
        correct: by name, of each answer whether it is right, None where nothing says it (`AnswerScore.correct`). Calls
            are read there; without it they are known by how the references spell them.
        unasked: further examples that are not scored.

    Returns:
        None where no question counts.
    """
    known = [one for one in known if not one.is_text and not _declines(one)]
    checked, bare = scored_and_bare(questions)
    with_bare = not checked or are_few([questions[i] for i in bare], known)
    places = sorted([*checked, *(bare if with_bare else ())])
    if not places:
        return None
    asked = [questions[i] for i in places]
    texts = {who: [each[i] for i in places] for who, each in answers.items()}
    found = {who: [each[i] for i in places] for who, each in (correct or {}).items()}
    keys = [key_of(one) for one in asked]
    every = set(keys) | {key_of(one) for one in known}
    few = USES * len(every) <= len(asked) + len(known)
    spelt = {compared(one.answer): key_of(one) for one in (*known, *asked) if one.calls}
    constant = _constant(asked, keys, texts[ADAPTER], spelt)
    if constant is not None:
        texts[CONSTANT] = [constant] * len(asked)
    wanted = few and 2 <= len(every) <= MOST_ANSWERS and bool(known)
    simple = classified(known, asked) if wanted else None
    if simple and simple.answers is not None:
        texts[SIMPLE] = simple.answers
    groups = [one.group for one in asked]
    evidence = len(set(groups_of(groups)))

    def share(good: Sequence[bool]) -> Share:
        of = sum(good) / len(good)
        return Share(of, wilson(of * evidence, evidence))

    meant = {who: [spelt.get(key, key) for key in map(compared, each)] for who, each in texts.items()}
    good, same = {}, {}
    for who, each in texts.items():
        told = found.get(who) or [
            key == own if q.calls else None for q, key, own in zip(asked, meant[who], keys, strict=True)
        ]
        good[who] = [right(q, text, fine) for q, text, fine in zip(asked, each, told, strict=True)]
        same[who] = [
            fine if q.calls else is_equal(text, q.answer) for q, text, fine in zip(asked, each, good[who], strict=True)
        ]
    against = {
        who: Paired(*sign_test([a - b for a, b in zip(good[ADAPTER], each, strict=True)], groups))
        for who, each in good.items()
        if who != ADAPTER
    }
    labels = {label_of(one.answer): key_of(one) for one in (*known, *asked) if one.label is not None}
    said = [
        own if q.calls and fine else labels.get(label_of(text), key)
        for q, own, text, key, fine in zip(asked, keys, texts[ADAPTER], meant[ADAPTER], good[ADAPTER], strict=True)
    ]
    recall, confusions, other = (
        _by_answer(asked, keys, texts[ADAPTER], said, good[ADAPTER], every) if few else ((), (), 0)
    )
    return Counts(
        by="check" if checked else "equality",
        n=len(asked),
        checked=len(checked),
        unchecked=0 if with_bare else len(bare) + unasked,
        json=sum(json_of(one.answer) is not None and one.answer.lstrip()[:1] in ("{", "[") for one in asked),
        distinct=len(set(keys)),
        few=few,
        right={who: share(each) for who, each in good.items()},
        equal={who: share(each) for who, each in same.items()},
        against=against,
        most_frequent=constant,
        recall=recall,
        confusions=confusions,
        other=other,
        classifier_missing=simple.missing if simple else None,
        classifier_learnt=(simple.learnt, len(known)) if simple and simple.answers is not None else None,
    )


def scored_and_bare(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Positions of the examples that are scored, and of those of which nothing says what is right; those that must be
    turned away, and plain text, are among neither."""
    answering = [i for i, one in enumerate(examples) if not one.is_text and not _declines(one)]
    return ([i for i in answering if examples[i].is_scored], [i for i in answering if not examples[i].is_scored])


def are_few(bare: Sequence[Example], known: Sequence[Example]) -> bool:
    """Whether examples that are not scored have few different answers, used again and again, here and in training: then
    equality says which are right. Answers that are not among those that were learnt must be few on their own too."""

    def few(keys: Sequence[str]) -> bool:
        return USES * len({*keys}) <= len(keys)

    keys = [key_of(one) for one in bare]
    learnt = [key_of(one) for one in known if not one.is_scored and not one.is_text]
    seen = {*learnt}
    return bool(keys) and few(keys + learnt) and (2 * sum(key in seen for key in keys) > len(keys) or few(keys))


def _declines(example: Example) -> bool:
    return example.check is not None and example.check.declines


def _constant(
    asked: Sequence[Example], keys: Sequence[str], given: Sequence[str], spelt: Mapping[str, str]
) -> str | None:
    """The answer that is right most often when it is given to every question, among references and what the adapter
    gave; None where none is right twice. Counted by what is right, for many texts may pass one check.

    keys: what stands for each reference. spelt: what stands for each call, by how it is spelt.
    """
    most = max(2, min(MOST_TRIED, TRIED // (2 * len(asked))))
    of_references = _frequent(keys, [one.answer for one in asked], most)
    passes = cache(is_right)

    tried = dict.fromkeys((*of_references, *_frequent([compared(text) for text in given], given, most)))
    forms = {text: compared(text) for text in tried}
    times = Counter(dict.fromkeys(tried, 0))
    for question, key in zip(asked, keys, strict=True):  # one check after another: its pattern is compiled once
        for text, form in forms.items():
            if question.calls:
                times[text] += spelt.get(form, form) == key
            else:
                times[text] += passes(text, question.check) if question.check else form == key
    best, rights = max(times.items(), key=lambda one: one[1])
    return best if rights > 1 else None


def _frequent(keys: Sequence[str], texts: Sequence[str], most: int) -> list[str]:
    """The most frequent texts, then others spread over the whole, each once. keys: what stands for each."""
    times = Counter(keys)
    chosen = [key for key, n in times.most_common(most) if n > 1]
    once, room = [key for key, n in times.items() if n == 1], most - len(chosen)
    chosen += [once[i * len(once) // room] for i in range(room)] if len(once) > room else once
    first = dict(zip(reversed(keys), reversed(texts), strict=True))
    return [first[key] for key in chosen]


def right(question: Example, text: str, correct: bool | None = None) -> bool:
    """Whether an answer passes the check of its question; without one, whether it equals the reference. correct: what
    is known of it already."""
    if correct is not None:
        return correct
    return is_equal(text, question.answer) if question.check is None else is_right(text, question.check)


def _by_answer(
    asked: Sequence[Example],
    keys: Sequence[str],
    given: Sequence[str],
    said: Sequence[str],
    good: Sequence[bool],
    every: set[str],
) -> tuple[tuple[Recall, ...], tuple[Confusion, ...], int]:
    """How the adapter does on each reference, which answers it takes for each other, and how many of its wrong ones are
    the reference of no example. keys, said: what stands for each reference, and for each answer."""
    spelt = {key: one.answer for key, one in zip(reversed(keys), reversed(asked), strict=True)}
    times, rights = Counter(keys), Counter(key for key, fine in zip(keys, good, strict=True) if fine)
    worst = sorted(times, key=lambda key: (rights[key] - times[key], -times[key]))[:LISTED]
    gives = Counter(said)
    recall = [Recall(spelt[key], times[key], rights[key], gives[key]) for key in worst]
    shown = dict(zip(said, given, strict=True))
    wrong = Counter((key, one) for key, one, fine in zip(keys, said, good, strict=True) if not fine)
    taken = [
        Confusion(spelt[key], spelt.get(one, shown[one]), n) for (key, one), n in wrong.most_common() if one in every
    ]
    other = sum(n for (_, one), n in wrong.items() if one not in every)
    return tuple(recall), tuple(taken[:CONFUSED]), other
