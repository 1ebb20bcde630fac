"""Compares an adapter with its base, or with another adapter, on the same held-out examples."""

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
from lorafit.evaluation.counting import are_few, counted, right, scored_and_bare
from lorafit.evaluation.decoding import Decoding
from lorafit.evaluation.scores import AnswerScore, ClassScores, Counts, Measures, NllScore, Sample
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.tasks.runner import Runner

Watch = Callable[[str, int, int], None]
SAMPLES = 4
# If no example has a check, as many questions are answered as take ANSWERED tokens, but LEAST to MOST.
ANSWERED, LEAST, MOST = 8_000, 32, 200


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. "Base" is the bare base, or the other adapter.

    Args:
        nll: NLL of the answers only, without their reasoning.
        base: The base's answers.
        base_few_shot: The base's answers after the shots; None without shots.
        adapter: The adapter's answers.
        samples: A few questions with their answers.
        asked: The positions of the examples that were answered.
        nll_of_each: The NLL of every example under (base, adapter).
        counts: Right answers; None if none could be counted.
        shots: How many answered examples are in the base's prompt: as many as were asked for and fit into its context.
        reasoning: NLL of the reasoning before the answers; None if no example has any.
        classes: The scores of a classifier; None for other adapters.
        measures: The scores of a task with other scores than right answers; None for other tasks.
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
    classes: ClassScores | None = None
    measures: Measures | None = None


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
    runner: Runner | None = None,
) -> Comparison:
    """Score base and adapter on the same examples. It has more than six parameters; those that are set by name are
    optional.

    Answers are decoded greedily, with at most `answer_tokens` tokens.

    Args:
        base: The base, with nothing attached.
        adapter: The adapter.
        renderer: Renders the prompts.
        examples: The examples.
        rows: The examples as rows.
        against: Another adapter to compare with; None for the bare base.
        shots_from: The examples from which shots are taken.
        shots: How many shots the base is given.
        known: The examples that the adapter was trained on. They decide whether answers count as few, and a simple
            classifier learns from them.
        answer_all: Whether every question is answered, not only those of `asked_of`.
        watch: Called with the name of the work, how much of it is done, and how much there is.
        accept_unknown_base: Attach adapters that do not say which base they belong to.
        memory: Bytes that decoding may take; None for no limit.
        runner: How the base is run; None to measure it here.
    """
    runner = runner or Runner.of(base, rows)
    budget = answer_tokens(rows)
    asked = asked_of(examples, rows, known, answer_all)
    questions = [examples[i] for i in asked]

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, of: watch(what, done, of)

    answers_of, thoughts_of = [row.only(False) for row in rows], [row.only(True) for row in rows if row.reasoning]

    def nll_of(name: str, by: Adapter | None) -> tuple[list[float], list[float]]:
        with attach(base, by, accept_unknown_base=accept_unknown_base) if by else nullcontext():
            thought = runner.nll(thoughts_of, progress(f"{name}: NLL of reasoning")) if thoughts_of else []
            return runner.nll(answers_of, progress(f"{name}: NLL")), thought

    other = "base" if against is None else "other adapter"
    (base_nll, base_thought), (adapter_nll, adapter_thought) = nll_of(other, against), nll_of("adapter", adapter)
    given = _fitting(base, renderer, questions, few_shots(shots_from, shots), budget) if questions else []
    plain, shown_examples = prompts_of(renderer, questions), prompts_of(renderer, questions, given) if given else []
    longest = max(map(len, [*plain, *shown_examples]), default=1)
    with Decoding(base, renderer, longest, budget, memory, accept_unknown_base) as decoding:

        def answered(what: str, prompts: Sequence[list[int]], by: Adapter | None) -> AnswerScore:
            return score_answers(questions, decoding.answers(prompts, by, progress(what)), renderer)

        base_answers = answered(f"{other}: answers", plain, against)
        few = answered(f"base, {len(given)} examples given", shown_examples, None) if given else None
        adapter_answers = answered("adapter: answers", plain, adapter)
    who = {"base": base_answers, "adapter": adapter_answers} | ({"base_few_shot": few} if few else {})
    correct = {name: score.correct for name, score in who.items()}
    unasked = len({*scored_and_bare(examples)[1]} - {*asked})
    counts = counted(questions, {name: score.answers for name, score in who.items()}, known, correct, unasked)
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
    """The positions of the examples that are answered.

    These are all examples that can be scored or that must be declined. If none can be scored, or if the other answers
    are few, some of the others are added: as many as take about ANSWERED tokens, but LEAST to MOST.

    Args:
        examples: The examples.
        rows: The examples as rows.
        known: The examples that the adapter was trained on.
        answer_all: Whether every question is answered.
    """
    if answer_all:
        return [i for i, example in enumerate(examples) if not example.is_text]
    checked, bare = scored_and_bare(examples)
    turned = [i for i, example in enumerate(examples) if example.check is not None and example.check.declines]
    most = min(MOST, max(LEAST, ANSWERED // answer_tokens(rows)))
    others = not checked or are_few([examples[i] for i in bare], known)
    return sorted([*checked, *turned, *([bare[i] for i in _spread(len(bare), most)] if others else [])])


def answer_tokens(rows: Sequence[Row]) -> int:
    """The longest answer in tokens: a quarter more than the longest reference, plus 8."""
    return 5 * max(row.n_trained for row in rows) // 4 + 8


def nll_score(base: Sequence[float], adapter: Sequence[float], groups: Sequence[str | None]) -> NllScore:
    """The paired difference adapter − base with its interval."""
    interval = paired_bootstrap([a - b for a, b in zip(adapter, base, strict=True)], groups)
    n = len(base)
    mean = (sum(adapter) - sum(base)) / n
    return NllScore(sum(base) / n, sum(adapter) / n, mean, (interval.low, interval.high) if interval else None, n)


def _fitting(
    base: Base, renderer: Renderer, questions: Sequence[Example], shots: list[Example], budget: int
) -> list[Example]:
    """The last shots, as many as fit into the base's context together with any question and an answer."""
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
    """A few questions with their answers: first the wrong ones, up to half, then others, spread over the set. The last
    one is a question to decline, if there is one. correct: of the adapter, as in AnswerScore."""
    scored = counts is not None and counts.tells and not counts.unchecked
    good = [
        right(q, text, fine) if scored or q.is_scored else None
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
    return tuple(Sample(questions[i].asked, questions[i].answer, base[i], adapter[i], good[i]) for i in chosen)
