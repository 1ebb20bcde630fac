"""Recognises adapter folders by their files. It imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import AdapterError, FormatError
from lorafit.files import did_you_mean, put_back, read_json

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "lorafit.json"
CLASSIFICATION = "classification"


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder itself, or the one inside a run folder."""
    path = Path(path)
    return path / "adapter" if (path / "run.json").exists() else path


def require_adapter_folder(folder: str | Path) -> None:
    """Raise FormatError where this is not an adapter folder: another program's, a pickle, one that lacks a file."""
    folder = Path(folder)
    put_back(folder)
    if folder.is_file():
        raise FormatError(f"{folder}: a file, not an adapter folder: give the adapter first, then the data")
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such adapter folder: {did_you_mean(folder, 'check the path')}")
    if (folder / "adapters.safetensors").exists():
        raise FormatError(f"{folder}: this is an mlx-lm adapter: convert it to PEFT's layout first")
    if not (folder / WEIGHTS).exists():
        pickles = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
        if pickles:
            raise FormatError(
                f"{folder / pickles[0]}: a pickle can run any code when it is opened and is never read: "
                f"save the adapter again as {WEIGHTS} (in PEFT: save_pretrained(..., safe_serialization=True))"
            )
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
    if missing:
        raise FormatError(
            f"{folder}: not an adapter folder: {' and '.join(missing)} missing: name a run, or the adapter folder in it"
        )


def require_writes(folder: str | Path) -> None:
    """Raise AdapterError where an adapter folder, or that of a run, holds an adapter that writes no text."""
    if (task := task_of_head(folder)) is None:
        return
    if task != CLASSIFICATION:
        raise AdapterError(
            f"{folder}: is for the task '{task}', which writes no text: lorafit eval scores it, and its README.md "
            "shows how to use it from Python"
        )
    raise AdapterError(
        f"{folder}: is a classifier, which gives a text one of its labels and writes none: lorafit classify labels "
        "new texts, lorafit eval scores it on texts with labels, lorafit serve BASE NAME=RUN answers /classify "
        "(docs/classification.md)"
    )


def require_classifies(folder: str | Path) -> None:
    """Raise AdapterError where an adapter folder, or that of a run, holds no classifier whose labels are known."""
    if not classifies(folder):
        raise AdapterError(
            f"{folder}: is no classifier that lorafit trained (--task classification): lorafit chat asks an adapter "
            "that writes text"
        )


def classifies(folder: str | Path) -> bool:
    """Whether the folder describes the labels of a classifier."""
    return task_of_head(folder) == CLASSIFICATION


def task_of_head(folder: str | Path) -> str | None:
    """The task of an adapter with a head, which writes no text; None for other adapters."""
    ours = adapter_folder(folder) / OURS
    described = read_json(ours) if ours.exists() else {}
    found = described.get("classes") if isinstance(described, dict) else None
    return str(found.get("task", CLASSIFICATION)) if isinstance(found, dict) and found else None
