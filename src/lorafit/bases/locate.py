"""Locates bases: the name of a base goes in, a checked model folder on this machine comes out."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from lorafit.bases import builtin, folder, gguf, hub
from lorafit.bases.opening import Opening
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.errors import BaseError
from lorafit.files import absolute, did_you_mean


def found(
    name: str,
    report: Report = silent,
    watch: Watch = unwatched,
    *,
    weights: bool = True,
    opening: Opening | None = None,
) -> tuple[Path, str]:
    """Locate a base, and fetch or convert it where that is needed.

    Args:
        name: a built-in name, a folder, a .gguf file, or ORG/NAME[@REVISION] of the hub, in this order.
        report: called with one line for each step that takes a while.
        watch: called with the progress of a download or conversion.
        weights: whether weights are fetched and required, rather than only what a tokenizer needs.
        opening: how it is opened; None for a language model.

    Returns:
        The model folder, and the name that opens the same content again.

    Raises:
        BaseError: with everything that is wrong.
    """
    path, known_as = _located(name, report, watch, weights, opening)
    folder.check(path, weights=weights, opening=opening)
    return path, known_as


def address(name: str) -> str:
    """The name that opens the same base in every working folder, for files on disk. A local path is made absolute, and
    so is never taken for a model of the hub."""
    return name if name in builtin.BUILTIN else absolute(name)


def require(name: str, opening: Opening | None = None) -> None:
    """Raise BaseError where `name` cannot be a base. Nothing is fetched, converted or opened. opening: how it will be
    opened; None for a language model."""
    source = _source(name)
    if isinstance(source, Path) and source.is_dir():
        gguf.name_of(source)  # its error about a damaged converted copy says how to remove it
        folder.check(source, opening=opening)


def encodes(name: str) -> bool:
    """Whether a base on this machine is known to write no text, though a classifier can be made of it: an encoder."""
    path = Path(name).expanduser()
    return name not in builtin.BUILTIN and path.is_dir() and folder.only_classifies(path)


def _located(name: str, report: Report, watch: Watch, weights: bool, opening: Opening | None) -> tuple[Path, str]:
    source = _source(name)
    if isinstance(source, hub.Wanted):
        return hub.fetched(source, report, watch, weights=weights, opening=opening)
    if source.is_dir():
        converted_from = gguf.name_of(source)
        return source, converted_from if converted_from in builtin.BUILTIN else name
    return gguf.converted(source, name if name in builtin.BUILTIN else source.stem, report, watch), name


def _source(name: str) -> Path | hub.Wanted:
    """The folder, the GGUF file, or the model of the hub that a name stands for."""
    if name in builtin.BUILTIN:
        return builtin.file_of(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseError(f"{path}: there is no such file: {did_you_mean(path, 'check the path')}")
        return path
    if path.suffix == ".safetensors" and path.exists():
        raise BaseError(f"'{name}': is a file of weights, not a base: name the folder it is in")
    if path.exists() or name == "builtin":
        raise BaseError(f"'{name}': is data, not a base: give the base first, then the data")
    wanted = hub.parse(name)
    if wanted is not None:
        return wanted
    near = get_close_matches(name, builtin.BUILTIN, 1, 0.5)
    if near:
        raise BaseError(f"'{name}': is not a known base: did you mean {near[0]}?")
    if path.parent != Path():
        raise BaseError(f"'{name}': there is no such folder: {did_you_mean(path, 'check the path')}")
    names = ", ".join(builtin.BUILTIN)
    what = f"neither a model folder, nor a .gguf file, nor built in ({names}), nor ORG/NAME of the hub"
    raise BaseError(f"'{name}': {what}: {did_you_mean(path, 'lorafit bases lists what is at hand')}")
