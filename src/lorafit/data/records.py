"""Records, and the text of files that hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import Problem

LINE_END = re.compile(r"\r+\n|\r")  # of other systems
BOM = "\ufeff"  # the byte order mark


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Args:
        where: `file:line`, or `file:row N, line L` where cells above hold line breaks.
        fields: its columns.
        shifted: whether its texts lost line ends of other systems, or byte order marks, so that their characters are
            no longer those that were counted.
    """

    where: str
    fields: dict[str, Any]
    shifted: bool = False


def text_of_file(path: Path, raw: bytes, problems: list[Problem]) -> str | None:
    """The text of a file with line ends of one kind; None, and a problem, where it is not UTF-8."""
    try:
        text = raw.decode()
        text = text.replace("\r\n", "\n")  # four times as fast as the search for rarer line ends
        return LINE_END.sub("\n", text) if "\r" in text else text
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(not_utf8(f"{path}:{line}", raw[error.start], whole=True))
        return None


def not_utf8(where: str, byte: int, whole: bool = False) -> Problem:
    """The problem of a byte that is not UTF-8, with its letter in Windows-1252, the encoding of most such files."""
    letter = bytes([byte]).decode("cp1252", errors="ignore")
    meant = f", which is {letter} in Windows-1252" if letter else ""
    fix = "save the file as UTF-8 (Excel: 'CSV UTF-8'; a shell: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
    return Problem(where, f"not UTF-8 (byte 0x{byte:02x}{meant})", fix, whole)
