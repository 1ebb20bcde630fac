"""Bases: a frozen model, its tokenizer, its rendering, and two fingerprints.

*Identity* is the content of the source weights, whatever dtype they are opened in; an adapter names it.
*Integrity* is a digest of every byte in memory; it is taken before and after, and one flipped bit changes it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.bases import locate
from lorafit.bases.folder import classes, weight_files
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.errors import BaseError
from lorafit.layers import KINDS, find_sites
from lorafit.layers.site import Site

HOST_COPIES = 4  # tensors of a GPU that are on the host at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by their names in settings and run.json


@dataclass(frozen=True)
class Reach:
    """How much of a model some sites hold. share: of all its parameters. missed: the kinds of modules that hold other
    matrices and are neither sites nor embeddings, with the share of each, the largest first."""

    share: float
    missed: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model. `tokenizer` and `folder` are None for a module that did not come from a folder.

    `name` opens it again: that of a model of the hub ends in the commit, as `org/name@commit`. `address` is the same
    from every folder, for what is written to disk.
    """

    name: str
    model: nn.Module
    identity: str
    tokenizer: Any = None
    folder: Path | None = None
    address: str | None = None

    @cached_property
    def every_site(self) -> tuple[Site, ...]:
        """Every place an adapter can act, in the order of the model."""
        return find_sites(self.model)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Those of them that compute a product with a weight: where adapters act unless others are named, and all that
        is served to many at once."""
        return tuple(site for site in self.every_site if KINDS[site.kind].is_product)

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

    @property
    def vocabulary(self) -> int | None:
        """The token ids that the model has a row for in its embedding: those below it. None where that is not known."""
        return _rows_of(self.model)

    def reach(self, sites: Iterable[Site]) -> Reach:
        """How much of the model these sites hold, and what holds matrices that no adapter can act on."""
        chosen, known = {site.path for site in sites}, {site.path for site in self.every_site}
        total = held = 0
        missed: Counter[str] = Counter()
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += parameter.numel()
                held += parameter.numel() if path in chosen else 0
                if path not in known and parameter.ndim > 1 and not isinstance(module, nn.Embedding):
                    missed[type(module).__name__] += parameter.numel()
        return Reach(held / max(1, total), tuple((name, size / total) for name, size in missed.most_common()))

    def tied(self, path: str) -> tuple[str, ...]:
        """Paths of the other modules whose weight is the very one of the module at `path`."""
        weight = self.model.get_submodule(path)._parameters.get("weight")
        holders = (name for name, module in self.model.named_modules() if module._parameters.get("weight") is weight)
        return () if weight is None else tuple(name for name in holders if name != path)

    def integrity(self) -> str:
        """SHA-256 over name, dtype, shape and every byte of all parameters and buffers, as they are in memory."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return _digest({name: tensor.detach() for name, tensor in named})

    @property
    def widest(self) -> int:
        """The largest width of what goes into a site or comes out of it, the output head apart; 0 without sites."""
        head = self.head_paths()
        return max((max(site.d_in, site.d_out) for site in self.sites if site.path not in head), default=0)

    def head_paths(self) -> frozenset[str]:
        """Paths of the output head, which a plan over all linear sites leaves alone."""
        head = self.model.get_output_embeddings() if isinstance(self.model, PreTrainedModel) else None
        return frozenset(path for path, module in self.model.named_modules() if head is not None and module is head)

    @staticmethod
    def of(model: nn.Module, name: str) -> Base:
        """A base from any module in memory. Its identity is the content of its parameters as they are now."""
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise BaseError("this is the compiled wrapper of a model: make the base from the model inside it")
        _require_numbers(model, name)
        return Base(name, model, _digest({key: value.detach() for key, value in model.named_parameters()}))


def _tensor_bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor]) -> str:
    def one(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        return hashlib.sha256(head + hashlib.sha256(_tensor_bytes(tensor)).digest()).digest()

    with ThreadPoolExecutor(_hashed_at_once(tensors.values())) as pool:  # hashlib lets go of the interpreter
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors.items(), key=lambda item: item[0])))).hexdigest()


def _hashed_at_once(tensors: Iterable[Tensor]) -> int | None:
    """How many tensors are hashed at a time; None for as many as there are cores. Those of a GPU are copied to the host
    for it, where there may be no room for many."""
    return None if all(tensor.device.type == "cpu" for tensor in tensors) else HOST_COPIES


def open_base(
    name: str | Path, dtype: torch.dtype | None = None, report: Report = silent, watch: Watch = unwatched
) -> Base:
    """Open a model folder, a GGUF file, a model of the hub (`org/name`, `org/name@revision`), or a built-in name.

    dtype: of the weights in memory; None takes the one in which this machine is fastest (measured).
    report: called with one line for each step that takes a while.
    watch: called with progress of a download or conversion: what, done, of, unit.
    Raises BaseError for whatever keeps the base from being used: nothing is opened half.
    """
    folder, known_as = locate.found(str(name), report, watch)
    identity = _folder_identity(folder)
    model, tokenizer = _load(folder, dtype or fastest_dtype())
    base = Base(known_as, model, identity, tokenizer, folder, locate.address(known_as))
    if {site.path for site in base.sites} <= base.head_paths():
        kinds = ", ".join(name for name, _ in base.reach(()).missed[:3])
        raise BaseError(
            f"'{known_as}': no layer of its blocks is of a kind that can be adapted (its weights are in "
            f"{kinds}): choose another base"
        )
    return base


def open_outline(name: str | Path, report: Report = silent, watch: Watch = unwatched) -> Base:
    """A base without its weights, which are not fetched: for its tokenizer, its context and what ends its turns."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, known_as = locate.found(str(name), report, watch, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a damaged file may raise anything; tokenizers raises bare Exceptions
        raise BaseError(f"{folder}: its config or tokenizer cannot be opened ({error}): copy it again") from error
    _require_rows(folder, model, tokenizer)
    return Base(known_as, model, "", tokenizer, folder, locate.address(known_as))


def require_base(name: str | Path) -> None:
    """Raise BaseError where `name` can be no base. Nothing is fetched, converted or loaded: asked before slow work."""
    locate.require(str(name))


def _folder_identity(folder: Path) -> str:
    """SHA-256 over every tensor in the safetensors files: names, dtypes, shapes, bytes; however it is sharded."""
    from safetensors import SafetensorError, safe_open

    total = hashlib.sha256()
    entries: dict[str, bytes] = {}
    for path in weight_files(folder):
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
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=_device_map(),
        )
    except Exception as error:  # a damaged file may raise anything, from TypeError to the readers' own kinds
        raise BaseError(
            f"{folder}: transformers cannot open it ({error}): copy it again, or try another base"
        ) from error
    model: PreTrainedModel = opened[0]
    info: dict[str, Any] = opened[1]
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:5]))}"
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if info.get(kind)
    ]
    if wrong:
        saved, causal = classes(folder)
        if saved not in (causal, model.config.model_type):
            raise BaseError(
                f"{folder}: holds {saved}, whose weights are not those of {causal}: name the folder of a "
                "causal language model"
            )
        raise BaseError(
            f"{folder}: weights and config do not belong together: " + "; ".join(wrong) + ": copy both from one place"
        )
    _require_rows(folder, model, tokenizer)
    _require_numbers(model, str(folder))
    model.eval()
    model.requires_grad_(False)
    return model, tokenizer


def _device_map() -> dict[str, str] | None:
    """Where weights go from their files: onto the GPU, if there is one, and not through the memory of the host."""
    if not torch.cuda.is_available():
        return None
    # Of cuBLAS's workspaces, these give the same bits each time. It reads this once, before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return {"": "cuda"}


def _rows_of(model: nn.Module) -> int | None:
    """Rows of the embedding; None where transformers finds none, or one of another kind."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of a class that names none
        return None
    return len(embedding.weight) if isinstance(embedding, nn.Embedding) else None


def _require_rows(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise BaseError where a token that any text may hold has no row in the model's embedding. Special tokens may be
    beyond it, as many tokenizers have them that their model never learnt: they stand in no text, and a renderer refuses
    those that its template writes."""
    rows, added = _rows_of(model), tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    beyond = sorted(
        (i, token) for token, i in tokenizer.get_vocab().items() if rows is not None and i >= rows and i not in special
    )
    if beyond:
        some = ", ".join(f"{token!r} is {i}" for i, token in beyond[:3]) + (" ..." if len(beyond) > 3 else "")
        raise BaseError(
            f"{folder}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of its model's embedding "
            f"({some}): copy the tokenizer that the model came with, or resize the model (resize_token_embeddings) and "
            "save it"
        )


def _require_numbers(model: nn.Module, name: str) -> None:
    """Raise BaseError where a weight is no matrix of numbers, but codes that its module unpacks as it computes."""
    coded = [f"{path}.{own}".lstrip(".") for path, module in model.named_modules() for own in _codes(module)]
    if coded:
        raise BaseError(
            f"'{name}': {len(coded)} of its weights are quantised, such as {coded[0]}, and such weights "
            "are not read yet: open the 16-bit model they were made from"
        )


def _codes(module: nn.Module) -> list[str]:
    """Names of the codes among the parameters, buffers and packed weights that a module itself holds.

    A buffer of whole numbers may also be a mask, or a table of positions. Codes are no wider than 4 bytes, and stand in
    a layer that holds their scales and has no matrix of numbers.
    """
    parameters = {name: one.data for name, one in module._parameters.items() if one is not None}
    buffers = {name: one for name, one in module._buffers.items() if one is not None}
    found = [name for name, one in parameters.items() if type(one) is not Tensor or _is_coded(one)]
    found += [name for name, one in buffers.items() if _is_coded(one) and (one.is_floating_point() or one.is_quantized)]
    held = [*parameters.values(), *buffers.values()]
    is_layer = not module._modules and any(one.is_floating_point() for one in held)
    if is_layer and all(_is_coded(one) for one in parameters.values() if one.ndim > 1):
        found += [
            name
            for name, one in buffers.items()
            if _is_coded(one) and one.dtype != torch.bool and one.element_size() <= 4
        ]
    # What torch's own quantised layers hold is an object of its own.
    return [*dict.fromkeys(found), *(name for name, one in vars(module).items() if type(one) is torch.ScriptObject)]


def _is_coded(tensor: Tensor) -> bool:
    """Whether this is a matrix of something else than numbers of at least 16 bits."""
    return tensor.ndim > 1 and not (tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() > 1))


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
