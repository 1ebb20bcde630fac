"""Adapters that other programs wrote in PEFT's layout: their tensor names, their settings, what they say of a base.

Names differ by what was wrapped around the model when it was saved (torch.compile, DDP, FSDP, a multimodal model), and
by PEFT's age. What is left without the wrappers is the path of a module; `landing` finds it in the base.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import FormatError
from lorafit.layers import KINDS, experts
from lorafit.variants import VARIANTS

PREFIX = "base_model.model."
WITHIN = ".base_layer"  # what PEFT calls the layer that one of its own is around
# By PEFT's name without `.weight`: the factor, and the kind of layer where only that one's is called so.
_FACTORS: dict[str, tuple[str, str | None]] = {
    **{
        name.removesuffix(".weight"): (factor, None)
        for one in VARIANTS.values()
        for factor, name in one.peft.names.items()
    },
    **{name: (factor, kind) for kind, one in KINDS.items() for factor, name in one.peft_names.items()},
}
_TENSOR = re.compile(rf"(?P<path>.+)\.(?P<factor>{'|'.join(_FACTORS)})(\.(?P<adapter>[^.]+))??(\.weight)?")
_COPY = re.compile(r"(?P<path>.+)\.base_layer\.(?P<part>weight|bias)")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # PyTorch's names, anywhere in a path
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Settings that are read, or that change nothing of what a trained adapter computes. (Nothing is read of PEFT itself:
# these are the fields of its LoraConfig, 0.3 to 0.21, and those that other trainers add.)
_KNOWN = {
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "merge_weights",
    "unsloth_fixed",
}
# Settings that are not read here and that pass where they are at these values; any other setting where it says nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_SAYS_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class Pairs:
    """What a file of tensors holds. tensors: by site path and factor. weights: digests of base weights, by path. kinds:
    of layers, by site path, where the names tell them."""

    tensors: dict[str, Tensor]
    weights: dict[str, dict[str, str]]
    kinds: dict[str, str]


def require_plain(where: Path, config: Mapping[str, Any]) -> None:
    """Raise FormatError naming every setting of PEFT that may change what an adapter computes and is not read here."""
    odd = [
        f"{key} = {value!r}"
        for key, value in config.items()
        if key not in _KNOWN and not any(value is fine or value == fine for fine in _NEUTRAL.get(key, _SAYS_NOTHING))
    ]
    if config.get("peft_type") != "LORA":
        odd.insert(0, f"peft_type = {config.get('peft_type')!r}")
    if odd:
        raise FormatError(f"{where}: not a plain LoRA or DoRA adapter: {'; '.join(odd)}: merge or convert it first")


def pairs_of(path: Path, named: Mapping[str, Tensor]) -> Pairs:
    """The low-rank pairs in a file, under the paths of their modules. Raises FormatError for what is none."""
    if not named:
        raise FormatError(f"{path}: holds no tensors, and would change nothing: save the adapter again")
    empty = [name for name, tensor in named.items() if not tensor.numel()]
    if empty:
        raise FormatError(
            f"{path}: {len(empty)} of {len(named)} tensors are empty ({_shown(empty)}), as DeepSpeed ZeRO-3 and FSDP "
            "leave them where the shards were not gathered: save the adapter again inside GatheredParameters "
            "(FSDP: summon_full_params)"
        )
    found: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    fronts, adapters, strange, twice = set(), set(), [], []
    for name, tensor in named.items():
        front, module = _unwrapped(name)
        match, copy = _TENSOR.fullmatch(module), _COPY.fullmatch(module)
        if match:
            factor, kind = _FACTORS[match["factor"]]
            key = f"{match['path']}.{factor}"
            if kind is not None:
                kinds[match["path"]] = kind
            twice += [name] if key in found else []
            found[key] = tensor
            fronts.add(front)
            adapters.add(match["adapter"])
        elif copy:
            copies[f"{copy['path']}.{copy['part']}"] = tensor
        else:
            strange.append(name)
    _name_weights_of_attention(found, kinds)
    adapted = {key.rpartition(".")[0] for key in found}
    for name in list(strange):  # of an embedding PEFT saves the weight under the name it has in the base
        path_of, _, part = _unwrapped(name)[1].rpartition(".")
        if path_of in adapted and part == "weight":
            strange.remove(name)
            copies[f"{path_of}.{part}"] = named[name]
    strange += [name for name in copies if name.rpartition(".")[0] not in adapted]
    if strange:
        raise FormatError(f"{path}: {_why_strange(strange, len(named))}")
    if twice or len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise FormatError(f"{path}: holds several adapters in one file ({names}): save the one that is wanted")
    if len(fronts) > 1:
        ways = ", ".join(repr(front) for front in sorted(fronts))
        raise FormatError(f"{path}: its names begin in {len(fronts)} ways ({ways}): save the adapter again, as one")
    return Pairs(found, {key: weight_digests(tensor) for key, tensor in copies.items()}, kinds)


def _name_weights_of_attention(found: dict[str, Tensor], kinds: dict[str, str]) -> None:
    """Put pairs that PEFT has on torch's attention, and on the out_proj within, under the paths of the two weights."""
    inner = KINDS["attention.out_proj.weight"].peft_below
    for module in {key.rpartition(inner)[0] for key in found if key.rpartition(".")[0].endswith(inner)}:
        for kind in ("attention.in_proj_weight", "attention.out_proj.weight"):
            path = f"{module}.{kind.partition('.')[2]}"
            kinds[path] = kind
            for factor in ("A", "B"):
                if (tensor := found.pop(f"{module}{KINDS[kind].peft_below}.{factor}", None)) is not None:
                    found[f"{path}.{factor}"] = tensor


def _unwrapped(name: str) -> tuple[str, str]:
    """What stands before the path of the module, and the rest: neither with the names of PyTorch's wrappers in it."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    before, prefix, module = plain.rpartition(PREFIX)
    return before + prefix, module


def _why_strange(names: list[str], of: int) -> str:
    """What tensors are that belong to no pair, and what to do about them."""
    shown = f"{len(names)} of {of} tensors"
    if any(re.search(r"lora[._](down|up)\.|\.lora_(linear_)?[ab]\b", name) for name in names):
        return f"{shown} are pairs under another program's names ({_shown(names)}): convert them to PEFT's layout first"
    if all(name.endswith((".weight", ".bias")) and "lora" not in name for name in names):
        return (
            f"{shown} are whole weights ({_shown(names)}), as PEFT saves them with modules_to_save or for a vocabulary "
            "that was resized: merge the adapter into its base first (PEFT: merge_and_unload)"
        )
    return f"{shown} are of no kind that a low-rank adapter has ({_shown(names)}): merge or convert it first"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's rule for ranks and alphas: the first pattern that ends the path at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default


def choosing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that choose modules. Raises ValueError or re.error for values that cannot be."""
    found = {
        key: config.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    }
    selects(found, "")
    if parameters := config.get("target_parameters"):
        found["target_parameters"] = [*parameters]
        selects_parameter(found, "")
    return found


def selects(choice: Mapping[str, Any], path: str) -> bool | None:
    """PEFT's rule for modules: whether the settings choose the one at this path; None where they do not say."""
    targets, excluded = choice["target_modules"], choice["exclude_modules"]
    if targets is None or targets == "all-linear":
        return None
    if excluded and _named(excluded, path):
        return False
    if isinstance(targets, str) or not _named(targets, path):
        return _named(targets, path)
    layers = choice["layers_to_transform"]
    if layers is None or layers == []:
        return True
    patterns = choice["layers_pattern"] or []
    ways = [rf"(?:^|.*?\.){one}\.(\d+)\..*" for one in ([patterns] if isinstance(patterns, str) else patterns)]
    match = next((m for way in ways or [r".*?\.[^.]*\.(\d+)\..*"] if (m := re.fullmatch(way, path))), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def selects_parameter(choice: Mapping[str, Any], path: str) -> bool:
    """PEFT's rule for parameters: whether the settings choose the one at this path."""
    return _named(choice.get("target_parameters") or (), path)


def at_their_parameters(path: Path, config: Mapping[str, Any], pairs: Pairs) -> Pairs:
    """The pairs in a file, those on experts under the paths of their parameters. PEFT keeps them under the path of the
    module: of several on one, each is the layer within that of the next. Raises FormatError where there are others than
    the config names."""
    depths: dict[str, int] = {}
    for key in pairs.tensors:
        module, depth = _nested(key.rpartition(".")[0])
        depths[module] = max(depths.get(module, 0), depth)
    paths: dict[str, str] = {}
    for module, depth in depths.items():
        names = [name for name in experts.PARAMETERS if selects_parameter(config, f"{module}.{name}")]
        if not names or module.rpartition(".")[2] in experts.PARAMETERS or (not depth and _is_module(config, module)):
            continue
        if not depth and selects_parameter(config, f"{module}.weight"):
            raise FormatError(
                f"{path}: {module}.weight: PEFT has adapted this parameter by target_parameters, as it does with the "
                "router of experts, and only experts are read of those: merge the adapter into its base first (PEFT: "
                "merge_and_unload), or train it without this target"
            )
        if len(names) != depth + 1:
            raise FormatError(
                f"{path}: {module} has pairs for {depth + 1} parameters, and the config's target_parameters name "
                f"{len(names)}: save the adapter again, or restore the folder"
            )
        paths |= {module + i * WITHIN: f"{module}.{name}" for i, name in enumerate(reversed(names))}
    tensors = {}
    for key, tensor in pairs.tensors.items():
        place, _, factor = key.rpartition(".")
        tensors[f"{paths.get(place, place)}.{factor}"] = tensor
    kinds = {place: f"experts.{place.rpartition('.')[2]}" for place in paths.values()}
    return Pairs(tensors, pairs.weights, {**pairs.kinds, **kinds})


def _is_module(config: Mapping[str, Any], path: str) -> bool:
    """Whether the config names the module itself: then its pair is not one of a parameter within."""
    return config.get("target_modules") is not None and bool(selects(choosing(config), path))


def _nested(path: str) -> tuple[str, int]:
    """The path of a module, and how many layers of PEFT's a pair lies within."""
    module = path.removesuffix(WITHIN)
    return (path, 0) if module == path else (_nested(module)[0], _nested(module)[1] + 1)


def _named(names: str | Iterable[str], path: str) -> bool:
    """A pattern for the whole path, or names that end it at a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def weight_digests(weight: Tensor) -> dict[str, str]:
    """SHA-256 of a weight's numbers in its own dtype and in those that are coarser, by dtype: the own one first."""
    coarser = [dtype for dtype in _DTYPES if dtype.itemsize < weight.dtype.itemsize]
    return {str(dtype): _digest(weight, dtype) for dtype in (weight.dtype, *coarser)}


def is_weight(digests: Mapping[str, str], weight: Tensor) -> bool:
    """Whether a weight in memory is the one of these digests, in the coarser of the two dtypes."""
    own = next(iter(digests))
    name = str(weight.dtype) if str(weight.dtype) in digests else own
    dtype = next((dtype for dtype in (*_DTYPES, weight.dtype) if str(dtype) == name), None)
    return dtype is not None and _digest(weight, dtype) == digests[name]


def _digest(weight: Tensor, dtype: torch.dtype) -> str:
    plain = weight.detach().to("cpu", dtype).contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(f"{tuple(plain.shape)}|".encode() + hashlib.sha256(content).digest()).hexdigest()
