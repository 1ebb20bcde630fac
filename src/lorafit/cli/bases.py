"""lorafit bases: what opens without a download."""

from __future__ import annotations

from dataclasses import asdict

from lorafit.cli.flags import JSON


def bases(json: JSON = False) -> None:
    """List the bases at hand, where they are and what they take on disk."""
    from lorafit.cli.console import Terminal
    from lorafit.doctor import bases_at_hand

    terminal = Terminal(json)
    found = bases_at_hand()
    for one in found:
        size = f"{one.bytes / 1e9:.2f} GB" if one.bytes is not None else ""
        terminal.say(f"{one.name:>20}  {size:>8}  {one.where}")
    terminal.say("also: any model folder in transformers' layout, any .gguf file")
    terminal.finish({"bases": [asdict(one) for one in found]})
