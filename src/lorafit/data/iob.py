"""Reads files with one token a line and its IOB tag in the last column, as CoNLL-2003 and others have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.data.records import Record, text_of_file
from lorafit.data.targets import Span
from lorafit.errors import Problem

TAG = re.compile(r"O|([BILUES])-(\S+)")
BEGINS, SINGLE = "BUS", "US"  # tags of the schemes IOB, BILOU and IOBES that begin an entity; that also end one
DOCUMENT = "-DOCSTART-"
FEW = 200  # lines by which a file is recognised


def read_iob(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """A record for every sentence: its tokens joined by spaces, and its entities. Sentences end at empty lines."""
    text = text_of_file(path, raw, problems)
    if text is None:
        return
    tokens: list[tuple[int, str, str]] = []  # line, token, tag
    widths: list[int] = []  # columns of each token
    for number, line in enumerate([*text.split("\n"), ""], 1):
        columns = _columns(line)
        if columns and columns[0] != DOCUMENT and not _is_comment(columns):
            widths.append(len(columns))
            tokens.append((number, columns[0], columns[-1] if len(columns) > 1 else ""))
        elif not columns and tokens:
            if (
                len(tokens) > 1
                and min(widths) > 2
                and [t for _, t, _ in tokens] == [*map(str, range(1, len(tokens) + 1))]
            ):
                what = "the first column holds the numbers of the tokens (1, 2, ...), where the tokens are expected"
                fix = "remove it (cut -f2-), so that each line begins with its token; tags are read in the last column"
                problems.append(Problem(f"{path}:{tokens[0][0]}", what, fix, whole=True))
                return
            if record := _sentence(path, tokens, problems):
                yield record
            tokens, widths = [], []


def _columns(line: str) -> list[str]:
    """The columns of a line. Other blanks than spaces and tabs, such as U+00A0, belong to a token."""
    return [column for column in re.split(r"[ \t]+", line) if column]


def is_iob(text: str) -> bool:
    """Whether nearly all lines hold a token and a tag, and some begin an entity."""
    lines = [columns for line in text.split("\n")[:FEW] if (columns := _columns(line))]
    tagged = [columns for columns in lines if len(columns) > 1 and TAG.fullmatch(columns[-1])]
    begins = any(columns[-1] != "O" for columns in tagged)
    return begins and len(tagged) >= 0.9 * len(lines)


def _is_comment(columns: list[str]) -> bool:
    return columns[0].startswith("#") and not (len(columns) > 1 and TAG.fullmatch(columns[-1]))


def _sentence(path: Path, tokens: list[tuple[int, str, str]], problems: list[Problem]) -> Record | None:
    fix = "write O, B-NAME or I-NAME in the last column"
    wrong = [(line, tag) for line, _, tag in tokens if not TAG.fullmatch(tag)]
    for line, tag in wrong:
        problems.append(Problem(f"{path}:{line}", f"not a tag but {tag!r}" if tag else "no tag behind the token", fix))
    if wrong:
        return None
    found: list[dict[str, Any]] = []
    at, opened = 0, False  # whether the last entity may go on
    for _, token, tag in tokens:
        match = TAG.fullmatch(tag)
        kind, label = (match[1], match[2]) if match else (None, None)
        if kind and not (opened and kind not in BEGINS and found[-1]["label"] == label):
            found.append({"start": at, "end": at, "label": label})
        if kind:
            found[-1]["end"] = at + len(token)
        opened = kind is not None and kind not in SINGLE and kind not in "LE"
        at += len(token) + 1
    text = " ".join(token for _, token, _ in tokens)
    return Record(f"{path}:{tokens[0][0]}", {"text": text, "entities": found})


def tags_of(words: list[tuple[int, int]], spans: tuple[Span, ...]) -> list[str]:
    """The IOB tag of each word. A word that overlaps a span belongs to it.

    Args:
        words: Start and end of each word.
        spans: In order, without overlap.
    """
    tags, last = [], None
    for start, end in words:
        span = next((span for span in spans if span.start < end and start < span.end), None)
        tags.append("O" if span is None else f"{'I' if span is last else 'B'}-{span.label}")
        last = span
    return tags


def spans_of(words: list[tuple[int, int]], tags: list[str]) -> tuple[Span, ...]:
    """The spans of tags. An I that does not continue an entity begins one, as in conlleval."""
    found: list[Span] = []
    opened: str | None = None
    for (start, end), tag in zip(words, tags, strict=True):
        kind, _, label = tag.partition("-")
        if kind == "O":
            opened = None
        elif kind == "I" and opened == label:
            found[-1] = Span(found[-1].start, end, label)
        else:
            found.append(Span(start, end, label))
            opened = label
    return tuple(found)
