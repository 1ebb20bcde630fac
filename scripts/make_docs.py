"""Write what the docs take from the code: docs/cli.md, docs/settings.md and docs/settings.schema.json.

--check writes nothing, and exits with 1 where they are not what the code says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.update(COLUMNS="88", TERM="dumb")  # the width of the help texts, whatever the terminal

from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.settings import BY_RULE, RunFile, template

DOCS = Path(__file__).resolve().parents[1] / "docs"


def cli_page() -> str:
    verbs = [command.name for command in app.registered_commands]
    parts = ["# The command line", "", "Made from the program by `scripts/make_docs.py`.", ""]
    groups = [[group.name, command.name] for group in app.registered_groups if group.typer_instance
              for command in group.typer_instance.registered_commands]  # fmt: skip
    for words in ([], *([verb] for verb in verbs), *groups):
        text = CliRunner().invoke(app, [*map(str, words), "--help"], prog_name="lorafit").output
        lines = [line.rstrip() for line in text.strip("\n").splitlines()]
        parts += [f"## {' '.join(['lorafit', *map(str, words)])}", "", "```text", *lines, "```", ""]
    return "\n".join(parts)


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Made from `src/lorafit/settings.py` by `scripts/make_docs.py`. Each is a flag of `lorafit train` (`val_share`",
        "is `--val-share`) and a line in a TOML file given with `-c`; flags beat the file. Paths in the file (`base`,",
        "`data`, `out`) count from its folder, paths in flags from the current one. What a run was given, its",
        "defaults included, is in its `run.json`. [settings.schema.json](settings.schema.json) is the JSON schema of",
        "such files, for editors that complete TOML.",
        "",
        "| setting | default | what it is |",
        "|---|---|---|",
    ]
    for name, field in RunFile.model_fields.items():
        default = "by rule" if name in BY_RULE else "" if field.default is None else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join([*lines, "", "`lorafit settings` prints this file to start from:", "", "```toml",
                      template().rstrip(), "```", ""])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pages that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    check = parser.parse_args().check
    made = {
        "cli.md": cli_page(),
        "settings.md": settings_page(),
        "settings.schema.json": json.dumps(RunFile.model_json_schema(), indent=2) + "\n",
    }
    stale = [
        name for name, text in made.items() if not (DOCS / name).exists() or (DOCS / name).read_text("utf-8") != text
    ]
    if check and stale:
        print(f"docs/{', docs/'.join(stale)}: not what the code says: run scripts/make_docs.py", file=sys.stderr)
        return 1
    for name in stale:
        (DOCS / name).write_text(made[name], encoding="utf-8", newline="\n")
        print(f"docs/{name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
