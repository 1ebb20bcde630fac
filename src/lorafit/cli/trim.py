"""lorafit trim: the same adapter in fewer parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def trim(
    adapter: Annotated[Path, typer.Argument(help="A run; with --to also an adapter folder (PEFT's layout).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The adapter folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(help="Share of the parameters to keep, such as 25%. [default: as little as validation allows]"),
    ] = None,
    json: JSON = False,
) -> None:
    """Make an adapter smaller by removing the directions that matter least. Without --to, the result is the smallest
    adapter that loses less than 0.5 % of the improvement on validation and no right answer.

    \b
    lorafit trim runs/mine --out runs/small                # as small as validation allows
    lorafit trim runs/mine --to 25% --out runs/quarter     # exactly this share
    lorafit eval runs/quarter more.jsonl --against runs/mine
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.files import require_new_folder
    from lorafit.runs.folder import ONLY_RUNS, read_finished
    from lorafit.settings import share_of

    require(adapters=(adapter,))
    require_new_folder(out, "--out")
    if to is None:
        read_finished(adapter, ONLY_RUNS)
    else:
        share_of(to)
    from lorafit.jobs.trim import cut, run_trimming

    terminal = Terminal(json)
    if to is None:
        found = run_trimming(adapter, out, terminal)
        right = f" {'right of ' + str(found['asked']):>13}" if found["asked"] else ""
        terminal.say(f"{'share':>8} {'parameters':>12} {'validation NLL':>15} {'difference':>11} {'at most':>9}{right}")
        right = f"{found['right']:>36}" if found["asked"] else ""
        terminal.say(f"{1:>8.2%} {found['parameters']:>12,} {found['nll']:>15.4f}{right}")
        for rung in found["rungs"]:
            bound = "?" if rung["bound"] is None else f"{rung['bound']:+.4f}"
            right = "" if rung["right"] is None else f" {rung['right']:>13}"
            terminal.say(
                f"{rung['share']:>8.2%} {rung['parameters']:>12,} {rung['nll']:>15.4f} "
                f"{rung['difference']:>+11.4f} {bound:>9}{right}"
            )
        terminal.say(found["reason"])
        kept = f"{found['chosen']:.2%} is written to {out}" if found["adapter_dir"] else "nothing is written"
        terminal.say(kept + "; at most: bound of the difference with 95 % certainty (one-sided, paired by example)")
    else:
        found = cut(adapter, to, out)
        terminal.say(
            f"{found['parameters']:,} of {found['of']:,} parameters on {found['sites']} sites, ranks "
            f"{found['ranks'][0]} to {found['ranks'][1]}, keep {found['left']:.1%} of the squared norm of the change "
            f"to the weights; written to {out}; lorafit eval {out} ... --against {adapter} shows what that costs"
        )
    terminal.finish(found)
