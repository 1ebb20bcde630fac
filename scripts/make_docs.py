"""Write what the docs take from the code: docs/cli.md, docs/settings.md, docs/settings.schema.json and, from
docs/rooms.toml, docs/architecture.md and the map in README.md.

--check writes nothing, and exits with 1 where they are not what the code says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from pathlib import Path

os.environ.update(COLUMNS="88", TERM="dumb")  # the width of the help texts, whatever the terminal

from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.settings import BY_RULE, RunFile, template

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
ROOMS = ("<!-- rooms: from docs/rooms.toml, by scripts/make_docs.py -->\n", "<!-- /rooms -->")


def cli_page() -> str:
    verbs = [command.name for command in app.registered_commands]
    parts = ["# The command line", "", "Generated from the program by `scripts/make_docs.py`.", ""]
    groups = [
        [group.name, command.name]
        for group in app.registered_groups
        if group.typer_instance
        for command in group.typer_instance.registered_commands
    ]
    for words in ([], *([verb] for verb in verbs), *groups):
        text = CliRunner().invoke(app, [*map(str, words), "--help"], prog_name="lorafit").output
        lines = [line.rstrip() for line in text.strip("\n").splitlines()]
        parts += [f"## {' '.join(['lorafit', *map(str, words)])}", "", "```text", *lines, "```", ""]
    return "\n".join(parts)


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Generated from `src/lorafit/settings.py` by `scripts/make_docs.py`. Each setting is a flag of `lorafit",
        "train` (`val_share` is `--val-share`) and a line in a TOML file given with `-c`. Flags override the file.",
        "Paths in the file (`base`, `data`, `out`) are relative to its folder; paths in flags are relative to the",
        "current folder. A run stores all its settings, including defaults, in `run.json`.",
        "[settings.schema.json](settings.schema.json) is the JSON schema of such files, for editors that complete",
        'TOML. "By rule" means that lorafit chooses the value from your data and prints the reason.',
        "",
        "| setting | default | what it is |",
        "|---|---|---|",
    ]
    for name, field in RunFile.model_fields.items():
        default = "by rule" if name in BY_RULE else "" if field.default is None else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(
        [
            *lines,
            "",
            "`lorafit settings` prints this file to start from:",
            "",
            "```toml",
            template().rstrip(),
            "```",
            "",
        ]
    )


def floors() -> list[dict[str, str]]:
    """The folders and files of src/lorafit by level, lowest first, each with its description."""
    found: list[dict[str, str]] = tomllib.loads((DOCS / "rooms.toml").read_text("utf-8"))["floor"]
    return found


def readme() -> str:
    """README.md with the map that the table gives."""
    before, _, rest = README.read_text("utf-8").partition(ROOMS[0])
    rooms = [f"| `{room}` | {what} |" for floor in floors() for room, what in floor.items()]
    table = "\n".join(["| where | what |", "|---|---|", *rooms, ""])
    return before + ROOMS[0] + table + rest[rest.index(ROOMS[1]) :]


def architecture_page() -> str:
    lines = [
        "# The architecture",
        "",
        "Generated from `docs/rooms.toml` by `scripts/make_docs.py`. Each folder or file of `src/lorafit` has a level.",
        "A file imports only from lower levels or from its own folder; `tests/test_floors.py` checks every import. An",
        "example passes through the folders in this order: `data/` reads it, `tasks/` defines what is predicted,",
        "`training/` fits the adapter, `evaluation/` scores it, `runs/` stores the results, and `report/` shows them.",
        "",
        "| level | where | what it is for |",
        "|--:|---|---|",
    ]
    for number, floor in reversed(list(enumerate(floors()))):
        lines += [f"| {number} | `{room}` | {what} |" for room, what in floor.items()]
    return "\n".join(
        [*lines, "", "Design decisions: [docs/why](why). How to add to it: [CONTRIBUTING.md](../CONTRIBUTING.md).", ""]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pages that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    check = parser.parse_args().check
    made = {
        DOCS / "cli.md": cli_page(),
        DOCS / "settings.md": settings_page(),
        DOCS / "settings.schema.json": json.dumps(RunFile.model_json_schema(), indent=2) + "\n",
        DOCS / "architecture.md": architecture_page(),
        README: readme(),
    }
    stale = [path for path, text in made.items() if not path.exists() or path.read_text("utf-8") != text]
    names = {path: path.relative_to(README.parent).as_posix() for path in stale}
    if check and stale:
        print(f"{', '.join(names.values())}: not what the code says: run scripts/make_docs.py", file=sys.stderr)
        return 1
    for path in stale:
        path.write_text(made[path], encoding="utf-8", newline="\n")
        print(f"{names[path]} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
