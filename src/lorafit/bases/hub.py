"""Models of the hub, fetched once into the hub's own cache, which other tools share.

HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE work as in other programs that use the hub. Pickles and
code are never fetched. Small files come first, then weights, and the branch last: where the weights are complete, so is
the rest, and a branch never names an incomplete model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES, ENOSPC, EROFS
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock
from typing import Any

from lorafit.bases import folder
from lorafit.bases.opening import Opening
from lorafit.bases.progress import Report, Watch, require_room
from lorafit.errors import BaseError
from lorafit.files import free_bytes, shown

_NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMED = """
config.json generation_config.json preprocessor_config.json processor_config.json tokenizer*.json tokenizer.model*
spiece.model sentencepiece.bpe.model special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
chat_template.json chat_template.jinja additional_chat_templates/*.jinja
"""
_SMALL = (*_NAMED.split(), folder.INDEX, *folder.QUANTISED)


@dataclass(frozen=True)
class Wanted:
    """A model of the hub; `revision` is a branch, a tag, or a full commit hash."""

    id: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.id if self.revision == "main" else f"{self.id}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None


def parse(name: str) -> Wanted | None:
    """Read ORG/NAME or ORG/NAME@REVISION; None for other names."""
    match = _NAME.fullmatch(name)
    return Wanted(match["id"], match["revision"] or "main") if match else None


def at_hand(wanted: Wanted, *, weights: bool = True) -> Path | None:
    """The model's folder in the hub's cache; None where it is not complete. The hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(wanted.id, "config.json", revision=wanted.revision)
    if not isinstance(config, str) or not folder.is_whole(Path(config).parent, weights=weights):
        return None
    return Path(config).parent


def fetched(
    wanted: Wanted, report: Report, watch: Watch, *, weights: bool = True, opening: Opening | None = None
) -> tuple[Path, str]:
    """Fetch the missing files of a model; the other arguments are those of `locate.found`. Returns the folder of its
    commit in the hub's cache, and ORG/NAME@COMMIT.

    Raises BaseError, before weights are fetched, where the hub refuses, or the disk has no room.
    """
    from huggingface_hub import HfApi, constants

    here = at_hand(wanted, weights=weights)
    if here is not None and (wanted.is_commit or constants.HF_HUB_OFFLINE):
        return here, f"{wanted.id}@{here.name}"
    try:
        with _explained(wanted):
            info = HfApi().model_info(wanted.id, revision=wanted.revision, files_metadata=True)
    except _Unreachable as error:
        if here is None:
            raise BaseError(f"'{wanted}': there is no such path, and {error.why}: {error.step}") from error
        report(f"{error.why}: opening {wanted} as it was when it was fetched ({here.name[:12]})")
        return here, f"{wanted.id}@{here.name}"
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    commit = Wanted(wanted.id, str(info.sha))
    small, large = _chosen(wanted, sizes)
    missing = {name: sizes[name] for name in [*small, *(large if weights else [])] if not _cached(commit, name)}
    cache = Path(constants.HF_HUB_CACHE)
    if missing:
        total = sum(missing.values())
        report(
            f"downloading {wanted} ({info.sha}): {len(missing)} file{'s' * (len(missing) != 1)}, {shown(total)}, "
            f"into {cache}, where {shown(free_bytes(cache))} are free"
        )
        require_room(total, cache, f"{wanted} does not fit", "HF_HOME")
    bar = _bar(f"downloading {wanted.id}", sum(missing.values()), watch)
    try:
        with _explained(wanted):
            _fetch(commit, [name for name in small if name in missing], bar)
            # A model that would be refused is reported by the check of its folder; its gigabytes are not fetched.
            if not folder.is_refused(cache_of(commit), opening):
                _fetch(commit, [name for name in large if name in missing], bar)
            if not wanted.is_commit and (here is None or here.name != info.sha):
                _fetch(wanted, ["config.json"], bar)  # now the branch may name this commit
    except _Unreachable as error:
        raise BaseError(f"{wanted}: {error.why}: {error.step}") from error
    return cache_of(commit), f"{wanted.id}@{info.sha}"


def cache_of(commit: Wanted) -> Path:
    """The folder of a commit in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{commit.id.replace('/', '--')}" / "snapshots" / commit.revision


def _chosen(wanted: Wanted, sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """The small files, and the weight files that transformers opens. Raises BaseError where it can open none."""
    small = [name for name in sizes if any(fnmatch(name, pattern) for pattern in _SMALL)]
    tensors = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    shards = [name for name in tensors if fnmatch(name, "*-of-*")]
    large = [folder.SINGLE] if folder.SINGLE in tensors else shards if folder.INDEX in sizes else tensors
    if "adapter_config.json" in sizes and "config.json" not in sizes:
        raise BaseError(f"{wanted}: this is an adapter, not a base: name the base it belongs to")
    if large and "config.json" in sizes:
        return small, large
    if any(name.endswith(".gguf") for name in sizes):
        raise BaseError(f"{wanted}: holds GGUF files, which open from a path only: save one here and give its path")
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in sizes):
        raise BaseError(
            f"{wanted}: holds its weights as pickles only, which can run any code when opened and are "
            "never fetched: choose a model or a revision with safetensors"
        )
    raise BaseError(f"{wanted}: holds no model in transformers' layout (config.json and safetensors): choose another")


def _cached(commit: Wanted, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(commit.id, name, revision=commit.revision), str)


def _fetch(wanted: Wanted, names: list[str], bar: type) -> None:
    """Fetch files one after another into the hub's cache."""
    from huggingface_hub import hf_hub_download

    for name in names:
        hf_hub_download(wanted.id, name, revision=wanted.revision, tqdm_class=bar)


def _bar(what: str, total: int, watch: Watch) -> type:
    """A progress bar for the hub's client that draws nothing, and reports the bytes of all files together."""
    from huggingface_hub.utils.tqdm import tqdm

    lock, done = Lock(), 0

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})
            self.update(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            with lock:
                before, done = min(done, total), done + int(n or 0)
                if min(done, total) != before:
                    watch(what, min(done, total), total, "bytes")

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, if they are counted separately: only bytes on the disk count."""

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

    return ReportingBar


class _Unreachable(Exception):
    """No answer from the hub; `why` is the reason, `step` what to do."""

    def __init__(self, why: str, step: str):
        self.why, self.step = why, step
        super().__init__(why)


@contextmanager
def _explained(wanted: Wanted) -> Iterator[None]:
    """Turn errors of the hub's client into BaseErrors that say what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise BaseError(
            f"{wanted}: is gated: accept its terms at {hub}/{wanted.id}, then put a token of that account into HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BaseError(
            f"'{wanted}': there is no such path, and the hub ({hub}) knows no such model: check the "
            "spelling; for a private one put a token that may read it in HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BaseError(
            f"{wanted.id}: has no branch, tag or commit '{wanted.revision}': choose one that "
            f"{hub}/{wanted.id}/commits lists; give a commit in full"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise _Unreachable(
            f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold it whole",
            "remove HF_HUB_OFFLINE once, to fetch it",
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in {401, 403}:
            raise BaseError(f"{wanted}: the hub ({hub}) refuses it ({status}): check HF_TOKEN") from error
        raise _Unreachable(f"the hub ({hub}) answers with status {status}", "try again later") from error
    except BaseError:
        raise
    except Exception as error:  # the client passes on errors of its network library
        if isinstance(error, OSError) and error.errno in {EACCES, ENOSPC, EROFS}:
            raise BaseError(
                f"{constants.HF_HUB_CACHE}: cannot be written ({error.strerror}): make room, or name "
                "another folder in HF_HOME"
            ) from error
        step = "check the network and HF_ENDPOINT, then try again; what was fetched is kept"
        raise _Unreachable(f"the hub ({hub}) cannot be reached ({error})", step) from error
