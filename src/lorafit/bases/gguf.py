"""Converts GGUF files, once and by transformers, into folders of fp32 safetensors in lorafit's cache."""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.bases.progress import Report, Watch, require_room
from lorafit.errors import BaseError, FormatError
from lorafit.files import free_bytes, read_json, sha256_file, shown, whole_folder, write_json

if TYPE_CHECKING:
    import torch

_CONVERSION = 1  # the version of converted folders
OURS = "lorafit-base.json"
_UNFINISHED = re.compile(r"\..+-[0-9a-f]{12}-\d+\.\w+(\.old)?")  # the folders that whole_folder builds in
_SHARD = "2GB"
# Tensors of rotary frequencies, which are not learnt. transformers passes over them.
_ROPE = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


# Values of a file that some of transformers' readers leave at a default, with their names in the config.
_CONFIG_NAMES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_PARTIAL_ROTARY = {"nemotron", "phi3", "stablelm"}
# Architectures and numbers of layers whose attention is scaled by hidden size / heads, which no file says; others of
# these families scale by the head's width (configurations of gemma-2-27b and gemma-3-27b).
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file. By name: the size of each tensor (`numbers`), tensors of rotary frequencies (`rope`),
    and the file's values for the architecture (`says`)."""

    architecture: str
    numbers: dict[str, int]
    rope: dict[str, torch.Tensor]
    says: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the weights in fp32."""
        return 4 * sum(self.numbers.values())


def cache_folder() -> Path:
    """The folder of converted bases: LORAFIT_CACHE, or lorafit in the user's cache folder."""
    if os.environ.get("LORAFIT_CACHE"):
        return Path(os.environ["LORAFIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafit"


def copies() -> dict[Path, str]:
    """The converted folders in the cache, each with the name it was converted under."""
    return {folder: name for folder in _kept() if (name := _name_if_whole(folder))}


def remains() -> dict[Path, str]:
    """Folders of ours in the cache that cannot be opened: "broken", or "unfinished" (the conversion is running, or was
    killed)."""
    states = {}
    for folder in _kept():
        if _UNFINISHED.fullmatch(folder.name):
            states[folder] = "unfinished"
        elif (folder / OURS).exists() and _name_if_whole(folder) is None:
            states[folder] = "broken"
    return states


def _kept() -> list[Path]:
    bases = cache_folder() / "bases"
    return sorted(bases.iterdir()) if bases.is_dir() else []


def _name_if_whole(folder: Path) -> str | None:
    try:
        return name_of(folder)
    except BaseError:
        return None


def remove(name: str) -> list[Path]:
    """Delete the converted copies of a base, or a folder of the cache by its name, and return the deleted folders.
    Nothing else is ever deleted: neither GGUF files, nor the hub's cache, nor folders of the user.

    Raises:
        BaseError: for a name without a copy.
    """
    gone = [folder for folder, known_as in copies().items() if name in {known_as, f"{known_as}.gguf", folder.name}]
    gone += [folder for folder in remains() if folder.name == name]
    if not gone:
        raise BaseError(
            f"'{name}': there is no converted copy of this name in {cache_folder()}: lorafit bases lists "
            "those there are; what the hub's cache holds is removed with: hf cache rm"
        )
    for folder in gone:
        shutil.rmtree(folder)
    return gone


def name_of(folder: Path) -> str | None:
    """The name a folder was converted under; None for other folders. Raises BaseError for a damaged folder."""
    if not (folder / OURS).exists():
        return None
    try:
        name = read_json(folder / OURS)["name"]
    except (FormatError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise BaseError(
            f"{folder}: {OURS} in it is damaged: remove the folder, it is made again from its GGUF file: "
            f"lorafit bases --remove {folder.name}"
        )
    return name


def converted(file: Path, name: str, report: Report, watch: Watch) -> Path:
    """The folder in the cache that a GGUF file was converted into; it is converted at the first use.

    Raises BaseError for a file that is damaged, that transformers cannot open or would open as another model, and where
    the disk has no room.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise BaseError(f"{file}: not a GGUF file: copy it again")
    digest = sha256_file(file)
    target = cache_folder() / "bases" / f"{name}-{digest[:12]}-{_CONVERSION}"
    if (target / OURS).exists():
        return target
    try:
        header = _header(file)
        _require_known(file, header.architecture)
        report(
            f"converting {file.name} ({header.architecture}) once: {shown(header.bytes)} as fp32 into {target}, "
            f"where {shown(free_bytes(target))} are free"
        )
        require_room(header.bytes, target, f"{file.name} does not fit", "LORAFIT_CACHE")
        _require_writable(target.parent)
        with whole_folder(target) as building, _watched(watch):
            _convert(file, header, building)
            write_json(building / OURS, {"name": name, "source": file.name, "source_sha256": digest})
    except BaseError:
        raise
    # A damaged or unexpected file may raise any error of three libraries.
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise BaseError(f"{file}: cannot be converted ({why}): try another file of the model") from error
    return target


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BaseError(
            f"{folder}: converted bases cannot be written there ({error.strerror}): name another folder "
            "in LORAFIT_CACHE"
        ) from error


def _header(file: Path) -> Header:
    import torch
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise BaseError(f"{file}: cannot be converted: its header cannot be read ({error}): copy it again") from error
    rope = {t.name: torch.tensor(t.data, dtype=torch.float32) for t in reader.tensors if t.name in _ROPE}
    prefix = f"{architecture}."
    says = {
        key.removeprefix(prefix): value
        for key, field in reader.fields.items()
        if key.startswith(prefix) and not isinstance(value := field.contents(), list)
    }
    return Header(architecture, {t.name: int(t.n_elements) for t in reader.tensors}, rope, says)


def _require_known(file: Path, architecture: str) -> None:
    """Raise BaseError for an architecture whose GGUF files transformers does not read, naming those that it reads."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, TENSOR_PROCESSORS

    known = {*GGUF_SUPPORTED_ARCHITECTURES, *TENSOR_PROCESSORS} - {"general", "tokenizer"}
    try:
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

        known |= set(GGUF_CONFIG_ARCHS)
    except ImportError:
        pass  # a version with only one reader
    if architecture not in known:
        raise BaseError(
            f"{file}: is of architecture '{architecture}', of which transformers reads no GGUF files; it "
            f"reads {', '.join(sorted(known))}: name the model's folder or hub id instead"
        )


def _convert(file: Path, header: Header, building: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False, **where)
    take_over(header, config)
    _set_rope(file, header, config)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **where,
    )
    model, info = opened
    _require_all(file, header, model, info)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
    # The weights are plain fp32 now, but transformers refuses to save a model with the mark of a GGUF file.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(building, max_shard_size=_SHARD)
    tokenizer.save_pretrained(building)


def _require_all(file: Path, header: Header, model: Any, info: dict[str, Any]) -> None:
    """Raise BaseError where a weight of the model is not in the file, which transformers would draw at random, or a
    tensor of the file is in no weight, which it would pass over."""
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise BaseError(
            f"{file}: cannot be converted: transformers finds no values, or of another shape, for "
            f"{len(wrong)} weights: {', '.join(wrong[:3])}: name the model's folder or hub id"
        )
    stored = sum(count for name, count in header.numbers.items() if name not in _ROPE)
    weights = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    taken = sum(weights.values()) + sum(buffer.numel() for buffer in buffers.values())
    if stored != taken:
        raise BaseError(
            f"{file}: cannot be converted: it holds {stored:,} numbers, and transformers makes of it a "
            f"model of {taken:,}: name the model's folder or hub id instead"
        )


def take_over(header: Header, config: Any) -> None:
    """Set the values of the config that transformers' readers leave at a default, from the header of the file."""
    for key, name in _CONFIG_NAMES.items():
        if key in header.says and hasattr(config, name):
            setattr(config, name, header.says[key])
    if (header.architecture, header.says.get("block_count")) in _SCALED_BY_WIDTH:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _set_rope(file: Path, header: Header, config: Any) -> None:
    """Set the scaling of rotary frequencies in the config, which the file has as a tensor of factors.

    Llama 3.1 and later: a frequency f of wavelength w becomes f / factor where w is longer than the context of the
    first training, stays f where w is shorter than a quarter of it, and is interpolated between (arXiv 2407.21783 names
    the base of the frequencies; the rule is that of Meta's code). Raises BaseError for factors of another rule.
    """
    import torch

    factors = header.rope.get("rope_freqs.weight")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.get("rope_theta")
    stretched = sorted(header.rope)
    width, rotated = getattr(config, "head_dim", None), header.says.get("rope.dimension_count")
    width = width or config.hidden_size // config.num_attention_heads if rotated else None
    if width and rotated != width and header.architecture in _PARTIAL_ROTARY:
        config.rope_parameters = rope = {**rope, "partial_rotary_factor": rotated / width}
    factor = header.says.get("rope.scaling.factor", 1)
    if factor != 1 and f"'factor': {factor}" not in str(rope):
        stretched.append(f"rope.scaling.factor = {factor}")
    if not stretched:
        return
    if factors is not None and len(stretched) == 1 and theta and header.architecture == "llama":
        if bool((factors == 1).all()):
            return
        scaling: dict[str, Any] = {
            "factor": round(float(factors.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if torch.allclose(llama3_factors(theta, 2 * len(factors), **scaling), factors, rtol=1e-3):
            config.rope_parameters = {**rope, "rope_type": "llama3", **scaling}
            return
    raise BaseError(
        f"{file}: cannot be converted: positions are stretched by {', '.join(stretched)}, "
        "which transformers does not take from a GGUF file: name the model's folder or hub id"
    )


def llama3_factors(
    theta: float,
    width: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """The divisor of each rotary frequency, (width / 2,). width: of a head. Other names are those of the config."""
    import torch

    wavelength = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = original_max_position_embeddings / wavelength
    share = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


@contextmanager
def _watched(watch: Watch) -> Iterator[None]:
    """Report the progress of long loops, which transformers wraps in progress bars of tqdm."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    def reporting(items: Collection[Any], desc: str = "", **_: Any) -> Iterator[Any]:
        first = desc.partition(" ")[0].lower()  # converting, loading or writing
        what, unit = ("writing safetensors", "files") if first == "writing" else (f"{first} weights", "tensors")
        for done, item in enumerate(items, 1):
            yield item
            watch(what, done, len(items), unit)

    def hook(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return reporting(*args, **kwargs)

    before, tqdm = logging.set_tqdm_hook(hook), legacy.tqdm  # type: ignore[attr-defined]
    legacy.tqdm = reporting  # type: ignore[attr-defined] # one loop takes no hook
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
        legacy.tqdm = tqdm  # type: ignore[attr-defined]
