"""Models in which PEFT takes the targets of a folder for something else than the modules of these names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import conversion_mapping

# PEFT 0.21 refuses these: the fused kernels of the families read the weight past the module's forward.
_STATE_SPACE = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_PAST_FORWARD = {"out_proj", "conv1d"}
# PEFT 0.21 turns targets that end in these into parameters of the experts, by the pattern of the model's family.
_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def refused_by_peft(model: Any, name: str) -> bool:
    """Whether PEFT adapts no module of this name in a model of this family."""
    return name in _PAST_FORWARD and _family(model) in _STATE_SPACE


def misread_by_peft(model: Any, paths: Sequence[str]) -> str | None:
    """What PEFT will make of an adapter on these modules, where it is not what was trained; None where it is."""
    family = _family(model)
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
    return None


def _family(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _ends(paths: Sequence[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}
