"""The model card: README.md of an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.bases import hub
from lorafit.planning import Choice
from lorafit.report.words import ASIDE, headline, interval, of_a_hundred
from lorafit.report.words import lines as scores


def card(adapter: Adapter, choices: Sequence[Choice], summary: Mapping[str, Any]) -> str:
    """Markdown with the front matter that hubs and PEFT read."""
    nll = summary["nll"]
    variant = adapter.plan.slots[0].variant
    wanted = hub.parse(adapter.base_name or "")
    wanted = wanted if wanted and wanted.is_commit else None
    opened = (
        f'with `AutoModelForCausalLM.from_pretrained("{wanted.id}", revision="{wanted.revision}")`'
        if wanted
        else f"from its folder (`lorafit show {adapter.base_name}` prints it)"
    )
    in_peft = f"In PEFT, open the base {opened}, then `PeftModel.from_pretrained(model, folder)`."
    if misread := summary.get("misread_by_peft"):
        in_peft = f"{misread}."
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {wanted.id if wanted else adapter.base_name}",
        "pipeline_tag: text-generation",
        f"tags: [lora, lorafit, {variant}]" if variant != "lora" else "tags: [lora, lorafit]",
        "---",
        "",
        f"# A {variant} adapter for {_short(adapter.base_name)}",
        "",
        f"Trained by lorafit on {summary['n_train']:,} examples; scored on {summary['n_test']:,} that this "
        f"run did not use to choose (opened {summary['test_openings']} time{'s' * (summary['test_openings'] != 1)}).",
        "",
        f"**{headline(summary)}.**",
        "",
        *_before(summary),
        "| on held-out examples | base | adapter |",
        "|---|--:|--:|",
        f"| completion NLL, nats per token | {nll['base']:.3f} | {nll['adapter']:.3f} |",
    ]
    of = {line.key: line for line in scores(summary)}
    for what, base, ours in (
        ("answers right", of["base"].right, of["adapter"].right),
        (f"answers equal to the reference ({ASIDE})", of["base"].equal, of["adapter"].equal),
    ):
        if base and ours:
            lines.append(f"| {what} | {base[0]:.1%} | {ours[0]:.1%} |")
    if sentence := of_a_hundred(summary):
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}."]
    lines += [
        "",
        f"Paired difference in NLL {nll['difference']:+.3f} ({interval(nll['ci95'])}).",
        "",
        "## How to use it",
        "",
        "```python",
        "from lorafit import Message, attach, generate, open_base, read_adapter, renderer_for",
        "",
        'adapter = read_adapter(".")  # this folder',
        "base = open_base(adapter.base_name)",
        "renderer = renderer_for(base, like=adapter.rendering)",
        'prompt = renderer.prompt_ids([Message("user", "your question")])',
        "with attach(base, adapter):",
        "    print(generate(base, renderer, [prompt], max_new_tokens=100)[0].text)",
        "```",
        "",
        in_peft,
        "",
        "## What was chosen, and why",
        "",
        *(f"- **{choice.name}**: {choice.value}: {choice.reason}" for choice in choices),
        "",
        "## Limits",
        "",
        "It answers what it was trained for, in the form it was trained in. Outside of that it may be worse than its "
        "base. Use it with the base named above and no other: these are the weights with digest "
        f"`{(adapter.base or 'unknown')[:16]}`.",
        "",
    ]
    if adapter.rendering and adapter.rendering.single:
        said = "It was trained on single questions: ask it each by itself, without the conversation before it."
        lines[-1:] = [said, ""]
    if adapter.rendering and adapter.rendering.system:
        lines[-1:] = [f"System prompt it was trained with: `{adapter.rendering.system}`", ""]
    if adapter.rendering and adapter.rendering.now:
        lines += [f"The base's chat template tells the time; it was told `{adapter.rendering.now}`.", ""]
    if adapter.rendering and adapter.rendering.settings:
        settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in adapter.rendering.settings)
        lines += [f"Settings of the base's chat template: `{settings}`", ""]
    return "\n".join(lines)


def _short(name: str | None) -> str:
    """A base by its name: of a folder the last part."""
    return Path(name).name if name and Path(name).is_absolute() else str(name)


def _before(summary: Mapping[str, Any]) -> list[str]:
    """That the scores are those of an adapter before this one, where they are."""
    if "scores_of_round" not in summary:
        return []
    return [
        f"These scores are of the adapter before round {summary['scores_of_round']}; this one is better on "
        "validation, and the test was not opened again.",
        "",
    ]
