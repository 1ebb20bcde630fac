"""A program that loads an adapter folder in PEFT and compares its logits with ours, in fp32.

    python -m lorafit.jobs.with_peft ADAPTER BASE        rows of token ids as JSON on stdin; prints one JSON object

PEFT serves only as a reference and is not a dependency: no other file imports it, and nothing imports this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel

from lorafit.adapters.formats import peft as peft_format
from lorafit.attachment.adapters import attach
from lorafit.bases.base import open_base
from lorafit.heads import opened_for


def main() -> None:
    folder, base_name = sys.argv[1:]
    rows: list[list[int]] = json.load(sys.stdin)
    adapter = peft_format.read(Path(folder))
    base = open_base(base_name, torch.float32, **opened_for(adapter))

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            # The first output: logits, or without a head the last hidden state.
            return [base.model(input_ids=torch.tensor([row], device=base.device))[0] for row in rows]

    bare = logits()
    with attach(base, adapter, accept_unknown_base=True):
        ours = logits()
    PeftModel.from_pretrained(base.model, folder)  # changes base.model in place, which ends its use as a base
    theirs = logits()
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    effect = max(float((a - b).abs().max()) for a, b in zip(theirs, bare, strict=True))
    print(json.dumps({"max_logit_difference": difference, "adapter_effect": effect}))


if __name__ == "__main__":
    main()
