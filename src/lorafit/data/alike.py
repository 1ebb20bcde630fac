"""Near-identical texts, found among many in memory that does not grow with their length.

Two texts are near-identical when the Jaccard similarity of their sets of character 5-grams is at least 0.85 (text
lower-cased, everything but letters, digits and the signs of sums and code one space; what a tenth of all texts share,
such as an instruction put before each, is left out of account). Candidates come from MinHash with banding (Broder
1997), each is then verified exactly: at 0.85 none is missed in a billion.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

SIMILAR = 0.85
# Signs that stand for sounds in scripts that write vowels above and below the line; re does not count them to words.
_MARKS = "".join(one for one in map(chr, range(0x10000)) if unicodedata.category(one)[0] == "M")
# How a thing is written, not what: "12+5?" and "12-5?" stay two questions, and so do "a = b?" and "a != b?".
_FORM = re.compile(rf"(?:[^\w{_MARKS}+*/%=<>^~|&#@$€£°!-]|!(?!=))+|_+")
_GRAM = 5
_BANDS, _ROWS = 32, 4  # a pair at 0.85 shares a band with probability 1 - (1 - 0.85⁴)³² = 1 - 1e-10
_EQUAL = 77  # of the 128 minima, below which a pair is not looked at: at 0.85 it has 109 ± 4
_BLOCK = 256  # shingles hashed at once: larger blocks are asked of the system anew each time, five times as slow
_SKETCH = 22  # bits of a place in the table that counts shingles
_FEWEST = 20  # texts that share what is taken for form, at least
_DRAWN = np.random.default_rng(0).integers(1 << 32, size=(2, _BANDS * _ROWS, 1), dtype=np.uint32)
_SCALE, _SHIFT = _DRAWN[0] | np.uint32(1), _DRAWN[1]

Shingles = NDArray[np.uint32]


def plain(text: str) -> str:
    """What is said, without how it is written."""
    return _FORM.sub(" ", text.lower()).strip()


def shingles(text: str) -> Shingles:
    """Hashes of the character 5-grams of the normalised text, sorted, each once; of a shorter text the one hash."""
    said = np.frombuffer((plain(text) or text).encode("utf-32-le"), "<u4")  # of punctuation alone: as it stands
    if len(said) < _GRAM:
        said = np.pad(said, (0, _GRAM - len(said)))
    count = len(said) - _GRAM + 1
    mixed = np.zeros(count, np.uint32)
    for i in range(_GRAM):
        mixed = mixed * np.uint32(0x9E6D62A7) + said[i : i + count]
    for shift, odd in ((15, 0x6C8E9D75), (13, 0xB5297A4D)):  # neighbours in the alphabet become strangers
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(odd)
    mixed ^= mixed >> np.uint32(16)
    mixed.sort()
    found: Shingles = mixed[np.append(True, mixed[1:] != mixed[:-1])]
    return found


def similarity(one: Shingles, other: Shingles) -> float:
    """Jaccard similarity of two sets of shingles, 0 to 1."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def largest_similarity(held_out: Iterable[str], trained: Iterable[str]) -> float:
    """The highest similarity between any text of one side and any of the other (exact, every pair)."""
    known = [frozenset(shingles(text).tolist()) for text in trained]
    asked = (frozenset(shingles(text).tolist()) for text in held_out)
    return max((len(one & other) / len(one | other) for one in asked for other in known), default=0.0)


class Form:
    """The shingles that more than a tenth of the texts share, and more than 20 of them: how a text is asked, not what.

    They are counted in two tables by different hashes (a count-min sketch, Cormode and Muthukrishnan 2005), so that
    texts of any number and length take 42 MB; one in some thousands may be taken for form that is none.
    """

    def __init__(self, texts: Collection[str]):
        self._shared: tuple[NDArray[np.bool_], ...] = ()
        if len(texts) <= _FEWEST:
            return
        counts = np.zeros((2, 1 << _SKETCH), np.uint32)
        seen: set[bytes] = set()
        for text in texts:
            found = shingles(text)
            if (named := _digest(found)) not in seen:
                seen.add(named)
                for table, places in zip(counts, self._places(found), strict=True):
                    table[places] += np.uint32(1)
        shared = counts > max(_FEWEST, len(seen) // 10)
        if shared.any():
            self._shared = tuple(shared)

    @staticmethod
    def _places(found: Shingles) -> tuple[Shingles, Shingles]:
        shift = np.uint32(32 - _SKETCH)
        return (found * np.uint32(0x85C3A1B3)) >> shift, (found * np.uint32(0xA5F3D2C9)) >> shift

    def without(self, found: Shingles) -> Shingles:
        """The shingles that are no form; all of them, where nothing else is there."""
        if not self._shared:
            return found
        one, other = (table[places] for table, places in zip(self._shared, self._places(found), strict=True))
        left = found[~(one & other)]
        return left if len(left) else found


class TextIndex:
    """Texts, and which of them are near-identical. Built once, in about a kilobyte for each text.

    Texts have rows, in the order in which they came: those that differ in form alone have one row.
    """

    def __init__(self, texts: Iterable[str]):
        distinct = dict.fromkeys(texts)
        self._form = Form(distinct)
        self._row: dict[str, int] = {}
        self._text: list[str] = []  # the first of each row
        rows: dict[bytes, int] = {}
        lowest: list[Shingles] = []
        for text in distinct:
            found = self._form.without(shingles(text))
            row = self._row[text] = rows.setdefault(_digest(found), len(rows))
            if row == len(self._text):
                self._text.append(text)
                lowest.append(_lowest(found))
        self._lowest = np.array(lowest, np.uint32).reshape(len(lowest), _BANDS * _ROWS)
        self._bands = [self._band(self._lowest[:, k * _ROWS : (k + 1) * _ROWS]) for k in range(_BANDS)]
        self._met = np.any([place > first for _, first, place in self._bands], axis=0)  # by an earlier row, anywhere

    def __len__(self) -> int:
        return len(self._text)

    def row(self, text: str) -> int:
        """The row of one of the texts. Raises KeyError for any other."""
        return self._row[text]

    def pairs(
        self, rows: Iterable[int], wanted: Callable[[NDArray[np.int32], int], NDArray[np.bool_]]
    ) -> Iterator[tuple[int, int]]:
        """Near-identical pairs i < j of these rows.

        Args:
            rows: the rows to look at.
            wanted: called with several rows i and one row j, tells of each i whether the pair is worth verifying. A
                caller that has learnt enough of a row from earlier pairs saves the cost of the others.
        """
        among = np.zeros(len(self), np.bool_)
        among[list(rows)] = True
        for j in np.flatnonzero(among & self._met).tolist():
            own: Shingles | None = None
            seen: set[int] = set()
            for order, first, place in self._bands:
                below = order[first[j] : place[j]]
                below = below[among[below]] if len(below) else below
                below = below[wanted(below, j)] if len(below) else below
                if len(below):
                    below = below[(self._lowest[below] == self._lowest[j]).sum(axis=1) >= _EQUAL]
                while len(below):
                    i, below = int(below[0]), below[1:]
                    if i not in seen:
                        seen.add(i)
                        own = self._shingles(j) if own is None else own
                        if similarity(self._shingles(i), own) >= SIMILAR:
                            yield i, j
                            below = below[wanted(below, j)]

    def _shingles(self, row: int) -> Shingles:
        return self._form.without(shingles(self._text[row]))

    @staticmethod
    def _band(minima: Shingles) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Rows by bucket, ascending in each; where the bucket of each row begins among them; where the row itself
        lies."""
        key = np.zeros(len(minima), np.uint64)
        for k in range(_ROWS):
            key = key * np.uint64(0x9E3779B97F4A7C55) + minima[:, k]
        order = np.argsort(key, kind="stable")
        count = np.arange(len(key), dtype=np.int32)
        begins = np.append(True, key[order][1:] != key[order][:-1])[: len(key)]
        first, place = np.empty_like(count), np.empty_like(count)
        first[order] = np.maximum.accumulate(np.where(begins, count, 0))
        place[order] = count
        return order.astype(np.int32), first, place


def _digest(found: Shingles) -> bytes:
    return hashlib.blake2b(found.tobytes(), digest_size=16).digest()


def _lowest(found: Shingles) -> Shingles:
    """MinHash: the lowest of each of 128 hashes of the shingles."""
    lowest = np.full(_BANDS * _ROWS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(found), _BLOCK):
        np.minimum(lowest, (_SCALE * found[start : start + _BLOCK] + _SHIFT).min(axis=1), out=lowest)
    return lowest
