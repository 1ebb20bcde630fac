"""A model folder in transformers' layout: what must be in it, and what is never allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import BaseError
from lorafit.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
QUANTISED = (  # files that are only there where weights are codes: of ModelOpt, AutoGPTQ, AutoAWQ, AutoRound and quanto
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quanto_qmap.json",
)
_HOW = ("quantization_config", "quantization", "compression_config")  # as transformers, MLX and sparseml call it
# Models of pictures and text whose text part transformers opens by itself.
_TEXT_OPENS = frozenset(f"{one}ForConditionalGeneration" for one in ("Qwen3_5", "Qwen3_5Moe", "Qwen4Exp"))
_MAY_NAME_CODE = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def check(folder: Path, *, weights: bool = True) -> None:
    """Raise BaseError listing all that is missing from, or not allowed in, a model folder; of a model of another kind
    that alone, for nothing that is missing from it matters then."""
    if other := _other_kind(folder):
        raise BaseError(
            f"{folder}: holds {other}, which is no causal language model: name the folder of one, which "
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


def is_refused(folder: Path) -> bool:
    """Whether `check` refuses the folder for what its small files say, whatever weights come with them."""
    return bool(_other_kind(folder) or _code(folder) or _quantised(folder))


def is_whole(folder: Path, *, weights: bool = True) -> bool:
    """Whether nothing is missing, be it allowed or not."""
    return not (_config(folder) or _tokenizer(folder) or (weights and _weights(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The files transformers opens, in order: model.safetensors, else those of the index, else all there are."""
    index, single = folder / INDEX, folder / SINGLE
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def classes(folder: Path) -> tuple[str, str | None]:
    """The class that a model was saved from, or its type where the config tells no class, and the class of the causal
    language model that transformers has for its type, if any."""
    from transformers.models.auto import modeling_auto

    described = _described(folder / "config.json")
    kind, named = str(described.get("model_type")), described.get("architectures")
    saved = named[0] if isinstance(named, list) and named else kind
    return str(saved), modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)


def _other_kind(folder: Path) -> str | None:
    """The class of a model that transformers knows, and knows as no causal language model; None for others."""
    described = _described(folder / "config.json")
    named = described.get("architectures")
    if isinstance(named, list) and named and str(named[0]).endswith(("ForCausalLM", "LMHeadModel")):
        return None  # without transformers, which takes seconds to import
    from transformers.models.auto import configuration_auto, modeling_auto

    saved, causal = classes(folder)
    known: Mapping[str, str] = configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
    kind = str(described.get("model_type"))
    if kind not in known or saved == causal or saved in _TEXT_OPENS:
        return None
    if causal is None:
        return saved
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if saved in masked.values() or (kind in masked and saved == modeling_auto.MODEL_MAPPING_NAMES.get(kind)):
        return None if described.get("is_decoder") is True else saved
    return saved if saved in _classes_of_other_tasks() else None


def _classes_of_other_tasks() -> set[str]:
    """All classes that transformers has for a task, but for those of causal language models."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    tables = [table for name, table in vars(modeling_auto).items() if re.fullmatch(r"MODEL_FOR_\w+_NAMES", name)]
    named = [one for table in tables for one in table.values()]  # one class, or a tuple of them
    return {name for one in named for name in ([one] if isinstance(one, str) else one)} - {*causal.values()}


def _code(folder: Path) -> list[str]:
    """Files that name code of their own."""
    return [
        f"{name} names code of its own (auto_map), which is never run: use a model that transformers knows by itself"
        for name in _MAY_NAME_CODE
        if _described(folder / name).get("auto_map")
    ]


def _quantised(folder: Path) -> list[str]:
    """Whether a file says of the model, or of a part of it, that its weights are codes instead of numbers."""
    for name in ("config.json", *QUANTISED):
        described = _described(folder / name)
        parts = [described, *(part for part in described.values() if isinstance(part, dict))]
        found = next(((part[key], f"{key} in {name}") for part in parts for key in _HOW if part.get(key)), None)
        if found is None and described and name in QUANTISED:
            found = described, name
        if found is not None:
            said, where = found
            return [
                f"its weights are quantised{_method(said)} ({where}), and such weights are not read yet: use the "
                "16-bit model they were made from, or a GGUF file of it"
            ]
    return []


def _method(said: Any) -> str:
    """By what weights were quantised, or to what, where that is said."""
    if not isinstance(said, dict):
        return ""
    if method := said.get("quant_method"):
        return f" by {method}"
    to = said.get("quant_algo") or next((f"{said[key]} bits" for key in ("bits", "w_bit") if said.get(key)), None)
    return f" to {to}" if to else ""


def _config(folder: Path) -> list[str]:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["config.json is missing: name a model folder, or copy it"]
    except (OSError, ValueError) as error:
        return [f"config.json cannot be read ({error})"]
    return [] if isinstance(described, dict) else ["config.json is not a JSON object"]


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


def _described(path: Path) -> dict[str, Any]:
    """A file of settings; nothing where it is none, which is told where it matters."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
