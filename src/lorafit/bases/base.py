"""Bases: a frozen model, its tokenizer, and two fingerprints.

*Identity* is a digest of the source weights, the same in whatever dtype they are opened; an adapter names it.
*Integrity* is a digest of every byte in memory, taken before and after a run; one flipped bit changes it.
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
from lorafit.bases.codes import require_numbers
from lorafit.bases.folder import classes, weight_files
from lorafit.bases.opening import CLASSIFIER, Opening
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.errors import BaseError
from lorafit.layers import KINDS, find_sites
from lorafit.layers.site import Site

HOST_COPIES = 4  # tensors of a GPU that are copied to the host at a time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by their names in settings and run.json


@dataclass(frozen=True)
class Reach:
    """The share of a model's parameters that some sites hold.

    Args:
        share: Of all parameters.
        missed: The types of the modules that hold other matrices and are neither sites nor embeddings, with the share
            of each, the largest first.
        unnamed: The same of modules that are sites, but are adapted only if they are named.
    """

    share: float
    missed: tuple[tuple[str, float], ...]
    unnamed: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model.

    Args:
        name: opens it again; for a model of the hub it ends in the commit, as `org/name@commit`.
        model: in evaluation mode, without gradients.
        identity: the digest of its source weights.
        tokenizer: None for a module that did not come from a folder.
        folder: where it was opened; None for a module that did not come from a folder.
        address: the name that is valid in every working folder, for files on disk.
        head: paths of the modules that make a classifier of the model; empty for a language model.
    """

    name: str
    model: nn.Module
    identity: str
    tokenizer: Any = None
    folder: Path | None = None
    address: str | None = None
    head: tuple[str, ...] = ()

    @cached_property
    def every_site(self) -> tuple[Site, ...]:
        """Every module that an adapter can act on, in the order of the model."""
        return find_sites(self.model)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that compute a product with a weight: where adapters act by default, and all that can be served to
        many at once."""
        return tuple(site for site in self.every_site if KINDS[site.kind].is_product)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads, prompt and answer together; None where it does not say."""
        if not isinstance(self.model, PreTrainedModel):
            return None
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(positions) - self._skipped if isinstance(positions, int) and positions > 0 else None

    @cached_property
    def _skipped(self) -> int:
        """Positions that no token gets: models such as RoBERTa count from the one after that of padding."""
        tables = (module for name, module in self.model.named_modules() if name.endswith("position_embeddings"))
        padding = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
        return max((position + 1 for position in padding if position is not None), default=0)

    @property
    def vocabulary(self) -> int | None:
        """How many token ids have a row in the model's embedding; None where that is not known."""
        return _rows_of(self.model)

    def reach(self, sites: Iterable[Site]) -> Reach:
        """How much of the model these sites hold, and which modules hold matrices that no adapter can act on."""
        chosen, kinds = {site.path for site in sites}, {site.path: KINDS[site.kind] for site in self.every_site}
        total = held = 0
        missed: Counter[str] = Counter()
        unnamed: Counter[str] = Counter()
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += parameter.numel()
                named = {path, f"{path}.{name}"}
                held += parameter.numel() if named & chosen else 0
                if named & chosen or parameter.ndim < 2 or isinstance(module, nn.Embedding):
                    continue
                if not named & kinds.keys():
                    missed[type(module).__name__] += parameter.numel()
                elif not all(kinds[one].is_product for one in named & kinds.keys()):
                    unnamed[type(module).__name__] += parameter.numel()
        shares = [tuple((name, size / total) for name, size in one.most_common()) for one in (missed, unnamed)]
        return Reach(held / max(1, total), *shares)

    def tied(self, path: str, parameter: str = "weight") -> tuple[str, ...]:
        """Paths of other modules that share the weight of this name with the module at `path`."""
        inner, _, name = parameter.rpartition(".")
        path = f"{path}.{inner}" if inner else path
        weight = self.model.get_submodule(path)._parameters.get(name)
        holders = (
            name
            for name, module in self.model.named_modules()
            if any(other is weight for other in module._parameters.values())
        )
        return () if weight is None else tuple(name for name in holders if name != path)

    def integrity(self) -> str:
        """SHA-256 over names, dtypes, shapes and every byte of all parameters and buffers in memory."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return _digest({name: tensor.detach() for name, tensor in named})

    @property
    def widest(self) -> int:
        """The largest input or output width of a site, without the output head; 0 without sites."""
        head = self.head_paths()
        return max((max(site.d_in, site.d_out) for site in self.sites if site.path not in head), default=0)

    def head_paths(self) -> frozenset[str]:
        """Paths of the output head, which a plan over all linear sites leaves out."""
        head = self.model.get_output_embeddings() if isinstance(self.model, PreTrainedModel) else None
        prefixes = tuple(f"{path}." for path in self.head)
        return frozenset(
            path
            for path, module in self.model.named_modules()
            if (head is not None and module is head) or f"{path}.".startswith(prefixes)
        )

    @staticmethod
    def of(model: nn.Module, name: str) -> Base:
        """A base from a module in memory, whose identity is a digest of its present parameters. Raises BaseError for a
        compiled wrapper and for quantised weights."""
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise BaseError("this is the compiled wrapper of a model: make the base from the model inside it")
        require_numbers(model, name)
        return Base(name, model, _digest({key: value.detach() for key, value in model.named_parameters()}))


def _tensor_bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _entry(name: str, tensor: Tensor) -> bytes:
    """What a fingerprint is taken over, for one tensor: name, dtype, shape, and a digest of every byte."""
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + hashlib.sha256(_tensor_bytes(tensor)).digest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    def hashed(name: str) -> bytes:
        return hashlib.sha256(_entry(name, tensors[name])).digest()

    with ThreadPoolExecutor(_hashed_at_once(tensors.values())) as pool:  # hashlib releases the GIL
        return hashlib.sha256(b"".join(pool.map(hashed, sorted(tensors)))).hexdigest()


def _hashed_at_once(tensors: Iterable[Tensor]) -> int | None:
    """How many tensors are hashed at a time; None for the number of cores. Tensors of a GPU are first copied to the
    host, which may lack memory for many."""
    return None if all(tensor.device.type == "cpu" for tensor in tensors) else HOST_COPIES


def open_base(
    name: str | Path,
    dtype: torch.dtype | None = None,
    report: Report = silent,
    watch: Watch = unwatched,
    labels: int | None = None,
    opening: Opening = CLASSIFIER,
) -> Base:
    """Open a model folder, a GGUF file, a model of the hub (`org/name`, `org/name@revision`), or a built-in name.

    Args:
        name: what to open.
        dtype: of the weights in memory; None for the dtype in which this machine is fastest (measured).
        report: called with one line for each step that takes a while.
        watch: called with the progress of a download or conversion: what, done, of, unit.
        labels: open it with a head of so many outputs, which is zero: a classifier of so many labels; None for a
            language model.
        opening: with which head, if `labels` is given.

    Raises:
        BaseError: for anything that keeps the base from being used.
    """
    folder, known_as = locate.found(str(name), report, watch, opening=None if labels is None else opening)
    identity = _folder_identity(folder)
    model, tokenizer, head = _load(folder, dtype or fastest_dtype(), labels, opening)
    base = Base(known_as, model, identity, tokenizer, folder, locate.address(known_as), head)
    if {site.path for site in base.sites} <= base.head_paths():
        kinds = ", ".join(name for name, _ in base.reach(()).missed[:3])
        raise BaseError(
            f"'{known_as}': no layer of its blocks is of a kind that can be adapted (its weights are in "
            f"{kinds}): choose another base"
        )
    return base


def open_outline(
    name: str | Path, report: Report = silent, watch: Watch = unwatched, opening: Opening | None = None
) -> Base:
    """Open a base without its weights, for its tokenizer, its context and the tokens that end its turns. Arguments and
    errors are those of `open_base`, but without an opening it is a language model."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder, known_as = locate.found(str(name), report, watch, weights=False, opening=opening)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = _auto_class(opening).from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # a damaged file may raise anything; tokenizers raises bare Exceptions
        raise BaseError(f"{folder}: its config or tokenizer cannot be opened ({error}): copy it again") from error
    _require_rows(folder, model, tokenizer)
    return Base(known_as, model, "", tokenizer, folder, locate.address(known_as))


def require_base(name: str | Path, opening: Opening | None = None) -> None:
    """Raise BaseError where `name` cannot be a base, before slow work: nothing is fetched, converted or loaded.
    opening: how it will be opened; None for a language model."""
    locate.require(str(name), opening)


def _auto_class(opening: Opening | None) -> Any:
    import transformers

    return getattr(transformers, opening.model if opening else "AutoModelForCausalLM")


def _folder_identity(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors in the safetensors files, in any shards."""
    from safetensors import SafetensorError, safe_open

    entries: dict[str, bytes] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    entries[name] = _entry(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise BaseError(f"{path}: damaged or half-written ({error}): copy it again") from error
    return hashlib.sha256(b"".join(entries[name] for name in sorted(entries))).hexdigest()


def _load(
    folder: Path, dtype: torch.dtype, labels: int | None, opening: Opening
) -> tuple[nn.Module, Any, tuple[str, ...]]:
    from transformers import AutoTokenizer

    of = _auto_class(None if labels is None else opening)
    extra = {} if labels is None or not opening.has_head else {"num_labels": labels, **dict(opening.settings)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        opened: Any = of.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=_device_map(),
            **extra,
        )
    except Exception as error:  # a damaged file may raise anything, from TypeError to the readers' own kinds
        raise BaseError(
            f"{folder}: transformers cannot open it ({error}): copy it again, or try another base"
        ) from error
    model: PreTrainedModel = opened[0]
    info: dict[str, Any] = opened[1]
    head = () if labels is None else _head_of(model, info) if opening.has_head else _bare(model, info)
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:5]))}"
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if info.get(kind)
    ]
    if wrong:
        saved, causal = classes(folder)
        if labels is None and saved not in (causal, model.config.model_type):
            raise BaseError(
                f"{folder}: holds {saved}, whose weights are not those of {causal}: name the folder of a "
                "causal language model"
            )
        raise BaseError(
            f"{folder}: weights and config do not belong together: " + "; ".join(wrong) + ": copy both from one place"
        )
    _require_rows(folder, model, tokenizer)
    require_numbers(model, str(folder))
    model.eval()
    model.requires_grad_(False)
    return model, tokenizer, head


def _head_of(model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
    """Paths of the modules that make a classifier of a model. Their matrices are set to zero, to be the same each time.
    Keys of these modules, and of other heads in the weight files, are removed from `info`."""
    body = model.base_model
    prefix = model.base_model_prefix + "."
    lacking = {key.rpartition(".")[0] for key in (*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"]))}
    # Like PEFT: all children of the model other than its body. A body that was saved without its pooler gets a new one.
    siblings = {
        name
        for name, child in model.named_children()
        if child is not body and next(child.parameters(), None) is not None
    }
    lacking = {path for path in lacking if path.startswith(prefix) and "pooler" in path.split(".")}
    head = tuple(path for path, _ in model.named_modules() if path in lacking | siblings)
    for path in head:
        for parameter in model.get_submodule(path).parameters():
            if parameter.ndim > 1:
                parameter.data.zero_()
    ours = {f"{path}.{name}" for path in head for name, _ in model.get_submodule(path).named_parameters()}
    info["missing_keys"] = set(info["missing_keys"]) - ours
    info["mismatched_keys"] = {key for key in info["mismatched_keys"] if key[0] not in ours}
    held = {f"{name.partition('.')[0]}." for name, _ in model.named_parameters()}
    # Weights of another head are no fault, nor is a pooler, which only some heads use. Other weights of the body that
    # the model has no place for are one.
    other = (key for key in info["unexpected_keys"] if "pooler" not in key.split("."))
    info["unexpected_keys"] = {key for key in other if key.startswith((*held,))}
    return head


def _bare(model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
    """No head: a pooler, which has no part in the last hidden state, is taken off, and its keys and those of heads in
    the weight files are removed from `info`."""
    if any(name == "pooler" for name, _ in model.named_children()):
        poolable: Any = model
        poolable.pooler = None
    held = {f"{name.partition('.')[0]}." for name, _ in model.named_parameters()}
    for kind in ("missing_keys", "unexpected_keys"):
        info[kind] = {key for key in info[kind] if "pooler" not in key.split(".")}
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if key.startswith((*held,))}
    return ()


def _device_map() -> dict[str, str] | None:
    """The device that weights are read to: the GPU, if there is one, and not first the memory of the host."""
    if not torch.cuda.is_available():
        return None
    # These workspaces of cuBLAS give the same bits each time. It reads this once, before its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return {"": "cuda"}


def _rows_of(model: nn.Module) -> int | None:
    """Rows of the input embedding; None where transformers finds no nn.Embedding."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a class without one
        return None
    return len(embedding.weight) if isinstance(embedding, nn.Embedding) else None


def _require_rows(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise BaseError where a token that a text may hold has no row in the model's embedding. Special tokens may lack
    one, as in many tokenizers: no text holds them, and a renderer refuses those that its template writes."""
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


def fastest_dtype() -> torch.dtype:
    """The faster of bf16 and fp32 for the matrix products of a training step (measured in 0.1 s).

    A GPU with bf16 uses it; on a CPU it must be faster by a tenth, since some processors emulate it at half speed.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if matrix_speed(torch.bfloat16) > 1.1 * matrix_speed(torch.float32) else torch.float32


def matrix_speed(dtype: torch.dtype) -> float:
    """The speed of the processor on a matrix product of a training step's size, in GFLOP/s: the best of several."""
    x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        x @ w.T
        times.append(time.perf_counter() - start)
    return 2 * 512 * 576 * 1536 / min(times) / 1e9
