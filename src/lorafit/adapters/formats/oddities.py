"""Models in which PEFT takes the targets of a folder for something else than the modules of these names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import conversion_mapping

from lorafit.adapters.plan import LowRank

# PEFT 0.21 refuses these: the fused kernels of the families read the weight past the module's forward.
_STATE_SPACE = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_PAST_FORWARD = {"out_proj", "conv1d"}
# PEFT 0.21 turns targets that end in these into parameters of the experts, by the pattern of the model's family.
_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
# As PEFT 0.21 reads a folder it renames tensors as transformers does those of a base's own files, by patterns that also
# fit other modules of these families. The ends of their names; None: so many that no layer is safe.
_RENAMED: dict[str, set[str] | None] = {
    "laguna": {"gate_proj", "up_proj", "down_proj"},
    "inkling2": {"weight_proj"},
    "inkling2_text": {"weight_proj"},
    "mistral_large4": None,
    "unlimited_ocr": None,
}
_TRANSPOSED = {"llama4", "llama4_text"}  # whose experts PEFT 0.21 takes for (experts, d_out, d_in)


def refused_by_peft(model: Any, name: str) -> bool:
    """Whether PEFT adapts no module of this name in a model of this family."""
    return name in _PAST_FORWARD and _family(model) in _STATE_SPACE


def misread_by_peft(model: nn.Module, slots: Sequence[LowRank]) -> str | None:
    """What PEFT will make of an adapter of these slots, where it is not what was trained; None where it is."""
    family, paths = _family(model), [slot.site.path for slot in slots if slot.site.count == 1]
    patterns = {"mixtral": "mixtral", **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})}
    experts = _EXPERTS.get(patterns.get(family or "", ""), set())
    merged = [path for path in paths if path.rpartition(".")[2] in experts]
    refused = [path for path in paths if refused_by_peft(model, path.rpartition(".")[2])]
    if merged:
        return (
            f"PEFT takes targets of a {family} that end in {', '.join(sorted(_ends(merged)))} for its experts: it "
            f"would pass over {len(merged)} modules of this plan, such as {merged[0]}. lorafit reads them as they "
            "are trained; for PEFT name others with --targets"
        )
    if refused:
        return (
            f"PEFT refuses {', '.join(sorted(_ends(refused)))} of a {family}, whose fused kernels read the weight "
            "past the module. lorafit reads them as trained; for PEFT leave them out of --targets"
        )
    if family in _TRANSPOSED and (held := [slot.site.path for slot in slots if slot.site.count > 1]):
        return (
            f"PEFT takes the experts of a {family} for transposed, and does not read {held[0]}. lorafit reads them as "
            "they are trained; for PEFT leave them out of --targets"
        )
    renamed = [path for path in (slot.site.path for slot in slots) if _is_renamed(family, path.rpartition(".")[2])]
    if renamed:
        return (
            f"PEFT renames tensors of a {family} as it reads them: it would pass over {len(renamed)} weights of this "
            f"plan, such as {renamed[0]}. lorafit reads them as they are trained; for PEFT leave them out of --targets"
        )
    odd = [f"{slot.site.path}: {why}" for slot in slots if (why := _misread_convolution(model, slot))]
    if odd := odd + _odd_attention(slots):
        return (
            f"{'; '.join(odd[:3])}{' ...' if odd[3:] else ''}. lorafit reads them as trained; for PEFT leave them out"
        )
    return None


def _is_renamed(family: str | None, name: str) -> bool:
    names = _RENAMED.get(family or "", set())
    return names is None or name in names


def _misread_convolution(model: nn.Module, slot: LowRank) -> str | None:
    """PEFT 0.21 gives A the stride and the padding of a convolution, and nothing else of it."""
    module = model.get_submodule(slot.site.path) if slot.site.kind == "convolution" else None
    if not isinstance(module, _ConvNd):
        return None
    if any(step > 1 and side > 1 for step, side in zip(module.dilation, module.kernel_size, strict=True)):
        return "PEFT adapts this convolution without its dilation"
    if module.padding_mode != "zeros":
        return (
            f"PEFT pads what the adapter of this convolution reads with zeros, and not in mode '{module.padding_mode}'"
        )
    return None


def _odd_attention(slots: Sequence[LowRank]) -> list[str]:
    """PEFT 0.21 adds the change of out_proj twice, in each forward and where it merges (huggingface/peft#3774)."""
    paths = [slot.site.path for slot in slots if slot.site.kind == "attention.out_proj.weight"]
    return [f"{path}: PEFT adds its change twice" for path in paths]


def added_twice(config: Mapping[str, Any]) -> bool:
    """Whether a config names a version of PEFT that adds the change of out_proj twice."""
    version = re.match(r"0\.(\d+)\.", str(config.get("peft_version")))
    return version is not None and int(version[1]) <= 21


def _family(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _ends(paths: Sequence[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}
