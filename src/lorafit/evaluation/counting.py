"""Counts right answers, in all and by answer, and compares them with the base, a constant answer and a classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from lorafit.data.checks import is_right
from lorafit.data.equality import compared, is_equal, json_of, key_of, label_of
from lorafit.data.examples import Example
from lorafit.data.split import groups_of
from lorafit.evaluation.classifier import MOST_ANSWERS, classified
from lorafit.evaluation.scores import Confusion, Counts, Paired, Recall, Share
from lorafit.evaluation.statistics import sign_test, wilson

USES = 4  # answers are few if there are at least so many examples per different answer, on average
LISTED = 200  # the most answers whose recall is in a summary
CONFUSED = 12  # the most confusions in a summary
TRIED, MOST_TRIED = 40_000, 20  # bounds for the constant answer: checks in all; different answers of each source
ADAPTER, CONSTANT, SIMPLE = "adapter", "most_frequent", "classifier"


def counted(
    questions: Sequence[Example],
    answers: Mapping[str, Sequence[str]],
    known: Sequence[Example] = (),
    correct: Mapping[str, Sequence[bool | None]] | None = None,
    unasked: int = 0,
) -> Counts | None:
    """Count the answers to these questions.

    Args:
        questions: The examples that were asked. If some can be scored, the others count only if their answers are few.
        answers: An answer to each question, by the name of who answers; `adapter` is among the names.
        known: Training examples, from which a classifier learns.
        correct: By name, whether each answer is right (`AnswerScore.correct`). Without it, calls are compared as they
            are spelt in the references.
        unasked: How many further examples cannot be scored.

    Returns:
        The counts; None if no question counts.
    """
    known = [example for example in known if not example.is_text and not _declines(example)]
    checked, bare = scored_and_bare(questions)
    with_bare = not checked or are_few([questions[i] for i in bare], known)
    places = sorted([*checked, *(bare if with_bare else ())])
    if not places:
        return None
    asked = [questions[i] for i in places]
    texts = {who: [each[i] for i in places] for who, each in answers.items()}
    scored = {who: [each[i] for i in places] for who, each in (correct or {}).items()}
    keys = [key_of(example) for example in asked]
    every = set(keys) | {key_of(example) for example in known}
    few = USES * len(every) <= len(asked) + len(known)
    spelt = {compared(example.answer): key_of(example) for example in (*known, *asked) if example.calls}
    constant = _constant(asked, keys, texts[ADAPTER], spelt)
    if constant is not None:
        texts[CONSTANT] = [constant] * len(asked)
    wanted = few and 2 <= len(every) <= MOST_ANSWERS and bool(known)
    simple = classified(known, asked) if wanted else None
    if simple and simple.answers is not None:
        texts[SIMPLE] = simple.answers
    groups = [example.group for example in asked]
    evidence = len(set(groups_of(groups)))

    def share(good: Sequence[bool]) -> Share:
        of = sum(good) / len(good)
        return Share(of, wilson(of * evidence, evidence))

    meant = {who: [spelt.get(key, key) for key in map(compared, each)] for who, each in texts.items()}
    good, same = {}, {}
    for who, each in texts.items():
        known_right = scored.get(who) or [
            key == reference if q.calls else None for q, key, reference in zip(asked, meant[who], keys, strict=True)
        ]
        good[who] = [right(q, text, fine) for q, text, fine in zip(asked, each, known_right, strict=True)]
        same[who] = [
            fine if q.calls else is_equal(text, q.answer) for q, text, fine in zip(asked, each, good[who], strict=True)
        ]
    against = {
        who: Paired(*sign_test([a - b for a, b in zip(good[ADAPTER], each, strict=True)], groups))
        for who, each in good.items()
        if who != ADAPTER
    }
    labels = {label_of(example.answer): key_of(example) for example in (*known, *asked) if example.label is not None}
    given = [
        reference if q.calls and fine else labels.get(label_of(text), key)
        for q, reference, text, key, fine in zip(
            asked, keys, texts[ADAPTER], meant[ADAPTER], good[ADAPTER], strict=True
        )
    ]
    recall, confusions, other = (
        _by_answer(asked, keys, texts[ADAPTER], given, good[ADAPTER], every) if few else ((), (), 0)
    )
    return Counts(
        by="check" if checked else "equality",
        n=len(asked),
        checked=len(checked),
        unchecked=0 if with_bare else len(bare) + unasked,
        json=sum(json_of(q.answer) is not None and q.answer.lstrip()[:1] in ("{", "[") for q in asked),
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
    """The positions of the examples that can be scored, and of those that cannot. Questions to decline and plain text
    are in neither list."""
    answering = [i for i, example in enumerate(examples) if not example.is_text and not _declines(example)]
    return ([i for i in answering if examples[i].is_scored], [i for i in answering if not examples[i].is_scored])


def are_few(bare: Sequence[Example], known: Sequence[Example]) -> bool:
    """Whether examples that cannot be scored have few different answers, here and in training, so that equality with
    the reference says which answers are right. If most answers do not occur in training, they must also be few on
    their own.

    Args:
        bare: Examples that cannot be scored.
        known: Training examples.
    """

    def few(keys: Sequence[str]) -> bool:
        return USES * len({*keys}) <= len(keys)

    keys = [key_of(example) for example in bare]
    learnt = [key_of(example) for example in known if not example.is_scored and not example.is_text]
    seen = {*learnt}
    return bool(keys) and few(keys + learnt) and (2 * sum(key in seen for key in keys) > len(keys) or few(keys))


def _declines(example: Example) -> bool:
    return example.check is not None and example.check.declines


def _constant(
    asked: Sequence[Example], keys: Sequence[str], given: Sequence[str], spelt: Mapping[str, str]
) -> str | None:
    """The answer that would be right most often if it were given to every question; None if none is right twice.

    Args:
        asked: The questions.
        keys: The key of each reference.
        given: The adapter's answers, which are tried in addition to the references.
        spelt: The key of each call, by its spelling.
    """
    most = max(2, min(MOST_TRIED, TRIED // (2 * len(asked))))
    of_references = _frequent(keys, [question.answer for question in asked], most)
    passes = cache(is_right)

    tried = dict.fromkeys((*of_references, *_frequent([compared(text) for text in given], given, most)))
    forms = {text: compared(text) for text in tried}
    times = Counter(dict.fromkeys(tried, 0))
    for question, key in zip(asked, keys, strict=True):  # one check after another, so that its pattern is compiled once
        for text, form in forms.items():
            if question.calls:
                times[text] += spelt.get(form, form) == key
            else:
                times[text] += passes(text, question.check) if question.check else form == key
    best, rights = max(times.items(), key=lambda item: item[1])
    return best if rights > 1 else None


def _frequent(keys: Sequence[str], texts: Sequence[str], most: int) -> list[str]:
    """The most frequent texts, and then others spread over all; each only once. keys: the key of each text."""
    times = Counter(keys)
    chosen = [key for key, n in times.most_common(most) if n > 1]
    once, room = [key for key, n in times.items() if n == 1], most - len(chosen)
    chosen += [once[i * len(once) // room] for i in range(room)] if len(once) > room else once
    first = dict(zip(reversed(keys), reversed(texts), strict=True))
    return [first[key] for key in chosen]


def right(question: Example, text: str, correct: bool | None = None) -> bool:
    """Whether an answer passes the check of its question or, without a check, equals the reference. correct: the result
    if it is already known."""
    if correct is not None:
        return correct
    return is_equal(text, question.answer) if question.check is None else is_right(text, question.check)


def _by_answer(
    asked: Sequence[Example],
    keys: Sequence[str],
    given: Sequence[str],
    keys_given: Sequence[str],
    good: Sequence[bool],
    every: set[str],
) -> tuple[tuple[Recall, ...], tuple[Confusion, ...], int]:
    """The recall of each reference, the confusions, and how many wrong answers are no example's reference.

    Args:
        asked: The questions.
        keys: The key of each reference.
        given: The adapter's answers.
        keys_given: The key of each answer.
        good: Whether each answer is right.
        every: The keys of all references, those of training included.
    """
    spelt = {key: question.answer for key, question in zip(reversed(keys), reversed(asked), strict=True)}
    times, rights = Counter(keys), Counter(key for key, fine in zip(keys, good, strict=True) if fine)
    worst = sorted(times, key=lambda key: (rights[key] - times[key], -times[key]))[:LISTED]
    gives = Counter(keys_given)
    recall = [Recall(spelt[key], times[key], rights[key], gives[key]) for key in worst]
    shown = dict(zip(keys_given, given, strict=True))
    wrong = Counter((key, answer) for key, answer, fine in zip(keys, keys_given, good, strict=True) if not fine)
    taken = [
        Confusion(spelt[key], spelt.get(answer, shown[answer]), n)
        for (key, answer), n in wrong.most_common()
        if answer in every
    ]
    other = sum(n for (_, answer), n in wrong.items() if answer not in every)
    return tuple(recall), tuple(taken[:CONFUSED]), other
