"""lorafit train: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli.flags import BASE, DATA, JSON, OUT, with_settings

if TYPE_CHECKING:
    from lorafit.cli.console import Terminal
    from lorafit.runs.summary import RunSummary


@with_settings()
def train(
    base: BASE = None,
    data: DATA = None,
    *,
    out: OUT = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out where it stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its cost; train and write nothing.")
    ] = False,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Check the data, plan, train, compare with the base on held-out data, and write the adapter.

    \b
    lorafit train smollm2-135m my.jsonl --out runs/mine
    lorafit train smollm2-135m my.csv --columns prompt=question --columns completion=answer
    lorafit train -c my.toml --rank 16 --dry-run
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.cli.plan import show_plan
    from lorafit.data.prepared import prepare
    from lorafit.errors import DivergedError, Interrupted, LorafitError, RunError, SettingsError
    from lorafit.runs.folder import open_run, require_out
    from lorafit.runs.summary import RunSummary
    from lorafit.settings import settings_from

    assert out is not None  # with_settings sees to it
    if dry_run and resume:
        raise SettingsError("--dry-run --resume: a resumed run already has its plan: leave one of them out")
    terminal, prepared = Terminal(json), None
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # with several processes only the first reports errors
        require(base=base, data=data, settings=settings, trains=True)
        if resume:
            open_run(Path(out), base, data, settings, resume)
        elif not dry_run:
            assert data is not None
            require_out(Path(out), resume)
            prepared = prepare(data, settings_from(settings), terminal)
    if dry_run:
        assert base is not None and data is not None
        show_plan(terminal, base, data, settings)
        return
    from lorafit.jobs.train import run_training
    from lorafit.training.processes import launched

    with launched() as processes:
        if not processes.first:
            try:
                run_training(base, data, Path(out), settings, resume=resume, processes=processes)
            except (LorafitError, KeyboardInterrupt) as error:  # the first reports it, unless only this process has it
                if not isinstance(error, (Interrupted, DivergedError, RunError, KeyboardInterrupt)):
                    typer.echo(f"lorafit: process {processes.rank + 1} of {processes.count}: {error}", err=True)
                raise typer.Exit(error.status if isinstance(error, LorafitError) else 130) from None
            return
        found = run_training(
            base, data, Path(out), settings, resume=resume, listener=terminal, processes=processes, prepared=prepared
        )
    conclude(terminal, RunSummary.from_json(found), Path(out), [])


def conclude(terminal: Terminal, summary: RunSummary, out: Path, more: list[str]) -> None:
    """Show the scores, whether the base is unchanged, and the next commands. Raises BaseChangedError if it changed."""
    from lorafit.cli.console import program
    from lorafit.errors import AdapterError, BaseChangedError
    from lorafit.report.words import same_as_peft, uses, writes
    from lorafit.runs.folder import RUN, read_run

    terminal.results(summary)
    if summary.base_unchanged:
        terminal.say(f"base unchanged: every byte of {summary.base} in memory is the same as before")
    peft = summary.peft
    if peft and same_as_peft(peft):
        terminal.say(
            "PEFT reads the adapter and computes the same: logits differ by at most "
            f"{peft.max_logit_difference:.1e} (fp32), the adapter moves them by up to {peft.adapter_effect:.1f}"
        )
    seconds = summary.seconds
    terminal.say(
        f"training {seconds['train']:.0f} s at {summary.tokens_per_second:.0f} tokens/s, evaluation "
        f"{seconds['evaluate']:.0f} s" + (f", at most {summary.peak_rss_gb} GB" if summary.peak_rss_gb else "")
    )
    columns = read_run(out)["settings"]["columns"] or () if (out / RUN).exists() else ()
    following = [*uses(summary, out, columns), *more]
    terminal.say("next:\n" + "\n".join(f"  {program()} {line}" for line in following))
    if not writes(summary):
        terminal.say(f"to use it in Python or with PEFT, see {Path(summary.adapter_dir) / 'README.md'}")
    terminal.finish(summary.to_json())
    if peft and not same_as_peft(peft):
        raise AdapterError(
            f"PEFT computes something else with {summary.adapter_dir} than lorafit: logits differ by up to "
            f"{peft.max_logit_difference:.1e}: do not use it outside of lorafit, and report this with the folder"
        )
    if not summary.base_unchanged:
        raise BaseChangedError(
            f"the base in memory is not what it was when it was opened: do not use {summary.adapter_dir}; "
            "check the memory of this machine, and that nothing else in the process writes to the model"
        )
