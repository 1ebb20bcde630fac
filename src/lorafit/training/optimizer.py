"""AdamW on the flat master, with linear warm-up and linear decay to zero."""

from __future__ import annotations

import torch

from lorafit.adapters.state import TrainState


def make_optimizer(state: TrainState) -> torch.optim.Optimizer:
    """torch's fused AdamW, betas 0.9 and 0.999 (Loshchilov & Hutter, arXiv 1711.05101), without its decay."""
    return torch.optim.AdamW(state.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def step(state: TrainState, optimizer: torch.optim.Optimizer, rate: float, weight_decay: float, clip: float) -> float:
    """One update from `state.master.grad`, which is cleared; returns the gradient's norm before clipping.

    The decay is AdamW's, on matrices only: DoRA's magnitudes, decayed to zero, would switch their layers off.

    Args:
        state: The trained factors.
        optimizer: The result of `make_optimizer`.
        rate: The learning rate of this step.
        weight_decay: AdamW's decay.
        clip: The largest norm of the gradient.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(state.parameters(), clip))
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        state.master[: state.matrices].mul_(1 - rate * weight_decay)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def rate_at(done: int, steps: int, warmup: int, peak: float) -> float:
    """The learning rate after `done` steps: it rises to `peak` over `warmup` steps, then falls to 0."""
    if done < warmup:
        return peak * (done + 1) / warmup
    return peak * (steps - done) / max(1, steps - warmup)
