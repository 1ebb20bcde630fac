"""Checks a model folder in transformers' layout: what must be in it, and what is never allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.bases.opening import CLASSIFIER, Opening
from lorafit.errors import BaseError
from lorafit.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Files that only models with quantised weights have: those of ModelOpt, AutoGPTQ, AutoAWQ, AutoRound and quanto.
_QUANT_CONFIGS = ("hf_quant_config", "quantize_config", "quant_config", "quantization_config", "quanto_qmap")
QUANTISED = tuple(f"{name}.json" for name in _QUANT_CONFIGS)
_QUANT_KEYS = ("quantization_config", "quantization", "compression_config")  # of transformers, MLX and sparseml
# Models of pictures and text whose text part transformers opens on its own.
_TEXT_OPENS = frozenset(f"{name}ForConditionalGeneration" for name in ("Qwen3_5", "Qwen3_5Moe", "Qwen4Exp"))
_MAY_NAME_CODE = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def check(folder: Path, *, weights: bool = True, opening: Opening | None = None) -> None:
    """Raise BaseError with everything that is missing from a model folder or not allowed in it; for a model of another
    kind, with only that. opening: how it is opened; None for a language model."""
    if opening and (other := _without(folder, opening)):
        raise BaseError(
            f"{folder}: holds {other}, of which no {opening.noun} is made: name the folder of an encoder or a "
            "causal language model"
        )
    if not opening and (other := _other_kind(folder)):
        trained = "; with texts and labels, --task classification trains it" * only_classifies(folder)
        raise BaseError(
            f"{folder}: holds {other}, which is no causal language model{trained}: name the folder of one, which "
            "writes from left to right; lorafit bases lists some"
        )
    problems = [
        *_config(folder),
        *_code(folder),
        *_quantised(folder),
        *_tokenizer(folder),
        *(_weights(folder) if weights else []),
    ]
    if problems:
        raise BaseError(
            f"{folder}: cannot be used as a base\n  "
            + "\n  ".join(problems)
            + "\nname the folder of a whole model; lorafit bases lists some"
        )


def is_refused(folder: Path, opening: Opening | None = None) -> bool:
    """Whether `check` refuses the folder because of its small files, whatever its weights are."""
    other = _without(folder, opening) if opening else _other_kind(folder)
    return bool(other or _code(folder) or _quantised(folder))


def is_whole(folder: Path, *, weights: bool = True) -> bool:
    """Whether nothing is missing from the folder."""
    return not (_config(folder) or _tokenizer(folder) or (weights and _weights(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers opens: model.safetensors, else those of the index, else all there are."""
    index, single = folder / INDEX, folder / SINGLE
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def classes(folder: Path) -> tuple[str, str | None]:
    """The class that a model was saved from, or its type where the config names no class; and transformers' class of a
    causal language model for this type, if any."""
    from transformers.models.auto import modeling_auto

    config = _settings(folder / "config.json")
    kind, named = str(config.get("model_type")), config.get("architectures")
    saved = named[0] if isinstance(named, list) and named else kind
    return str(saved), modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)


def _other_kind(folder: Path) -> str | None:
    """The class of a model that transformers knows, and that is not a causal language model; None for others."""
    config = _settings(folder / "config.json")
    named = config.get("architectures")
    if isinstance(named, list) and named and str(named[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return None  # without transformers, which takes seconds to import
    from transformers.models.auto import configuration_auto, modeling_auto

    saved, causal = classes(folder)
    known: Mapping[str, str] = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    kind = str(config.get("model_type"))
    if kind not in known or saved == causal or saved in _TEXT_OPENS:
        return None
    if causal is None:
        return saved
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if saved in masked.values() or (kind in masked and saved == modeling_auto.MODEL_MAPPING_NAMES.get(kind)):
        return None if config.get("is_decoder") is True else saved
    return saved if saved in _classes_of_other_tasks() else None


def only_classifies(folder: Path) -> bool:
    """Whether, by its config, the folder holds a model that can be made a classifier, but writes no text."""
    return _other_kind(folder) is not None and _without(folder, CLASSIFIER) is None


def _without(folder: Path, opening: Opening) -> str | None:
    """The class of a model that transformers cannot open in this way, or that has both encoder and decoder; None for
    others."""
    from transformers.models.auto import configuration_auto, modeling_auto

    kind = str(_settings(folder / "config.json").get("model_type"))
    known: Mapping[str, str] = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    able: Mapping[str, str] = getattr(modeling_auto, opening.table)
    both = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return classes(folder)[0] if kind in known and (kind not in able or kind in both) else None


def _classes_of_other_tasks() -> set[str]:
    """All classes that transformers has for a task, except those of causal language models."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    tables = [table for name, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_FOR_\w+_NAMES", name)]
    entries = [entry for table in tables for entry in table.values()]  # the name of a class, or a tuple of names
    return {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)} - {*causal.values()}


def _code(folder: Path) -> list[str]:
    """Problems of files that name code of their own."""
    return [
        f"{name} names code of its own (auto_map), which is never run: use a model that transformers itself knows"
        for name in _MAY_NAME_CODE
        if _settings(folder / name).get("auto_map")
    ]


def _quantised(folder: Path) -> list[str]:
    """The problem of a model with quantised weights, by its small files."""
    for name in ("config.json", *QUANTISED):
        settings = _settings(folder / name)
        parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
        sources = [(part[key], f"{key} in {name}") for part in parts for key in _QUANT_KEYS if part.get(key)]
        if settings and name in QUANTISED:
            sources.append((settings, name))
        if sources:
            described, where = sources[0]
            return [
                f"its weights are quantised{_method(described)} ({where}), and such weights are not read yet: use the "
                "16-bit model they were made from, or a GGUF file of it"
            ]
    return []


def _method(settings: Any) -> str:
    """The method of quantisation, or the format of the weights; "" where the settings name neither."""
    if not isinstance(settings, dict):
        return ""
    if method := settings.get("quant_method"):
        return f" by {method}"
    bits = settings.get("bits") or settings.get("w_bit")
    form = settings.get("quant_algo") or (f"{bits} bits" if bits else "")
    return f" to {form}" if form else ""


def _config(folder: Path) -> list[str]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["config.json is missing: name a model folder, or copy it"]
    except (OSError, ValueError) as error:
        return [f"config.json cannot be read ({error})"]
    return [] if isinstance(config, dict) else ["config.json is not a JSON object"]


def _tokenizer(folder: Path) -> list[str]:
    if any((folder / name).exists() for name in TOKENIZERS):
        return []
    return ["no tokenizer (tokenizer.json): copy it from where the model came from"]


def _weights(folder: Path) -> list[str]:
    if not (folder / INDEX).exists():
        if list(folder.glob("*.safetensors")):
            return []
        pickles = " (pytorch_model.bin is a pickle and is never read)" if list(folder.glob("*.bin")) else ""
        return [f"no weights as safetensors{pickles}: copy them, too"]
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX} cannot be read ({error})"]
    return [f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:5])}"] if missing else []


def _settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} where it cannot be read, which `_config` reports."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
