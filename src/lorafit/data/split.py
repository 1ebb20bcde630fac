"""Splits examples, with near-identical examples and groups on one side, and checks that given splits are apart.

`complete` makes the missing splits; `require_apart` raises DataError for near-identical examples in two splits.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lorafit.data.alike import TextIndex, plain, shingles, similarity
from lorafit.data.examples import Example, Examples
from lorafit.errors import DataError, Problem

ALIKE = 0.5  # similarity of answers above which they are the same
VOICE = 10  # different answers to one request, from which on they teach a voice
FEWEST = 10  # independent examples, below which their scores get no interval
SIDES = {"train": 1, "valid": 2, "test": 4}
_SEVERAL = np.array([sides.bit_count() > 1 for sides in range(8)])  # by the sum of sides


def groups_of(names: Sequence[str | None]) -> list[str]:
    """The group of every example; an example without a group is one of its own."""
    return [f"\0{i}" if name is None else name for i, name in enumerate(names)]


@dataclass(frozen=True)
class Questions:
    """The texts by which examples are compared, indexed once for every search for near-identical texts.

    Args:
        index: of the prompts, or of the answers.
        by_answer: whether examples are compared by their answers, because all have the same prompt.
    """

    index: TextIndex
    by_answer: bool

    @staticmethod
    def of(examples: Examples) -> Questions:
        everything = [example for split in examples.by_name().values() for example in split]
        by_answer = asks_one_thing(everything)
        return Questions(TextIndex(e.answer if by_answer else e.question for e in everything), by_answer)

    def row(self, example: Example) -> int:
        """The row of an indexed example."""
        return self.index.row(example.answer if self.by_answer else example.question)

    def repeated(self, split: Sequence[Example]) -> int:
        """How many examples are near-identical to an earlier one."""
        if self.by_answer:
            return max(0, len(split) - 1)
        rows = dict.fromkeys(map(self.row, split))
        near = np.zeros(len(self.index), np.bool_)
        for _, j in self.index.pairs(rows, lambda i, j: np.full(len(i), not near[j])):
            near[j] = True
        return len(split) - len(rows) + int(near.sum())


def asks_one_thing(examples: Sequence[Example]) -> bool:
    """Whether all examples have one prompt and different answers, which teach a voice: then answers are held out."""
    if any(example.is_text for example in examples):
        return False
    questions, answers = (
        {plain(text) for text in texts}
        for texts in ([example.question for example in examples], [example.answer for example in examples])
    )
    return len(questions) == 1 and len(answers) >= VOICE


def clusters(examples: Sequence[Example], questions: Questions) -> list[list[int]]:
    """Positions of examples that must stay together, clusters in the order of their first member: those with
    near-identical prompts (answers, where all have one prompt), chains of these, and those of one `group`."""
    cluster = np.arange(len(questions.index))
    members = {row: [row] for row in cluster.tolist()}

    def join(i: int, j: int) -> None:
        fewer, more = sorted((int(cluster[i]), int(cluster[j])), key=lambda name: len(members[name]))
        if fewer != more:
            cluster[members[fewer]] = more
            members[more] += members.pop(fewer)

    rows = [questions.row(example) for example in examples]
    named: dict[str, int] = {}
    for row, example in zip(rows, examples, strict=True):
        if example.group is not None:
            join(named.setdefault(example.group, row), row)
    for i, j in questions.index.pairs(rows, lambda i, j: cluster[i] != cluster[j]):
        join(i, j)
    positions: dict[int, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        positions[int(cluster[row])].append(position)
    return list(positions.values())


def complete(examples: Examples, share: float = 0.1, questions: Questions | None = None) -> Examples:
    """Take missing validation and test splits out of training, so that no near-identical prompts, and no group, are on
    both sides. Splits that were given stay as they are.

    Only the data decide which examples are held out, not the order of the rows or the seed of a run, so that runs with
    different seeds are scored on the same examples. A label keeps its last group in training, unless most groups have a
    label of their own.

    Args:
        examples: with a training split.
        share: the share of the training examples in each new split.
        questions: the index of these examples; None to build it.

    Raises:
        DataError: for too few examples, or too few that differ.
    """
    count = max(1, round(share * len(examples.train)))
    want = {name: count for name, given in examples.by_name().items() if not given}
    if not want:
        return examples
    together = clusters(examples.train, questions or Questions.of(examples))
    taken: dict[str, list[list[int]]] = {"train": [], **{name: [] for name in want}}
    labels = [{examples.train[i].label for i in members} - {None} for members in together]
    left = Counter(chain.from_iterable(labels))  # in how many training groups each label is
    spared = 2 * len(left) <= len(together)  # else most groups have a label of their own: labels are answers
    drawn = [_drawn([examples.train[i] for i in members]) for members in together]
    for k in sorted(range(len(together)), key=drawn.__getitem__):
        members, last = together[k], spared and any(left[label] == 1 for label in labels[k])
        fitting = (name for name in want if sum(map(len, taken[name])) + len(members) <= want[name])
        side = "train" if last else next(fitting, "train")
        taken[side].append(members)
        if side != "train":
            left.subtract(labels[k])

    def only(group: list[int]) -> bool:
        """Whether it is the last group of a label."""
        return spared and any(left[examples.train[i].label] == 1 for i in group if examples.train[i].label)

    for name in want:
        if not taken[name] and len(taken["train"]) > 1:  # every group is larger than the share
            smallest = min(taken["train"], key=lambda group: (only(group), len(group)))
            taken["train"].remove(smallest)
            taken[name].append(smallest)
    if not all(taken.values()):
        n, apart = len(examples.train), len(together)
        what = (
            f"too few to split: {n} example{'s' * (n != 1)}, {apart} of them independent (of different groups, "
            f"with prompts that differ), where {1 + len(want)} are needed"
        )
        problem = Problem(
            examples.train[0].where, what, "give more examples that differ, or train, valid and test files of your own"
        )
        raise DataError([problem])
    order = {name: sorted(chain.from_iterable(groups)) for name, groups in taken.items()}
    sides = {name: tuple(examples.train[i] for i in numbers) for name, numbers in order.items()}
    return examples.with_splits(sides)


def _drawn(members: Sequence[Example]) -> bytes:
    """A pseudorandom key, the same for the same messages in any order. All members share one draw: by the least of
    several draws, large groups would come first, and few of the held-out examples would be independent."""
    texts = sorted(json.dumps([[message.role, message.content] for message in example.messages]) for example in members)
    return hashlib.sha256(json.dumps(texts).encode()).digest()


def require_apart(examples: Examples, questions: Questions | None = None) -> int:
    """Require that no example of valid or test is near-identical to one of training, or one of test to one of valid.

    Examples are near-identical when their prompts are, unless the prompts differ at all and their answers are different
    (similarity below 0.5): "open[yes]" and "open[no]" ask for two answers. Where all examples have one prompt, they are
    near-identical when their answers are.

    Args:
        examples: all splits.
        questions: the index of these examples; None to build it.

    Returns:
        How many examples have a near-identical prompt on another side, but a different answer.

    Raises:
        DataError: with every example of valid or test that is near-identical to one on another side.
    """
    questions = questions or Questions.of(examples)
    everything = [(side, example) for side, split in examples.by_name().items() for example in split]
    held: dict[int, list[int]] = defaultdict(list)  # positions by row
    sides = np.zeros(len(questions.index), np.uint8)
    for position, (side, example) in enumerate(everything):
        row = questions.row(example)
        held[row].append(position)
        sides[row] |= SIDES[side]
    leaks: dict[int, int] = {}  # by held-out example: a near-identical example on another side
    different: set[int] = set()

    def compare(earlier: Sequence[int], later: Sequence[int]) -> None:
        for j in later:
            for i in earlier:
                if j in leaks or i >= j:
                    break
                if everything[i][0] != everything[j][0]:
                    if _alike(everything[i][1], everything[j][1]):
                        leaks[j] = i
                    else:
                        different.add(j)

    for row in np.flatnonzero(_SEVERAL[sides]).tolist():
        compare(held[row], held[row])
    for i, j in questions.index.pairs(held, lambda i, j: _SEVERAL[sides[i] | sides[j]]):
        compare(held[i], held[j])
        compare(held[j], held[i])
    if leaks:
        raise DataError(
            [
                Problem(
                    everything[j][1].where,
                    f"near-identical to {everything[i][1].where} in {everything[i][0]}",
                    f"remove one of the two: {everything[j][0]} would not be held out",
                )
                for j, i in sorted(leaks.items())
            ]
        )
    return len(different)


def _alike(a: Example, b: Example) -> bool:
    """Whether two examples with near-identical prompts have the same answer, or the same prompt."""
    return plain(a.question) == plain(b.question) or similarity(shingles(a.answer), shingles(b.answer)) >= ALIKE


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the parts that name a draw, such as (run seed, "order", epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
