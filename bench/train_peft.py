"""The PEFT arms of `bench/train.py`: PEFT in the transformers Trainer. Imports nothing of lorafit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from train_child import PEFT_ARMS, Job, Pace, Seen, load_model
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments


@dataclass(frozen=True)
class Pad:
    """Right-padded batches, to the longest row of each."""

    pad_id: int = 0

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        fills = {"input_ids": self.pad_id, "labels": -100, "attention_mask": 0}
        return {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
            for name, fill in fills.items()
        }


class Paced(TrainerCallback):
    """Tells the pace of every optimizer step; it waits there between windows."""

    def __init__(self, pace: Pace, seen: Seen):
        self.pace, self.seen = pace, seen

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.pace.stepped(self.seen.take())


def rate_factor(done: int, job: Job) -> float:
    """lorafit's schedule as a factor of the peak: the Trainer's own begins one step behind, with a step at rate 0."""
    if done < job.rate_warmup:
        return (done + 1) / job.rate_warmup
    return max(0.0, (job.all_steps - done) / max(1, job.all_steps - job.rate_warmup))


def examples_of(job: Job, flat: bool) -> list[dict[str, list[int]]]:
    examples = []
    for ids, trained in job.rows:
        labels = [i if t else -100 for i, t in zip(ids, trained, strict=True)]
        mask = {} if flat else {"attention_mask": [1] * len(ids)}  # the flattening collator makes positions instead
        examples.append({"input_ids": ids, "labels": labels, **mask})
    return examples


def adapted(job: Job, half_factors: bool) -> Any:
    """The base with PEFT's LoRA in it, from the very numbers lorafit starts from."""
    model: Any = load_model(job)
    if job.start is not None:
        return PeftModel.from_pretrained(model, job.start, is_trainable=True, autocast_adapter_dtype=not half_factors)
    config = LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=not half_factors)


def run(job: Job) -> None:
    """Train through the windows and save the adapter."""
    pace = Pace(job)
    arm = PEFT_ARMS[job.arm]
    model = adapted(job, arm.half_factors)
    pace.memory.base_is_loaded()
    seen = Seen(model.get_input_embeddings(), job)
    arguments = TrainingArguments(
        output_dir=job.out,
        per_device_train_batch_size=job.batch,
        max_steps=job.all_steps,
        seed=job.seed,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=job.device != "cpu",
        use_cpu=job.device == "cpu",
        train_sampling_strategy="group_by_length" if arm.grouped else "random",
        torch_compile=arm.compiled,
        bf16=arm.autocast,
        use_liger_kernel=arm.liger,
    )
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=job.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_factor(done, job))
    collate = DataCollatorWithFlattening() if arm.flat else Pad()
    trainer = Trainer(
        model,
        arguments,
        collate,
        examples_of(job, arm.flat),
        optimizers=(optimizer, schedule),
        callbacks=[Paced(pace, seen)],
    )
    trainer.train()
    folder = Path(job.out) / "adapter"
    model.save_pretrained(str(folder))
    pace.finish(adapter=os.fspath(folder), peft=peft.__version__)
