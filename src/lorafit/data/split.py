"""Near-duplicates: finding them, keeping them on one side of a split, and refusing them across splits.

Two prompts are near-identical when the Jaccard similarity of their sets of character 5-grams is at least 0.85
(text lower-cased, everything but letters, digits and the signs of sums and code one space; what a tenth of all
prompts share, such as an instruction put before each, is left out of account). Candidates come from MinHash with
banding (Broder 1997), each is then verified exactly: at 0.85 none is missed in a billion.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from lorafit.data.examples import Example, Examples
from lorafit.errors import DataError, Problem

SIMILAR = 0.85
ALIKE = 0.5  # of answers
VOICE = 10  # different answers to one request that teach how something is said
# Signs that stand for sounds in scripts that write vowels above and below the line; re does not count them to words.
_MARKS = "".join(one for one in map(chr, range(0x10000)) if unicodedata.category(one)[0] == "M")
# How a thing is written, not what: "12+5?" and "12-5?" stay two questions, and so do "a = b?" and "a != b?".
_FORM = re.compile(rf"(?:[^\w{_MARKS}+*/%=<>^~|&#@$€£°!-]|!(?!=))+|_+")
_BANDS, _ROWS = 32, 4  # a pair at 0.85 shares a band with probability 1 - (1 - 0.85⁴)³² = 1 - 1e-10
_PRIME = (1 << 31) - 1


def shingles(text: str) -> frozenset[int]:
    """Hashes of the character 5-grams of the normalised text."""
    plain = (_FORM.sub(" ", text.lower()).strip() or text).encode("utf-32-le")  # of punctuation alone: as it stands
    return frozenset(zlib.crc32(plain[i : i + 20]) for i in range(0, max(1, len(plain) - 16), 4))


def similarity(one: frozenset[int], other: frozenset[int]) -> float:
    """Jaccard similarity, 0 to 1."""
    return len(one & other) / len(one | other)


def shingle_sets(texts: Sequence[str]) -> list[frozenset[int]]:
    """Shingles of every text without those that a tenth of the distinct texts share (and at least 20 of them): they are
    the form of the prompts, not what is asked. A text that holds nothing else keeps all of them."""
    sets = [shingles(text) for text in texts]
    distinct = set(sets)
    held = Counter(one for each in distinct for one in each)
    form = {one for one, count in held.items() if count > max(20, len(distinct) // 10)}
    return [each - form or each for each in sets] if form else sets


def identical(sets: Sequence[frozenset[int]]) -> dict[int, list[int]]:
    """The first position of every distinct set, with all positions that hold it."""
    first_of: dict[frozenset[int], int] = {}
    found: dict[int, list[int]] = defaultdict(list)
    for j, each in enumerate(sets):
        found[first_of.setdefault(each, j)].append(j)
    return dict(found)


def near_pairs(
    sets: Sequence[frozenset[int]], among: Iterable[int], wanted: Callable[[int, int], bool] = lambda i, j: True
) -> Iterator[tuple[int, int]]:
    """Pairs of positions i < j of `among` (ascending, of distinct sets) whose sets of shingles are near-identical.

    wanted: asked before a candidate is verified; a caller that knows enough of a pair already saves its cost.
    """
    rng = np.random.default_rng(0)
    scale = rng.integers(1, _PRIME, _BANDS * _ROWS, dtype=np.uint64)
    shift = rng.integers(0, _PRIME, _BANDS * _ROWS, dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for j in among:
        other = sets[j]
        grams = np.fromiter(other, np.uint64, len(other)) % _PRIME
        lowest = ((np.outer(grams, scale) + shift) % _PRIME).min(axis=0).reshape(_BANDS, _ROWS)
        seen: set[int] = set()
        for band in range(_BANDS):
            bucket = buckets[band, lowest[band].tobytes()]
            for i in bucket:
                if i not in seen and wanted(i, j):
                    seen.add(i)
                    if similarity(sets[i], other) >= SIMILAR:
                        yield i, j
            bucket.append(j)


def asks_one_thing(examples: Sequence[Example]) -> bool:
    """Whether all examples ask the same and answer differently, as where a voice is taught by one request: then what
    can be held out is answers."""
    if any(example.is_text for example in examples):
        return False
    questions, answers = ({_plain(text) for text in texts} for texts in (
        [example.question for example in examples], [example.answer for example in examples]))  # fmt: skip
    return len(questions) == 1 and len(answers) >= VOICE


def _told_apart_by(examples: Sequence[Example]) -> list[str]:
    """The text by which each example is told apart from the others."""
    by_answer = asks_one_thing(examples)
    return [example.answer if by_answer else example.question for example in examples]


def _plain(text: str) -> str:
    """What is said, without how it is written."""
    return _FORM.sub(" ", text.lower()).strip()


def clusters(examples: Sequence[Example]) -> list[list[int]]:
    """Positions of examples that must stay together: near-identical prompts (near-identical answers, where all ask one
    thing), chains of them, and those of one `group`; in order of first member."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    named: dict[str, int] = {}
    for i, example in enumerate(examples):
        if example.group is not None:
            join(named.setdefault(example.group, i), i)
    sets = shingle_sets(_told_apart_by(examples))
    same = identical(sets)
    for first, positions in same.items():
        for i in positions:
            join(first, i)
    for i, j in near_pairs(sets, same, lambda i, j: root(i) != root(j)):
        join(i, j)
    found: dict[int, list[int]] = defaultdict(list)
    for i in range(len(examples)):
        found[root(i)].append(i)
    return list(found.values())


def complete(examples: Examples, share: float = 0.1) -> Examples:
    """Take a missing validation or test split out of training, with no near-identical prompts, and no group, on two
    sides. Splits that were given stay as they are.

    What is held out is fixed by the data: in whatever order the rows stand, and whatever the seed of a run, so that
    runs of several seeds are judged on the same examples.

    Raises DataError where that leaves nothing to judge by: too few examples, or too few that differ.
    """
    count = max(1, round(share * len(examples.train)))
    want = {name: count for name, given in examples.by_name().items() if not given}
    if not want:
        return examples
    together = clusters(examples.train)
    taken: dict[str, list[list[int]]] = {"train": [], **{name: [] for name in want}}
    for members in sorted(together, key=lambda members: min(_draw(examples.train[i]) for i in members)):
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
        problem = Problem(examples.train[0].where, what,
                          "give more examples that differ, or train, valid and test files of your own")  # fmt: skip
        raise DataError([problem])
    order = {name: sorted(chain.from_iterable(groups)) for name, groups in taken.items()}
    sides = {name: tuple(examples.train[i] for i in numbers) for name, numbers in order.items()}
    return examples.with_splits(sides)


def _draw(example: Example) -> bytes:
    """As good as random, and always the same for the same messages."""
    said = json.dumps([[message.role, message.content] for message in example.messages])
    return hashlib.sha256(said.encode()).digest()


def require_apart(examples: Examples) -> int:
    """Raise DataError naming every example of valid or test that is near-identical to one it is judged apart from
    (training for both, and validation for test).

    Near-identical are examples whose prompts are, unless the prompts differ at all and their answers are different
    (similarity below 0.5): "open[yes]" and "open[no]" ask for two answers. Returns how many of those there are.
    Where all examples ask one thing, near-identical are those whose answers are.
    """
    everything = [(side, example) for side, split in examples.by_name().items() for example in split]
    sets = shingle_sets(_told_apart_by([example for _, example in everything]))
    same = identical(sets)
    sides = {first: {everything[i][0] for i in positions} for first, positions in same.items()}
    beside: dict[int, list[int]] = defaultdict(list)  # an example, and the near-identical ones of earlier splits
    pairs = near_pairs(sets, same, lambda i, j: len(sides[i] | sides[j]) > 1)
    mixed = (positions for first, positions in same.items() if len(sides[first]) > 1)
    for met in chain(mixed, (sorted(same[i] + same[j]) for i, j in pairs)):
        for k, j in enumerate(met):
            beside[j] += [i for i in met[:k] if everything[i][0] != everything[j][0]]
    problems, different = [], 0
    for j, (side, example) in enumerate(everything):
        leak = next((i for i in beside[j] if _alike(everything[i][1], example)), None)
        if leak is not None:
            what = f"near-identical to {everything[leak][1].where} in {everything[leak][0]}"
            problems.append(Problem(example.where, what, f"remove one of the two: {side} would not be held out"))
        elif beside[j]:
            different += 1
    if problems:
        raise DataError(problems)
    return different


def _alike(one: Example, other: Example) -> bool:
    """Of two examples with near-identical prompts: whether knowing one is knowing the other."""
    if _plain(one.question) == _plain(other.question):
        return True
    return similarity(shingles(one.answer), shingles(other.answer)) >= ALIKE


def largest_similarity(held_out: Iterable[str], trained: Iterable[str]) -> float:
    """The highest similarity between any prompt of one side and any of the other (exact, every pair)."""
    known = [shingles(text) for text in trained]
    asked = (shingles(text) for text in held_out)
    return max((similarity(one, other) for one in asked for other in known), default=0.0)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that names a draw, such as (run seed, "order", epoch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
