"""Runs the verbs of lorafit one after another, as a user would type them, and keeps what is finished.

A story is interrupted with Ctrl-C and goes on when it is started again: a stage that has ended is not run twice, a
training that has begun is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.files import read_json, write_json, write_text

BASE = "smollm2-135m"
BEGIN, END = "<!-- results: written by the script -->", "<!-- end of results -->"
PAGES = Path(__file__).resolve().parents[2] / "docs" / "stories"


@dataclass(frozen=True)
class Stage:
    """A verb that has ended well: what was typed, what it said as JSON, and how long it took on the clock."""

    command: str
    summary: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Story:
    """Where a story finds its data and keeps its work. All paths given to its verbs are below `out`."""

    name: str
    data: Path
    out: Path
    tiny: bool
    write_docs: bool

    def rows(self, path: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write examples as JSON lines."""
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out / path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def train(self, data: str, run: str, *flags: str, epochs: str | None = None) -> Stage:
        """lorafit train; `epochs` by the rules where none are given, a half of one when the story is tiny."""
        short = ("--epochs", "0.5", "--validations", "1") if self.tiny else ("--epochs", epochs) if epochs else ()
        begun = ("--resume",) if (self.out / run / "run.json").exists() else ()
        return self._verb(run, ("train", BASE, data, "--out", run, *flags, *short), begun)

    def answers(self, run: str, data: str, name: str, *flags: str) -> tuple[Stage, list[dict[str, Any]]]:
        """lorafit eval with an answer to every question; returns the lines of NAME.jsonl, where they are kept."""
        if not (self.out / "stages" / f"{name}.json").exists():
            (self.out / f"{name}.jsonl").unlink(missing_ok=True)  # of one that was stopped at its last step
        stage = self._verb(name, ("eval", run, data, "--answers", f"{name}.jsonl", *flags))
        return stage, [json.loads(line) for line in (self.out / f"{name}.jsonl").open(encoding="utf-8")]

    def report(self, *runs: str) -> Stage:
        """lorafit report over several runs, as one page."""
        return self._verb("report", ("report", *runs, "--out", "report.html"))

    def tell(self, stages: Iterable[Stage], text: str) -> None:
        """Print the results, keep them in results.md, and with --write-docs put them into the story's page."""
        stages = list(stages)
        typed = "\n".join(f"{stage.command}    # {stage.seconds:.0f} s" for stage in stages)
        total = sum(stage.seconds for stage in stages)
        block = f"```sh\n{typed}\n```\n\n{text.strip()}\n\nAll verbs together took {total:.0f} s on a shared machine.\n"
        write_text(self.out / "results.md", block)
        print(f"\n{block}")
        if self.write_docs:
            page = PAGES / f"{self.name}.md"
            before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
            write_text(page, f"{before}{BEGIN}\n\n{block}\n{END}{rest.partition(END)[2]}")

    def _verb(self, name: str, arguments: tuple[str, ...], more: tuple[str, ...] = ()) -> Stage:
        """Run one verb in the story's folder, or read what it said when it was run before."""
        kept = self.out / "stages" / f"{name}.json"
        command = shlex.join(("lorafit", *arguments))
        if kept.exists():
            stage = Stage(**read_json(kept))
            if stage.command != command:
                sys.exit(f"{kept} was made by another command: {stage.command}: give another --out")
            print(f"$ {command}    # done before, {stage.seconds:.0f} s", flush=True)
            return stage
        print(f"$ {shlex.join(('lorafit', *arguments, *more))}", flush=True)
        began = time.monotonic()
        typed = [sys.executable, "-m", "lorafit", *arguments, *more, "--json"]  # the same words, then one JSON object
        done = subprocess.run(typed, cwd=self.out, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.returncode)  # the verb has said on stderr what is wrong and what to do
        stage = Stage(command, json.loads(done.stdout.splitlines()[-1]), round(time.monotonic() - began, 1))
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, vars(stage))
        return stage


def story(name: str, about: str, folder: str) -> Story:
    """The story that the command line asks for; `folder` holds its data below LORAFIT_DATA."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help=f"folder for the work [default: runs/{name}]")
    parser.add_argument("--tiny", action="store_true", help="a few examples and steps: that it runs, not what it gives")
    parser.add_argument("--write-docs", action="store_true", help=f"put the results into docs/stories/{name}.md")
    asked = parser.parse_args()
    data = Path(os.environ.get("LORAFIT_DATA", "data")) / folder
    if not data.is_dir():
        parser.error(f"{data}: no such folder: name the folder that holds {folder} in LORAFIT_DATA")
    out: Path = asked.out or Path("runs") / (f"{name}-tiny" if asked.tiny else name)
    out.mkdir(parents=True, exist_ok=True)
    return Story(name, data.resolve(), out.resolve(), asked.tiny, asked.write_docs)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, its first column text and the others numbers."""
    names = list(head)
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
