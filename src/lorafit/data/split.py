"""Splits: near-identical examples and groups are kept on one side, and refused across splits that were given."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lorafit.data.alike import TextIndex, plain, shingles, similarity
from lorafit.data.examples import Example, Examples
from lorafit.errors import DataError, Problem

ALIKE = 0.5  # of answers
VOICE = 10  # different answers to one request that teach how something is said
SIDES = {"train": 1, "valid": 2, "test": 4}
_SEVERAL = np.array([sides.bit_count() > 1 for sides in range(8)])  # by the sum of sides


@dataclass(frozen=True)
class Questions:
    """What examples are told apart by, indexed once for all who ask which are near-identical.

    by_answer: told apart by their answers, for all ask one and the same thing.
    """

    index: TextIndex
    by_answer: bool

    @staticmethod
    def of(examples: Examples) -> Questions:
        everything = [example for split in examples.by_name().values() for example in split]
        by_answer = asks_one_thing(everything)
        return Questions(TextIndex(e.answer if by_answer else e.question for e in everything), by_answer)

    def row(self, example: Example) -> int:
        """The row in the index of an example that was among them."""
        return self.index.row(example.answer if self.by_answer else example.question)

    def repeated(self, split: Sequence[Example]) -> int:
        """How many are near-identical to an earlier prompt."""
        if self.by_answer:
            return max(0, len(split) - 1)
        rows = dict.fromkeys(map(self.row, split))
        near = np.zeros(len(self.index), np.bool_)
        for _, j in self.index.pairs(rows, lambda i, j: np.full(len(i), not near[j])):
            near[j] = True
        return len(split) - len(rows) + int(near.sum())


def asks_one_thing(examples: Sequence[Example]) -> bool:
    """Whether all examples ask the same and answer differently, as where a voice is taught by one request: then what
    can be held out is answers."""
    if any(example.is_text for example in examples):
        return False
    questions, answers = (
        {plain(text) for text in texts}
        for texts in ([example.question for example in examples], [example.answer for example in examples])
    )
    return len(questions) == 1 and len(answers) >= VOICE


def clusters(examples: Sequence[Example], questions: Questions) -> list[list[int]]:
    """Positions of examples that must stay together: near-identical prompts (near-identical answers, where all ask one
    thing), chains of them, and those of one `group`; in order of first member."""
    cluster = np.arange(len(questions.index))
    members = {row: [row] for row in cluster.tolist()}

    def join(i: int, j: int) -> None:
        fewer, more = sorted((int(cluster[i]), int(cluster[j])), key=lambda one: len(members[one]))
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
    found: dict[int, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        found[int(cluster[row])].append(position)
    return list(found.values())


def complete(examples: Examples, share: float = 0.1, questions: Questions | None = None) -> Examples:
    """Take a missing validation or test split out of training, with no near-identical prompts, and no group, on two
    sides. Splits that were given stay as they are.

    What is held out is fixed by the data: in whatever order the rows stand, and whatever the seed of a run, so that
    runs of several seeds are judged on the same examples. questions: of these examples, where they are at hand.

    Raises DataError where that leaves nothing to judge by: too few examples, or too few that differ.
    """
    count = max(1, round(share * len(examples.train)))
    want = {name: count for name, given in examples.by_name().items() if not given}
    if not want:
        return examples
    together = clusters(examples.train, questions or Questions.of(examples))
    taken: dict[str, list[list[int]]] = {"train": [], **{name: [] for name in want}}
    for members in sorted(together, key=lambda members: _drawn([examples.train[i] for i in members])):
        side = next((name for name in want if sum(map(len, taken[name])) + len(members) <= want[name]), "train")
        taken[side].append(members)
    for name in want:
        if not taken[name] and len(taken["train"]) > 1:  # each group is larger than the share: the smallest is taken
            smallest = min(taken["train"], key=len)
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
    """As good as random, and always the same for the same messages in any order. One draw for all members: by the least
    of a draw for each, large groups would come first, and few of what is held out would be independent."""
    said = sorted(json.dumps([[message.role, message.content] for message in example.messages]) for example in members)
    return hashlib.sha256(json.dumps(said).encode()).digest()


def require_apart(examples: Examples, questions: Questions | None = None) -> int:
    """Raise DataError naming every example of valid or test that is near-identical to one it is judged apart from
    (training for both, and validation for test).

    Near-identical are examples whose prompts are, unless the prompts differ at all and their answers are different
    (similarity below 0.5): "open[yes]" and "open[no]" ask for two answers. Returns how many of those there are.
    Where all examples ask one thing, near-identical are those whose answers are. questions: of these examples, where
    they are at hand.
    """
    questions = questions or Questions.of(examples)
    everything = [(side, example) for side, split in examples.by_name().items() for example in split]
    held: dict[int, list[int]] = defaultdict(list)  # positions by row
    sides = np.zeros(len(questions.index), np.uint8)
    for position, (side, example) in enumerate(everything):
        row = questions.row(example)
        held[row].append(position)
        sides[row] |= SIDES[side]
    leaks: dict[int, int] = {}  # a held-out example, and one that it is judged apart from
    different: set[int] = set()

    def meet(earlier: Sequence[int], later: Sequence[int]) -> None:
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
        meet(held[row], held[row])
    for i, j in questions.index.pairs(held, lambda i, j: _SEVERAL[sides[i] | sides[j]]):
        meet(held[i], held[j])
        meet(held[j], held[i])
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


def _alike(one: Example, other: Example) -> bool:
    """Of two examples with near-identical prompts: whether knowing one is knowing the other."""
    if plain(one.question) == plain(other.question):
        return True
    return similarity(shingles(one.answer), shingles(other.answer)) >= ALIKE


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that names a draw, such as (run seed, "order", epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
