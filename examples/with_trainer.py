"""Inside the transformers Trainer: it drives, lorafit holds the pairs."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from lorafit import TrainState, attach, fresh, open_base, read_examples, render, renderer_for, uniform

base = open_base("smollm2-135m", torch.float32)
renderer = renderer_for(base, system="Help desk")
rows = render(renderer, read_examples("builtin").train[:48], 512)
before = base.integrity()

blocks = [site for site in base.sites if ".layers." in site.path]
state = TrainState(fresh(base, uniform(blocks, rank=8, alpha=32), seed=0, rendering=renderer.rendering))


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["ids"]) for row in batch)
    ids = [row["ids"] + [0] * (width - len(row["ids"])) for row in batch]
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in batch]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


data = [
    {"ids": list(row.ids), "labels": [i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)]}
    for row in rows
]
optimizer = torch.optim.AdamW(state.parameters(), lr=2e-3, weight_decay=0.0)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    num_train_epochs=1,
    logging_steps=1,
    save_strategy="no",  # the Trainer would save the untouched base; we save the adapter
    report_to=[],
    remove_unused_columns=False,
    use_cpu=base.device.type == "cpu",
)
# The grad_norm it prints is that of the model's own parameters, which are frozen: 0 is right.
trainer = Trainer(base.model, arguments, collate, data, optimizers=(optimizer, None))
with attach(base, state):
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
adapter = state.freeze()
print(
    f"loss {losses[0]:.2f} → {losses[-1]:.2f}; adapter {adapter.digest()[:12]} of {adapter.plan.parameters:,} numbers"
)
assert losses[-1] < losses[0] / 2
assert base.integrity() == before, "the base is what it was"
