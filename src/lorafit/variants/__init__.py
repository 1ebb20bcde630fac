"""Methods of low-rank adaptation. One file per method, five pure functions each, one line in VARIANTS."""

from lorafit.variants import dora, lora
from lorafit.variants.variant import Frozen, Served, Variant

VARIANTS: dict[str, Variant] = {
    "lora": Variant(lora.shapes, lora.init, lora.forward, lora.delta, lora.served, lora.together),
    "dora": Variant(dora.shapes, dora.init, dora.forward, dora.delta, dora.served),
}

__all__ = ["VARIANTS", "Frozen", "Served", "Variant"]
