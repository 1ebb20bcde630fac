"""Methods of low-rank adaptation. One file per method, four pure functions each, one line in VARIANTS."""

from lorafit.variants import dora, lora
from lorafit.variants.variant import Frozen, Variant

VARIANTS: dict[str, Variant] = {
    "lora": Variant(lora.shapes, lora.init, lora.forward, lora.delta, lora.together),
    "dora": Variant(dora.shapes, dora.init, dora.forward, dora.delta),
}

__all__ = ["VARIANTS", "Frozen", "Variant"]
