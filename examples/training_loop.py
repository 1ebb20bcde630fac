"""LoRA from nothing: the whole method in plain PyTorch, flat, to read before the real loop.

`src/lorafit/training/loop.py` is the same with validation, early stop, resume, micro-batches and a dtype of its own.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import lorafit

RANK, ALPHA, RATE, STEPS, BATCH = 8, 32, 2e-3, 12, 4

torch.manual_seed(0)
base = lorafit.open_base("smollm2-135m", torch.float32)
model, tokenizer = base.model, base.tokenizer
for parameter in model.parameters():
    parameter.requires_grad_(False)  # the base is frozen: nothing below writes to it
before = base.integrity()

# 1. A pair (A, B) beside every linear layer of the blocks. B starts at zero, so nothing changes yet.
pairs: list[torch.nn.Parameter] = []


def adapt(layer: torch.nn.Linear) -> None:
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.nn.Parameter(torch.empty(RANK, layer.in_features).uniform_(-bound, bound))
    b = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))
    pairs.extend((a, b))
    # y = W x + s·B A x, with s = alpha / rank
    layer.register_forward_hook(lambda _, args, y: y + (args[0] @ a.T) @ b.T * (ALPHA / RANK))


for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and ".layers." in name:
        adapt(module)
print(f"{sum(p.numel() for p in pairs):,} trained, {sum(p.numel() for p in model.parameters()):,} frozen")

# 2. Examples: the prompt is read, only the answer and its end-of-turn token are learnt.
handbook = Path(lorafit.__file__).parent / "data" / "builtin" / "train.jsonl"
rows = []
for line in handbook.read_text().splitlines()[: STEPS * BATCH]:
    messages = json.loads(line)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    answer = messages[-1]["content"] + tokenizer.eos_token
    p, a = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    rows.append((p + a, [-100] * len(p) + a))  # -100: no loss here

# 3. The loop.
optimizer = torch.optim.AdamW(pairs, lr=RATE, weight_decay=0.0)
losses = []
for step in range(STEPS):
    batch = rows[step * BATCH : (step + 1) * BATCH]
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])  # padded right: never looked at
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch])
    logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # each token from those before it
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = RATE * (1 - step / STEPS)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    print(f"step {step + 1}/{STEPS}: {losses[-1]:.3f} nats per answer token")

assert losses[-1] < losses[0] / 2, "it should have learnt something"
assert base.integrity() == before, "and the base should be as it was"
