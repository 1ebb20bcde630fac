"""The model card: an adapter and its scores go in; the README.md of the adapter folder comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Classes
from lorafit.bases import hub
from lorafit.planning import Choice
from lorafit.report.words import ASIDE, headline, interval, listed, of_a_hundred, table, terms
from lorafit.report.words import lines as scores
from lorafit.runs.summary import RunSummary


def card(adapter: Adapter, choices: Sequence[Choice], summary: RunSummary) -> str:
    """The card as Markdown, with the front matter that hubs and PEFT read."""
    nll = summary.nll
    variant = adapter.plan.slots[0].variant
    wanted = hub.parse(adapter.base_name or "")
    wanted = wanted if wanted and wanted.is_commit else None
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {wanted.id if wanted else adapter.base_name}",
        f"pipeline_tag: text-{'classification' if adapter.classes else 'generation'}",
        f"tags: [lora, lorafit, {variant}]" if variant != "lora" else "tags: [lora, lorafit]",
        "---",
        "",
        f"# A {variant} adapter for {_short(adapter.base_name)}",
        "",
        f"Trained by lorafit on {summary.n_train:,} examples; scored on {summary.n_test:,} that this "
        f"run used for no choice (opened {summary.test_openings} time{'s' * (summary.test_openings != 1)}).",
        "",
        f"**{headline(summary)}.**",
        "",
        *_before(summary),
        _cells("on held-out examples", [line.name for line in scores(summary)]),
        "|---|" + len(scores(summary)) * "--:|",
        *(_cells(what, cells) for what, cells in table(summary)),
    ]
    if any(line.equal for line in scores(summary)):
        lines += ["", f"Equal to the reference: {ASIDE}."]
    if sentence := of_a_hundred(summary):
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}."]
    lines += [
        "",
        f"Paired difference in NLL {nll.difference:+.3f} ({interval(nll.ci95)}).",
        "",
        "## How to use it",
        "",
        *(_classifying(adapter.classes) if adapter.classes else _answering()),
        "",
        *_in_peft(adapter, summary, wanted),
        "",
        "## What was chosen, and why",
        "",
        *(f"- **{choice.name}**: {choice.value}: {choice.reason}" for choice in choices),
        "",
        "## Limits",
        "",
        f"{terms(summary).limits} Use it with the base named above and no other: these are the weights with "
        f"digest `{(adapter.base or 'unknown')[:16]}`.",
        "",
    ]
    if adapter.rendering and adapter.rendering.single:
        said = "It was trained on single questions: ask each question on its own, without the conversation before it."
        lines[-1:] = [said, ""]
    if adapter.rendering and adapter.rendering.system:
        lines[-1:] = [f"System prompt it was trained with: `{adapter.rendering.system}`", ""]
    if adapter.rendering and adapter.rendering.now:
        lines += [f"The base's chat template contains the time; in training it was `{adapter.rendering.now}`.", ""]
    if adapter.rendering and adapter.rendering.settings:
        settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in adapter.rendering.settings)
        lines += [f"Settings of the base's chat template: `{settings}`", ""]
    return "\n".join(lines)


def _cells(what: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([what, *cells])} |"


def _answering() -> list[str]:
    """The Python code that uses an adapter that writes answers."""
    return [
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
    ]


def _classifying(classes: Classes) -> list[str]:
    """The Python code that uses a classifier. Its head needs the padding token to find the last token of a text."""
    return [
        f"It gives a text one of {len(classes.labels)} labels: {listed(classes.labels, '`')}.",
        "",
        "```python",
        "import torch",
        "from lorafit import attach, open_base, read_adapter",
        "",
        'adapter = read_adapter(".")  # this folder',
        "base = open_base(adapter.base_name, labels=len(adapter.classes.labels))",
        "base.model.config.pad_token_id = adapter.classes.pad",
        'ids = base.tokenizer("your text", return_tensors="pt")["input_ids"].to(base.device)',
        "with attach(base, adapter), torch.no_grad():",
        "    likely = base.model(input_ids=ids).logits[0].softmax(-1)",
        "print(adapter.classes.labels[int(likely.argmax())], float(likely.max()))",
        "```",
    ]


def _in_peft(adapter: Adapter, summary: RunSummary, wanted: hub.Wanted | None) -> list[str]:
    """How to open the adapter in PEFT, or why PEFT cannot read it."""
    if misread := summary.misread_by_peft:
        return [f"{misread}."]
    at = f'"{wanted.id}", revision="{wanted.revision}"' if wanted else "base"
    shown = f"`base` is its folder: `lorafit show {adapter.base_name}` prints it"
    if adapter.classes is None:
        said = "" if wanted else f" ({shown})"
        return [
            f"In PEFT, open the base with `AutoModelForCausalLM.from_pretrained({at})`{said}, then "
            "`PeftModel.from_pretrained(model, folder)`."
        ]
    return [
        "In PEFT" + ("" if wanted else f", where {shown}") + ":",
        "",
        "```python",
        "import json",
        "",
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        *([] if wanted else [f"base = {adapter.base_name!r}"]),
        f"tokenizer = AutoTokenizer.from_pretrained({at})",
        'classes = json.load(open("lorafit.json", encoding="utf-8"))["classes"]',
        f"model = AutoModelForSequenceClassification.from_pretrained({at}, num_labels={len(adapter.classes.labels)})",
        'model.config.id2label = dict(enumerate(classes["labels"]))',
        'model.config.pad_token_id = classes["pad"]',
        'model = PeftModel.from_pretrained(model, ".").eval()  # this folder',
        "with torch.no_grad():",
        '    likely = model(tokenizer("your text", return_tensors="pt")["input_ids"]).logits[0].softmax(-1)',
        "print(model.config.id2label[int(likely.argmax())], float(likely.max()))",
        "```",
    ]


def _short(name: str | None) -> str:
    """The name of a base; for a folder, the last part of its path."""
    return Path(name).name if name and Path(name).is_absolute() else str(name)


def _before(summary: RunSummary) -> list[str]:
    """A note that the scores are those of an earlier adapter; empty if they are not."""
    if summary.scores_of_round is None:
        return []
    return [
        f"These scores are of the adapter before round {summary.scores_of_round}. This adapter is better on "
        "validation; the test was not opened again.",
        "",
    ]
