"""Finds near-identical texts among many, in memory that does not grow with their length.

Two texts are near-identical when the Jaccard similarity of their sets of character 5-grams is at least 0.85 (in
lower case, with a space for everything but letters, digits and the signs of sums and code; what a tenth of all texts
share, such as an instruction before each, does not count). Candidates come from MinHash with banding (Broder 1997), and
each is then verified exactly: at 0.85, one pair in ten billion is missed.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

SIMILAR = 0.85
# Signs for vowels above and below the line in some scripts, which are no part of words for re.
_MARKS = "".join(sign for sign in map(chr, range(0x10000)) if unicodedata.category(sign)[0] == "M")
# What plays no part in a comparison: "12+5?" and "12-5?" stay two questions, and so do "a = b?" and "a != b?".
_FORM = re.compile(rf"(?:[^\w{_MARKS}+*/%=<>^~|&#@$€£°!-]|!(?!=))+|_+")
_GRAM = 5
_BANDS, _ROWS = 32, 4  # a pair at 0.85 shares a band with probability 1 - (1 - 0.85⁴)³² = 1 - 1e-10
_EQUAL = 77  # equal minima, of 128, below which a pair is not verified: a pair at 0.85 has 109 ± 4
_BLOCK = 256  # shingles hashed at once: larger blocks are allocated by the system each time, five times as slow
_SKETCH = 22  # bits of a place in the table that counts shingles
_FEWEST = 20  # texts that share a shingle, above which it may be form
_DRAWN = np.random.default_rng(0).integers(1 << 32, size=(2, _BANDS * _ROWS, 1), dtype=np.uint32)
_SCALE, _SHIFT = _DRAWN[0] | np.uint32(1), _DRAWN[1]

Shingles = NDArray[np.uint32]


def plain(text: str) -> str:
    """The text in lower case, with a space for everything that plays no part in a comparison."""
    return _FORM.sub(" ", text.lower()).strip()


def shingles(text: str) -> Shingles:
    """Sorted distinct hashes of the character 5-grams of the plain text; of a shorter text, one hash."""
    codes = np.frombuffer((plain(text) or text).encode("utf-32-le"), "<u4")  # only punctuation: as it stands
    if len(codes) < _GRAM:
        codes = np.pad(codes, (0, _GRAM - len(codes)))
    count = len(codes) - _GRAM + 1
    hashes = np.zeros(count, np.uint32)
    for i in range(_GRAM):
        hashes = hashes * np.uint32(0x9E6D62A7) + codes[i : i + count]
    for shift, odd in ((15, 0x6C8E9D75), (13, 0xB5297A4D)):  # neighbours in the alphabet get unrelated hashes
        hashes = (hashes ^ (hashes >> np.uint32(shift))) * np.uint32(odd)
    hashes ^= hashes >> np.uint32(16)
    hashes.sort()
    distinct: Shingles = hashes[np.append(True, hashes[1:] != hashes[:-1])]
    return distinct


def similarity(a: Shingles, b: Shingles) -> float:
    """Jaccard similarity of two sets of shingles, 0 to 1."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def largest_similarity(held_out: Iterable[str], trained: Iterable[str]) -> float:
    """The highest similarity between any text of one side and any of the other (exact, every pair)."""
    known = [frozenset(shingles(text).tolist()) for text in trained]
    new = (frozenset(shingles(text).tolist()) for text in held_out)
    return max((len(a & b) / len(a | b) for a in new for b in known), default=0.0)


class Form:
    """The shingles that more than a tenth of the texts, and more than 20 of them, share, such as an instruction.

    They are counted in two tables by different hashes (a count-min sketch, Cormode and Muthukrishnan 2005), so that
    texts of any number and length take 42 MB; one shingle in some thousands is taken for form by mistake.
    """

    def __init__(self, texts: Collection[str]):
        self._shared: tuple[NDArray[np.bool_], ...] = ()
        if len(texts) <= _FEWEST:
            return
        counts = np.zeros((2, 1 << _SKETCH), np.uint32)
        seen: set[bytes] = set()
        for text in texts:
            grams = shingles(text)
            if (digest := _digest(grams)) not in seen:
                seen.add(digest)
                for table, places in zip(counts, self._places(grams), strict=True):
                    table[places] += np.uint32(1)
        shared = counts > max(_FEWEST, len(seen) // 10)
        if shared.any():
            self._shared = tuple(shared)

    @staticmethod
    def _places(grams: Shingles) -> tuple[Shingles, Shingles]:
        shift = np.uint32(32 - _SKETCH)
        return (grams * np.uint32(0x85C3A1B3)) >> shift, (grams * np.uint32(0xA5F3D2C9)) >> shift

    def without(self, grams: Shingles) -> Shingles:
        """The shingles that are not form; all of them, where all are form."""
        if not self._shared:
            return grams
        first, second = (table[places] for table, places in zip(self._shared, self._places(grams), strict=True))
        left = grams[~(first & second)]
        return left if len(left) else grams


class TextIndex:
    """An index of near-identical texts, of about a kilobyte for each text.

    Each text has a row, numbered in the order in which they came; texts that differ only in form share a row.
    """

    def __init__(self, texts: Iterable[str]):
        distinct = dict.fromkeys(texts)
        self._form = Form(distinct)
        self._row: dict[str, int] = {}
        self._text: list[str] = []  # the first of each row
        rows: dict[bytes, int] = {}
        lowest: list[Shingles] = []
        for text in distinct:
            grams = self._form.without(shingles(text))
            row = self._row[text] = rows.setdefault(_digest(grams), len(rows))
            if row == len(self._text):
                self._text.append(text)
                lowest.append(_lowest(grams))
        self._lowest = np.array(lowest, np.uint32).reshape(len(lowest), _BANDS * _ROWS)
        self._bands = [self._band(self._lowest[:, k * _ROWS : (k + 1) * _ROWS]) for k in range(_BANDS)]
        self._met = np.any([place > first for _, first, place in self._bands], axis=0)  # an earlier row in any band

    def __len__(self) -> int:
        return len(self._text)

    def row(self, text: str) -> int:
        """The row of an indexed text. Raises KeyError for any other text."""
        return self._row[text]

    def pairs(
        self, rows: Iterable[int], wanted: Callable[[NDArray[np.int32], int], NDArray[np.bool_]]
    ) -> Iterator[tuple[int, int]]:
        """Near-identical pairs i < j of these rows.

        Args:
            rows: the rows to compare.
            wanted: called with several rows i and one row j, it returns for each i whether the pair is worth verifying.
                A caller that knows enough of a row from earlier pairs saves the cost of the others.
        """
        among = np.zeros(len(self), np.bool_)
        among[list(rows)] = True
        for j in np.flatnonzero(among & self._met).tolist():
            shingles_of_j: Shingles | None = None
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
                        shingles_of_j = self._shingles(j) if shingles_of_j is None else shingles_of_j
                        if similarity(self._shingles(i), shingles_of_j) >= SIMILAR:
                            yield i, j
                            below = below[wanted(below, j)]

    def _shingles(self, row: int) -> Shingles:
        return self._form.without(shingles(self._text[row]))

    @staticmethod
    def _band(minima: Shingles) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Rows sorted by bucket, ascending in each; for each row, where its bucket begins in this order; and for each
        row, its place in this order."""
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


def _digest(grams: Shingles) -> bytes:
    return hashlib.blake2b(grams.tobytes(), digest_size=16).digest()


def _lowest(grams: Shingles) -> Shingles:
    """MinHash: the lowest of each of 128 hashes of the shingles."""
    lowest = np.full(_BANDS * _ROWS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(grams), _BLOCK):
        np.minimum(lowest, (_SCALE * grams[start : start + _BLOCK] + _SHIFT).min(axis=1), out=lowest)
    return lowest
