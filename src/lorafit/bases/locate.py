"""Where bases come from: one file per kind of source. Each ends in a model folder on this machine."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from lorafit.bases import builtin, folder, gguf, hub
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.errors import BaseError
from lorafit.files import absolute, did_you_mean


def found(name: str, report: Report = silent, watch: Watch = unwatched, *, weights: bool = True) -> tuple[Path, str]:
    """The checked model folder that `name` means, and the name under which it opens again as the same content.

    name: built in, a folder, a .gguf file, or ORG/NAME[@REVISION] of the hub, looked for in this order.
    weights: False fetches and asks for what a tokenizer needs, and no more.
    Raises BaseError naming all that is wrong.
    """
    path, known_as = _located(name, report, watch, weights)
    folder.check(path, weights=weights)
    return path, known_as


def address(name: str) -> str:
    """The name under which the same base opens from every folder: what goes to disk.

    A local path is absolute, and so is never taken for a model of the hub.
    """
    return name if name in builtin.BUILTIN else absolute(name)


def require(name: str) -> None:
    """Raise BaseError where `name` can be no base. Nothing is fetched, converted or opened."""
    meant = _meant(name)
    if isinstance(meant, Path) and meant.is_dir():
        gguf.name_of(meant)  # of a converted copy that is damaged it is said how to remove it
        folder.check(meant)


def _located(name: str, report: Report, watch: Watch, weights: bool) -> tuple[Path, str]:
    meant = _meant(name)
    if isinstance(meant, hub.Wanted):
        return hub.fetched(meant, report, watch, weights=weights)
    if meant.is_dir():
        kept = gguf.name_of(meant)
        return meant, kept if kept in builtin.BUILTIN else name
    return gguf.converted(meant, name if name in builtin.BUILTIN else meant.stem, report, watch), name


def _meant(name: str) -> Path | hub.Wanted:
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
        raise BaseError(f"'{name}': is no base that is known here: did you mean {near[0]}?")
    if path.parent != Path():
        raise BaseError(f"'{name}': there is no such folder: {did_you_mean(path, 'check the path')}")
    names = ", ".join(builtin.BUILTIN)
    what = f"neither a model folder, nor a .gguf file, nor built in ({names}), nor ORG/NAME of the hub"
    raise BaseError(f"'{name}': {what}: {did_you_mean(path, 'lorafit bases lists what is at hand')}")
