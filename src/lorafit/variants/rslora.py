"""rsLoRA: LoRA with the scale alpha / √rank, so that a higher rank does not slow learning down (Kalajdzievski 2023,
arXiv 2312.03732)."""

from __future__ import annotations

import math
from dataclasses import replace

from lorafit.variants import lora
from lorafit.variants.variant import Peft


def scaling(alpha: float, rank: int) -> float:
    return alpha / math.sqrt(rank)


def alpha(scaling: float, rank: int) -> float:
    return scaling * math.sqrt(rank)


VARIANT = replace(lora.VARIANT, scaling=scaling, alpha=alpha, peft=Peft(config={"use_rslora": True}))
