"""A model folder in transformers' layout: what must be in it, and what is never allowed."""

from __future__ import annotations

import json
from pathlib import Path

from lorafit.errors import BaseError
from lorafit.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MAY_NAME_CODE = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def check(folder: Path, *, weights: bool = True) -> None:
    """Raise BaseError listing all that is missing from, or not allowed in, a model folder."""
    problems = [*_config(folder), *code(folder), *_tokenizer(folder), *(_weights(folder) if weights else [])]
    if problems:
        raise BaseError(f"{folder}: cannot be used as a base\n  " + "\n  ".join(problems)
                        + "\nname the folder of a whole model; lorafit bases lists some")  # fmt: skip


def is_whole(folder: Path, *, weights: bool = True) -> bool:
    """Whether nothing is missing, be it allowed or not."""
    return not (_config(folder) or _tokenizer(folder) or (weights and _weights(folder)))


def code(folder: Path) -> list[str]:
    """Files that name code of their own."""
    return [f"{name} names code of its own (auto_map), which is never run: use a model that transformers knows by "
            "itself" for name in _MAY_NAME_CODE if _names_code(folder / name)]  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """The files transformers opens, in order: model.safetensors, else those of the index, else all there are."""
    index, single = folder / INDEX, folder / SINGLE
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


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


def _names_code(path: Path) -> bool:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # told apart where it matters
    return isinstance(described, dict) and bool(described.get("auto_map"))
