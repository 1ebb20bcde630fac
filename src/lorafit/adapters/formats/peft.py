"""The PEFT folder: adapter_config.json, adapter_model.safetensors, README.md; ours adds lorafit.json.

Tensor names are `base_model.model.<site path>.lora_A.weight` (rank, d_in), `.lora_B.weight` (d_out, rank), and what
methods and kinds of layers declare besides. Written and read here without PEFT, which is the oracle of the tests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafit.adapters.adapter import FORMAT, Adapter, Claims
from lorafit.adapters.folder import CONFIG as CONFIG
from lorafit.adapters.folder import OURS as OURS
from lorafit.adapters.folder import WEIGHTS as WEIGHTS
from lorafit.adapters.folder import adapter_folder as adapter_folder
from lorafit.adapters.folder import require_adapter_folder as require_adapter_folder
from lorafit.adapters.folder import require_classifies as require_classifies
from lorafit.adapters.folder import require_writes as require_writes
from lorafit.adapters.formats.foreign import (
    PREFIX,
    WITHIN,
    Pairs,
    at_their_parameters,
    by_pattern,
    choosing,
    pairs_of,
    require_plain,
    selects,
)
from lorafit.adapters.formats.oddities import added_twice
from lorafit.adapters.plan import LowRank, Plan
from lorafit.adapters.rendering import Classes, Rendering
from lorafit.bases import hub
from lorafit.errors import FormatError
from lorafit.files import read_json, whole_folder, write_json, write_text
from lorafit.layers import KINDS, convolution, experts
from lorafit.layers.site import Site
from lorafit.variants import VARIANTS

CARD = "README.md"
ROUTING = "routing_features.safetensors"  # what a router learns from, where the adapter has it
FILES = {CONFIG, WEIGHTS, OURS, CARD, ROUTING}

# What in our adapter_config.json decides what PEFT computes.
_COMPUTES = {
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
    "bias",
    "modules_to_save",
}

_DEFAULT = 8  # PEFT's rank and alpha where the config names none


def write(
    adapter: Adapter,
    folder: str | Path,
    card: str = "",
    extra: Mapping[str, Any] | None = None,
    routing: bytes | None = None,
) -> Path:
    """Save an adapter as a folder in PEFT's layout, whole or not at all; returns the folder.

    An existing adapter folder is replaced, with all its files. A folder with other files is left as it is, and refused.

    Args:
        adapter: What to save.
        folder: Where to; folders above it are made.
        card: The text of README.md; by default only its YAML header, which names the library and the base.
        extra: More for lorafit.json, such as scores and versions.
        routing: The content of the file of features for the router.

    Raises:
        FormatError: The folder holds other files, or the adapter more than one variant, which PEFT cannot read.
        RunError: `folder` is a file.
    """
    folder = Path(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if lost := there - FILES if CONFIG in there else there:
        raise FormatError(f"{folder}: holds {', '.join(sorted(lost)[:5])}, which would be lost: name another folder")
    variants = {slot.variant for slot in adapter.plan.slots}
    if len(variants) > 1:
        raise FormatError(
            f"PEFT knows one variant per adapter, this one has {', '.join(sorted(variants))}: train one of them"
        )
    ours = {
        "format": FORMAT,
        "plan": adapter.plan.to_json(),
        "base": adapter.base,
        "base_name": adapter.base_name,
        "rendering": adapter.rendering.to_json() if adapter.rendering else None,
        "digest": adapter.digest(),
        **({"claims": asdict(adapter.claims)} if adapter.claims else {}),
        **({"classes": adapter.classes.to_json()} if adapter.classes else {}),
        **(extra or {}),
    }
    tensors, paths = {}, _paths_in_peft(adapter.plan)
    for slot in adapter.plan.slots:
        kept = VARIANTS[slot.variant].peft
        kind = KINDS[slot.site.kind]
        names = {**kept.names, **kind.peft_names}
        own = {name: adapter.tensors[f"{slot.site.path}.{name}"] for name in slot.factors()}
        for name, tensor in kind.written(slot.site, kept.written(own)).items():
            tensors[f"{PREFIX}{paths[slot.site.path]}.{names[name]}"] = tensor.contiguous()
    for one in adapter.plan.whole:
        for name, _ in one.parameters:
            tensors[f"{PREFIX}{one.path}.{name}"] = adapter.tensors[f"{one.path}.{name}"].contiguous()
    with whole_folder(folder) as building:
        save_file(tensors, building / WEIGHTS, metadata={"format": "pt"})
        write_json(building / CONFIG, _config(adapter))
        write_json(building / OURS, ours)
        if routing is not None:
            (building / ROUTING).write_bytes(routing)
        write_text(building / CARD, card or f"---\nlibrary_name: peft\nbase_model: {_base_of(adapter)[0]}\n---\n")
    return folder


def routing_of(folder: str | Path) -> bytes | None:
    """The file that a router learns from, of an adapter folder that has one."""
    folder = Path(folder)
    return (folder / ROUTING).read_bytes() if (folder / ROUTING).exists() else None


def _target(site: Site) -> str:
    """What PEFT's settings name: a module, or the parameter of all experts."""
    return site.module if site.count == 1 else site.path


def _paths_in_peft(plan: Plan) -> dict[str, str]:
    """Where PEFT keeps the pair of each site: on experts under the module, each within the layer of the next."""
    found = {slot.site.path: slot.site.module + KINDS[slot.site.kind].peft_below for slot in plan.slots}
    inside: dict[str, list[str]] = {}
    of_experts = [slot.site for slot in plan.slots if slot.site.count > 1]
    for site in sorted(of_experts, key=lambda site: experts.PARAMETERS.index(site.parameter)):
        inside.setdefault(site.module, []).append(site.path)
    for module, paths in inside.items():
        found |= {path: module + depth * WITHIN for depth, path in enumerate(reversed(paths))}
    return found


def _exactly(path: str) -> str:
    """A pattern of PEFT's that no longer path ends in: it puts `(.*\\.)?` before each pattern."""
    return f"^{re.escape(path)}"


def _nothing_but(paths: Iterable[str]) -> str:
    """A pattern for every path but these."""
    return f"(?!({'|'.join(map(re.escape, paths))})$).*"


def _config(adapter: Adapter, pattern: Callable[[str], str] = _exactly) -> dict[str, Any]:
    slots = adapter.plan.slots
    variant = VARIANTS[slots[0].variant]
    kept = variant.peft
    # The rank of a convolution is that of all its groups, and its alpha the one that leaves the scale as it is.
    ranks = {_target(slot.site): slot.rank * slot.site.groups * kept.ranks for slot in slots}
    alphas = {_target(slot.site): slot.alpha * variant.alpha(1.0, slot.site.groups) * kept.ranks for slot in slots}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    base, revision = _base_of(adapter)
    parameters = [slot.site.path for slot in slots if slot.site.count > 1]
    modules = [target for target in ranks if target not in parameters]
    return {
        "peft_type": "LORA",
        "task_type": adapter.classes.peft if adapter.classes else "CAUSAL_LM" if adapter.rendering else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": modules,
        # PEFT takes a target for the end of longer paths as well (fc for block.fc): all others are excluded.
        "exclude_modules": _nothing_but(modules) if modules else None,
        **({"target_parameters": parameters} if parameters else {}),
        "rank_pattern": {pattern(path): own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {pattern(path): _number(own) for path, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "fan_in_fan_out": all(slot.site.kind == "conv1d" for slot in slots),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        **kept.config,
        **({"modules_to_save": [one.path for one in adapter.plan.whole]} if adapter.plan.whole else {}),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _config_of_format_1(adapter: Adapter) -> dict[str, Any]:
    """adapter_config.json as it was written with format 1: plain paths as patterns."""
    return {key: value for key, value in _config(adapter, pattern=str).items() if key != "exclude_modules"}


def _base_of(adapter: Adapter) -> tuple[str | None, str | None]:
    """The base's name as PEFT has it, and the revision apart: a commit of the hub, or None."""
    wanted = hub.parse(adapter.base_name or "")
    return (wanted.id, wanted.revision) if wanted and wanted.is_commit else (adapter.base_name, None)


def _named_base(config: Mapping[str, Any]) -> str | None:
    """The base an adapter of elsewhere names, with its revision where it names one of the hub's."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    known = isinstance(name, str) and isinstance(revision, str) and hub.parse(f"{name}@{revision}") is not None
    return f"{name}@{revision}" if known else name


def _recorded(name: str | None) -> str | None:
    """The base as lorafit.json names it. A model of the hub is named with its commit, so that ORG/NAME without one was
    a folder, given from another folder by earlier versions: it is not asked of the hub."""
    wanted = hub.parse(name or "")
    return f"./{name}" if wanted and not wanted.is_commit else name


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


@dataclass(frozen=True)
class Glance:
    """What an adapter folder tells without its weights being read. bytes: of these; base: the identity of its
    base."""

    rendering: Rendering | None
    bytes: int
    base: str | None
    base_name: str | None


def glance(folder: str | Path) -> Glance:
    """Of one of our adapter folders. Raises FormatError."""
    folder = Path(folder)
    ours = _ours(folder) if (folder / OURS).exists() else {}
    try:
        rendering = Rendering.from_json(ours["rendering"]) if ours.get("rendering") else None
        size = (folder / WEIGHTS).stat().st_size
        return Glance(rendering, size, ours.get("base"), _recorded(ours.get("base_name")))
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise FormatError(f"{folder}: {error!r}: restore the folder, it was edited or damaged") from error


def read(folder: str | Path) -> Adapter:
    """The adapter in a PEFT folder, ours or another's, or in a run.

    A folder without lorafit.json carries no identity of its base: it attaches only when that is accepted.

    Args:
        folder: The adapter folder, or the run folder that holds it.

    Raises:
        FormatError: A file is not what it should be; the message names it.
        AdapterError: Tensors and plan do not match.
    """
    folder = adapter_folder(folder)
    require_adapter_folder(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise FormatError(f"{folder / CONFIG}: not a JSON object: save the adapter again")
    named = _read_tensors(folder / WEIGHTS)
    if (folder / OURS).exists():
        return _read_ours(folder, config, named)
    require_plain(folder / CONFIG, config)
    pairs = at_their_parameters(folder / WEIGHTS, config, pairs_of(folder / WEIGHTS, named))
    return _read_foreign(folder, config, pairs)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: damaged or not safetensors ({error}): copy it again") from error


def _ours(folder: Path) -> dict[str, Any]:
    """lorafit.json of a folder. Raises FormatError for a format that is not known."""
    ours = read_json(folder / OURS)
    if not isinstance(ours, dict) or type(number := ours.get("format")) is not int:
        raise FormatError(f"{folder / OURS}: 'format' is missing or odd: restore the file, it was edited or damaged")
    if not 1 <= number <= FORMAT:
        raise FormatError(
            f"{folder / OURS}: of format {number}, and this lorafit reads 1 to {FORMAT}: use a newer lorafit"
        )
    return ours


def _read_ours(folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> Adapter:
    ours = _ours(folder)
    try:
        plan, rendering, digest = Plan.from_json(ours["plan"], str(folder / OURS)), ours["rendering"], ours["digest"]
        whole = [one.path for one in plan.whole]
        require_plain(
            folder / CONFIG, {key: value for key, value in config.items() if (key, value) != ("modules_to_save", whole)}
        )
        heads = {
            key: named.pop(f"{PREFIX}{key}")
            for one in plan.whole
            for name, _ in one.parameters
            if f"{PREFIX}{(key := f'{one.path}.{name}')}" in named
        }
        parameters = {"target_parameters": [slot.site.path for slot in plan.slots if slot.site.count > 1]}
        pairs = at_their_parameters(folder / WEIGHTS, parameters, pairs_of(folder / WEIGHTS, named))
        adapter = Adapter(
            plan,
            _factors(plan, pairs.tensors, folder) | heads,
            ours["base"],
            _recorded(ours["base_name"]),
            Rendering.from_json(rendering) if rendering else None,
            Claims(**ours["claims"]) if ours.get("claims") else None,
            Classes.from_json(ours["classes"]) if ours.get("classes") else None,
        )
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{folder / OURS}: {error!r} is missing or odd: restore the file, it was edited or damaged"
        ) from error
    if (adapter.digest_of_format_1() if ours["format"] == 1 else adapter.digest()) != digest or pairs.weights:
        raise FormatError(
            f"{folder}: the tensors are not those that were saved: restore the folder, or delete "
            f"{OURS} to read it as an adapter of unknown origin"
        )
    written = _config_of_format_1(adapter) if ours["format"] == 1 else _config(adapter)
    named_there = dict.fromkeys([*written, "target_parameters"])
    edited = [key for key in named_there if key in _COMPUTES and config.get(key) != written.get(key)]
    if edited:
        raise FormatError(
            f"{folder / CONFIG}: {', '.join(edited)} differ from {OURS}: PEFT would compute something else than "
            "was trained and scored: restore the folder"
        )
    return adapter


def _factors(plan: Plan, named: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What PEFT's tensors are to the methods of a plan. Raises FormatError, with the place in the folder, for tensors
    that are not of the plan."""
    found = dict(named)
    for slot in plan.slots:
        kept, kind, site = VARIANTS[slot.variant].peft, KINDS[slot.site.kind], slot.site
        paths = (site.path, f"{site.module}{kind.peft_below}")  # the latter where one weight of several is adapted
        own = {name: found.pop(key) for path in paths for name in kept.names if (key := f"{path}.{name}") in found}
        if set(own) == set(kept.names):
            try:
                own = kept.read(kind.read(site, own))
            except ValueError as error:
                raise FormatError(f"{folder / WEIGHTS}: {site.path}: {error}") from error
        found |= {f"{slot.site.path}.{name}": tensor for name, tensor in own.items()}
    return found


def _read_foreign(folder: Path, config: dict[str, Any], pairs: Pairs) -> Adapter:
    try:
        choice = choosing(config)
        slots, problems = _foreign_slots(config, pairs)
        claims = Claims(choice, pairs.weights)
        problems += [
            f"{slot.site.path}: has tensors, but the config names it neither in target_modules nor, as experts, in "
            "target_parameters"
            for slot in slots
            if slot.site.count == 1 and selects(choice, slot.site.module) is False
        ]
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise FormatError(
            f"{folder / CONFIG}: a rank, alpha or pattern in it is odd ({error}): save the adapter again"
        ) from error
    if problems:
        raise FormatError(
            f"{folder}: config and tensors disagree\n  "
            + "\n  ".join(problems[:12])
            + "\nsave the adapter again, or restore the folder"
        )
    plan = Plan(tuple(slots))
    tensors = _factors(plan, pairs.tensors, folder)
    return Adapter(plan, tensors, base=None, base_name=_named_base(config), claims=claims)


def _foreign_slots(config: dict[str, Any], pairs: Pairs) -> tuple[list[LowRank], list[str]]:
    """Slots as tensors and config say together, and where the two disagree."""
    slots, tensors = [], pairs.tensors
    problems = []
    variant = "dora" if config.get("use_dora") else "lora"
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        a, b = tensors.get(f"{path}.A"), tensors.get(f"{path}.B")
        kind = pairs.kinds.get(path) or ("conv1d" if config.get("fan_in_fan_out") else "linear")
        try:
            said = by_pattern(config.get("rank_pattern"), path, config.get("r", _DEFAULT))
            site, rank = _foreign_site(path, kind, a, b, said)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        target = _target(site)
        said = by_pattern(config.get("rank_pattern"), target, config.get("r", _DEFAULT))
        if said != rank:
            problems.append(f"{path}: rank {rank} in the tensors, {said} in the config")
        alpha = float(by_pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", _DEFAULT)))
        if config.get("use_rslora"):
            alpha *= rank**0.5  # s = alpha / √rank (arXiv 2312.03732)
        if site.kind == "attention.out_proj.weight":
            alpha *= 2
            if not added_twice(config):
                problems.append(
                    f"{path}: PEFT adds its change twice, up to 0.21, and the config names no such peft_version: write "
                    "the one it was trained with"
                )
        slots.append(LowRank(site, rank // site.groups, alpha / site.groups, variant))
    return slots, problems


def _foreign_site(path: str, kind: str, a: Tensor | None, b: Tensor | None, said: int) -> tuple[Site, int]:
    """The site of a pair as PEFT keeps it, and its rank there. Raises ValueError where it is none. said: the rank in
    the config, by which experts are counted, whose A lie in one matrix."""
    if a is not None and b is not None and a.dim() > 2:
        return convolution.site_of(path, a, b), len(a)
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError("lora_A and lora_B are not a pair of matrices")
    if not kind.startswith("experts."):
        return Site(path, kind, a.shape[1], b.shape[0]), len(a)
    if said < 1 or len(a) % said or len(a) == said:
        raise ValueError(f"lora_A has {len(a)} rows, which are not those of several experts of rank {said}")
    return Site(path, kind, a.shape[1], b.shape[0], (len(a) // said,)), said
