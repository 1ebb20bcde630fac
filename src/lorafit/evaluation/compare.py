"""Adapter against base (or another adapter) on held-out examples, everything paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from lorafit.adapters.adapter import Adapter
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.examples import Example
from lorafit.data.render import Renderer, Row
from lorafit.evaluation.answers import few_shots, prompts_of, score_answers
from lorafit.evaluation.counting import Counts, are_few, counted, right, scored_and_bare
from lorafit.evaluation.decoding import Decoding
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.scores import AnswerScore, NllScore
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.tasks.completion import Way
from lorafit.tasks.probe import way_of

Watch = Callable[[str, int, int], None]
SAMPLES = 4
# Questions answered where no example carries a check: as many as take ANSWERED tokens at most, between two bounds.
ANSWERED, LEAST, MOST = 8_000, 32, 200


@dataclass(frozen=True)
class Sample:
    """One question with its reference and both answers. right: whether the adapter's answer is; None where answers are
    free text, of which nobody can say it without a check."""

    question: str
    reference: str
    base: str
    adapter: str
    right: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """`base` is what the adapter is compared with: the bare base, or another adapter attached to it.

    `shots`: how many answered examples the base was given for `base_few_shot`: as many as asked for, or as fit into its
    context. `asked`: the positions of the examples that were answered; `nll_of_each`: (base, adapter) of every example.
    `counts`: right answers, None where none could be counted. `nll` is of answers alone; `reasoning` that of the
    reasoning before them, None where no example has any.
    """

    nll: NllScore
    base: AnswerScore
    base_few_shot: AnswerScore | None
    adapter: AnswerScore
    samples: tuple[Sample, ...]
    asked: tuple[int, ...]
    nll_of_each: tuple[tuple[float, float], ...]
    counts: Counts | None
    shots: int = 0
    reasoning: NllScore | None = None


def compare(
    base: Base,
    adapter: Adapter,
    renderer: Renderer,
    examples: Sequence[Example],
    rows: Sequence[Row],
    *,
    against: Adapter | None = None,
    shots_from: Sequence[Example] = (),
    shots: int = 0,
    known: Sequence[Example] = (),
    answer_all: bool = False,
    watch: Watch = lambda what, done, of: None,
    accept_unknown_base: bool = False,
    memory: int | None = None,
    way: Way | None = None,
) -> Comparison:
    """Score base and adapter on the same examples. `rows` are the examples rendered.

    Those that carry a check, or whose answer is a call, are answered, and of the others as `asked_of` says; with
    `answer_all` every question there is. Answers are decoded greedily, at most a quarter longer than the longest
    reference answer (plus 8 tokens). shots_from: examples that give the shots. known: what the adapter was trained on,
    by which answers are known to be few and from which the classifier of the counts learns. memory: bytes that decoding
    may take, None for as much as goes well. way: as `way_of` measured it on the bare base, measured here where it is
    not given; both are scored in the same one.
    """
    way = way or way_of(base, rows)
    budget = answer_tokens(rows)
    asked = asked_of(examples, rows, known, answer_all)
    questions = [examples[i] for i in asked]

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, of: watch(what, done, of)

    answers_of, thoughts_of = [row.only(False) for row in rows], [row.only(True) for row in rows if row.reasoning]

    def nll_of(name: str, one: Adapter | None) -> tuple[list[float], list[float]]:
        with attach(base, one, accept_unknown_base=accept_unknown_base) if one else nullcontext():
            thought = example_nll(base, thoughts_of, told(f"{name}: NLL of reasoning"), way) if thoughts_of else []
            return example_nll(base, answers_of, told(f"{name}: NLL"), way), thought

    other = "base" if against is None else "other adapter"
    (base_nll, base_thought), (adapter_nll, adapter_thought) = nll_of(other, against), nll_of("adapter", adapter)
    given = _fitting(base, renderer, questions, few_shots(shots_from, shots), budget) if questions else []
    plain, shown_examples = prompts_of(renderer, questions), prompts_of(renderer, questions, given) if given else []
    longest = max(map(len, [*plain, *shown_examples]), default=1)
    with Decoding(base, renderer, longest, budget, memory, accept_unknown_base) as decoding:

        def answered(what: str, prompts: Sequence[list[int]], by: Adapter | None) -> AnswerScore:
            return score_answers(questions, decoding.answers(prompts, by, told(what)), renderer)

        base_answers = answered(f"{other}: answers", plain, against)
        few = answered(f"base, {len(given)} examples given", shown_examples, None) if given else None
        adapter_answers = answered("adapter: answers", plain, adapter)
    who = {"base": base_answers, "adapter": adapter_answers} | ({"base_few_shot": few} if few else {})
    correct = {name: one.correct for name, one in who.items()}
    unasked = len({*scored_and_bare(examples)[1]} - {*asked})
    counts = counted(questions, {name: one.answers for name, one in who.items()}, known, correct, unasked)
    samples = _samples(questions, base_answers.answers, adapter_answers.answers, counts, adapter_answers.correct)
    nll = nll_score(base_nll, adapter_nll, [example.group for example in examples])
    groups = [examples[i].group for i in sorted({row.example for row in thoughts_of})]
    reasoning = nll_score(base_thought, adapter_thought, groups) if thoughts_of else None
    each = tuple(zip(base_nll, adapter_nll, strict=True))
    return Comparison(
        nll, base_answers, few, adapter_answers, samples, tuple(asked), each, counts, len(given), reasoning
    )


def asked_of(
    examples: Sequence[Example], rows: Sequence[Row], known: Sequence[Example] = (), answer_all: bool = False
) -> list[int]:
    """Positions of the examples that are answered: with answer_all every question; else those that are scored, and,
    where none is or the other answers are few, as many of the others, spread, as take about ANSWERED tokens (LEAST to
    MOST). known: what the adapter was trained on."""
    if answer_all:
        return [i for i, example in enumerate(examples) if not example.is_text]
    checked, bare = scored_and_bare(examples)
    turned = [i for i, example in enumerate(examples) if example.check is not None and example.check.declines]
    most = min(MOST, max(LEAST, ANSWERED // answer_tokens(rows)))
    others = not checked or are_few([examples[i] for i in bare], known)
    return sorted([*checked, *turned, *([bare[i] for i in _spread(len(bare), most)] if others else [])])


def answer_tokens(rows: Sequence[Row]) -> int:
    """Tokens that an answer may have: a quarter more than the longest reference, and 8."""
    return 5 * max(row.n_trained for row in rows) // 4 + 8


def nll_score(base: Sequence[float], adapter: Sequence[float], groups: Sequence[str | None]) -> NllScore:
    """Paired difference adapter − base with its interval."""
    found = paired_bootstrap([a - b for a, b in zip(adapter, base, strict=True)], groups)
    n = len(base)
    mean = (sum(adapter) - sum(base)) / n
    return NllScore(sum(base) / n, sum(adapter) / n, mean, (found.low, found.high) if found else None, n)


def _fitting(
    base: Base, renderer: Renderer, questions: Sequence[Example], shots: list[Example], budget: int
) -> list[Example]:
    """As many of the shots, the last ones first, as fit into the base's context with every question and an answer."""
    while shots and base.context is not None:
        if max(map(len, prompts_of(renderer, questions, shots))) + budget <= base.context:
            break
        shots = shots[1:]
    return shots


def _spread(n: int, k: int) -> list[int]:
    return sorted({i * n // k for i in range(k)}) if n >= k else list(range(n))


def _samples(
    questions: Sequence[Example],
    base: Sequence[str],
    adapter: Sequence[str],
    counts: Counts | None,
    correct: Sequence[bool | None],
) -> tuple[Sample, ...]:
    """A few questions with their answers: half of them wrong ones, which come first, where so many are; the others
    spread, the last one a question to decline where there is one. correct: as in AnswerScore, of the adapter."""
    told = counts is not None and counts.tells and not counts.unchecked
    good = [
        right(q, text, fine) if told or q.is_scored else None
        for q, text, fine in zip(questions, adapter, correct, strict=True)
    ]
    wrong = [i for i, fine in enumerate(good) if fine is False]
    others = [i for i, fine in enumerate(good) if fine is not False]
    few = max(SAMPLES // 2, SAMPLES - len(others))
    chosen = [wrong[i] for i in _spread(len(wrong), few)]
    chosen += [others[i] for i in _spread(len(others), SAMPLES - len(chosen))]
    declining = [i for i, q in enumerate(questions) if q.check is not None and q.check.declines]
    if declining and not set(declining) & set(chosen):
        chosen[-1] = declining[0]
    return tuple(
        Sample(questions[i].messages[-2].text, questions[i].answer, base[i], adapter[i], good[i]) for i in chosen
    )
