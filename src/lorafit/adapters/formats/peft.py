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
from lorafit.adapters.folder import WEIGHTS as WEIGHTS
from lorafit.adapters.folder import adapter_folder as adapter_folder
from lorafit.adapters.folder import require_adapter_folder as require_adapter_folder
from lorafit.adapters.formats.foreign import PREFIX, Pairs, by_pattern, choosing, pairs_of, require_plain, selects
from lorafit.adapters.plan import LowRank, Plan
from lorafit.adapters.rendering import Rendering
from lorafit.bases import hub
from lorafit.errors import FormatError
from lorafit.files import read_json, whole_folder, write_json, write_text
from lorafit.layers import KINDS
from lorafit.layers.site import Site
from lorafit.variants import VARIANTS

OURS, CARD = "lorafit.json", "README.md"
ROUTING = "routing_features.safetensors"  # what a router learns from, where the adapter has it
FILES = {CONFIG, WEIGHTS, OURS, CARD, ROUTING}

# What in our adapter_config.json decides what PEFT computes.
_COMPUTES = {
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
}

_DEFAULT = 8  # PEFT's rank and alpha where the config names none


def write(
    adapter: Adapter,
    folder: str | Path,
    card: str = "",
    extra: Mapping[str, Any] | None = None,
    routing: bytes | None = None,
) -> None:
    """Write the folder whole, or not at all. `extra` goes into lorafit.json (scores, provenance). routing: the file
    that a router learns from.

    Replaces an adapter folder, and nothing else: raises FormatError where the folder holds other files, and for what
    PEFT has no words for: two variants in one adapter.
    """
    folder = Path(folder)
    strange = sorted({path.name for path in folder.iterdir()} - FILES) if folder.is_dir() else []
    if strange:
        raise FormatError(
            f"{folder}: holds {', '.join(strange[:5])}, which no adapter folder does: name another folder"
        )
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
        **(extra or {}),
    }
    tensors = {}
    for slot in adapter.plan.slots:
        kept = VARIANTS[slot.variant].peft
        names = {**kept.names, **KINDS[slot.site.kind].peft_names}
        own = {name: adapter.tensors[f"{slot.site.path}.{name}"] for name in slot.factors()}
        for name, tensor in kept.written(own).items():
            tensors[f"{PREFIX}{slot.site.path}.{names[name]}"] = tensor.contiguous()
    with whole_folder(folder) as building:
        save_file(tensors, building / WEIGHTS, metadata={"format": "pt"})
        write_json(building / CONFIG, _config(adapter))
        write_json(building / OURS, ours)
        if routing is not None:
            (building / ROUTING).write_bytes(routing)
        write_text(building / CARD, card or f"---\nlibrary_name: peft\nbase_model: {_base_of(adapter)[0]}\n---\n")


def routing_of(folder: str | Path) -> bytes | None:
    """The file that a router learns from, of an adapter folder that has one."""
    folder = Path(folder)
    return (folder / ROUTING).read_bytes() if (folder / ROUTING).exists() else None


def _exactly(path: str) -> str:
    """A pattern of PEFT's that no longer path ends in: it puts `(.*\\.)?` before each pattern."""
    return f"^{re.escape(path)}"


def _nothing_but(paths: Iterable[str]) -> str:
    """A pattern for every path but these."""
    return f"(?!({'|'.join(map(re.escape, paths))})$).*"


def _config(adapter: Adapter, pattern: Callable[[str], str] = _exactly) -> dict[str, Any]:
    slots = adapter.plan.slots
    kept = VARIANTS[slots[0].variant].peft
    ranks = {slot.site.path: slot.rank * kept.ranks for slot in slots}
    alphas = {slot.site.path: slot.alpha * kept.ranks for slot in slots}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    base, revision = _base_of(adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.rendering else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": [slot.site.path for slot in slots],
        # PEFT takes a target for the end of longer paths as well (fc for block.fc): all others are excluded.
        "exclude_modules": _nothing_but(slot.site.path for slot in slots),
        "rank_pattern": {pattern(path): own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {pattern(path): _number(own) for path, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "fan_in_fan_out": all(slot.site.kind == "conv1d" for slot in slots),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        **kept.config,
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
    """What an adapter folder tells without its weights being read. bytes: of these; base: the identity of its base."""

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
        return Glance(rendering, (folder / WEIGHTS).stat().st_size, ours.get("base"), _recorded(ours.get("base_name")))
    except (AttributeError, TypeError, OSError) as error:
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
    require_plain(folder / CONFIG, config)
    if (folder / OURS).exists():
        return _read_ours(folder, config, _read_tensors(folder / WEIGHTS))
    return _read_foreign(folder, config, _read_tensors(folder / WEIGHTS))


def _read_tensors(path: Path) -> Pairs:
    try:
        with safe_open(path, framework="pt") as file:
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: damaged or not safetensors ({error}): copy it again") from error
    return pairs_of(path, named)


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


def _read_ours(folder: Path, config: dict[str, Any], pairs: Pairs) -> Adapter:
    ours = _ours(folder)
    try:
        plan, rendering, digest = Plan.from_json(ours["plan"], str(folder / OURS)), ours["rendering"], ours["digest"]
        adapter = Adapter(
            plan,
            _factors(plan, pairs.tensors),
            ours["base"],
            _recorded(ours["base_name"]),
            Rendering.from_json(rendering) if rendering else None,
            Claims(**ours["claims"]) if ours.get("claims") else None,
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
    edited = [key for key, value in written.items() if key in _COMPUTES and config.get(key) != value]
    if edited:
        raise FormatError(
            f"{folder / CONFIG}: {', '.join(edited)} differ from {OURS}: PEFT would compute something else than "
            "was trained and scored: restore the folder"
        )
    return adapter


def _factors(plan: Plan, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT's tensors are to the methods of a plan."""
    found = dict(named)
    for slot in plan.slots:
        kept = VARIANTS[slot.variant].peft
        own = {name: found.pop(key) for name in kept.names if (key := f"{slot.site.path}.{name}") in found}
        if set(own) == set(kept.names):
            own = kept.read(own)
        found |= {f"{slot.site.path}.{name}": tensor for name, tensor in own.items()}
    return found


def _read_foreign(folder: Path, config: dict[str, Any], pairs: Pairs) -> Adapter:
    try:
        slots, problems = _foreign_slots(config, pairs)
        claims = Claims(choosing(config), pairs.weights)
        problems += [
            f"{slot.site.path}: has tensors, and the config's target_modules do not name it"
            for slot in slots
            if selects(claims.selects, slot.site.path) is False
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
    return Adapter(Plan(tuple(slots)), pairs.tensors, base=None, base_name=_named_base(config), claims=claims)


def _foreign_slots(config: dict[str, Any], pairs: Pairs) -> tuple[list[LowRank], list[str]]:
    """Slots as tensors and config say together, and where the two disagree."""
    slots, tensors = [], pairs.tensors
    problems = []
    variant = "dora" if config.get("use_dora") else "lora"
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        a, b = tensors.get(f"{path}.A"), tensors.get(f"{path}.B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{path}: lora_A and lora_B are not a pair of matrices")
            continue
        rank = a.shape[0]
        said = by_pattern(config.get("rank_pattern"), path, config.get("r", _DEFAULT))
        if said != rank:
            problems.append(f"{path}: rank {rank} in the tensors, {said} in the config")
        alpha = float(by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", _DEFAULT)))
        if config.get("use_rslora"):
            alpha *= rank**0.5  # s = alpha / √rank (arXiv 2312.03732)
        kind = pairs.kinds.get(path) or ("conv1d" if config.get("fan_in_fan_out") else "linear")
        slots.append(LowRank(Site(path, kind, a.shape[1], b.shape[0]), rank, alpha, variant))
    return slots, problems
