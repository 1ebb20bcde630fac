"""Measure tiny models of every class that transformers maps, and write docs/architectures.md from what was found.

With names of classes, or of families, those are measured again; with none, all. docs/architectures.jsonl keeps what was
found, a class a line. --page only writes the page; --check NAME ... measures these, and exits with 1 where they are not
what is kept; so does --check without names where the page is not what the lines give.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINES, PAGE = ROOT / "docs" / "architectures.jsonl", ROOT / "docs" / "architectures.md"
SECONDS = 40  # that a class may take
WHOLE = 99.5  # per cent
TITLES = {
    "causal": "Causal language models",
    "encoders": "Text encoders",
    "encoder-decoders": "Encoder-decoders",
    "vision": "Vision",
    "speech": "Speech and audio",
    "multimodal": "Multimodal",
}
Row = dict[str, Any]
Sizes = dict[str, tuple[int, str]]  # by key, the numbers of a weight and the type of its module


def measured(name: str) -> Row:
    """What holds for one class."""
    from tiny_models import built, classes

    family, _ = classes()[name]
    try:
        with _within(SECONDS):
            tiny = built(name)
    except Exception as error:  # whatever keeps a class from being built is its row
        return {"class": name, "family": family, "unbuilt": _short(error)}
    row: Row = {"class": name, "family": family}
    try:
        with _within(SECONDS):
            _measure(tiny, row)
    except Exception as error:
        row["broke"] = _short(error)
    return row


def _measure(tiny: Any, row: Row) -> None:
    import torch

    from lorafit.attachment.watching import fired
    from lorafit.bases.base import Base

    base = Base.of(tiny.model, row["class"])
    sizes, open_to = _sizes(base), {site.key: site for site in _sites(base)}
    full, row["share"], row["missed"] = _of_default(tiny, sizes, open_to)
    seen = fired(base, tiny.forward)
    sites = [site for site in open_to.values() if site.path in seen]
    adapted = {key: one for key, one in sizes.items() if key in open_to}
    row["reached"] = _share(adapted, {site.key for site in sites})
    if sites:
        _laws(base, tiny, sites, row)
        with torch.no_grad():
            _to_peft(base, tiny, sites, row)
    with torch.no_grad():
        _from_peft(base, tiny, sizes, full, row)
    if tiny.family == "causal":
        _as_text(base, row)


def _sites(base: Any) -> list[Any]:
    """What a user can have adapted: every site but embeddings and the output head, and of a language model no
    convolution that keeps a state, which it may read past its forward as it writes."""
    from lorafit.planning.rules import is_state

    head = base.head_paths()
    writes = base.model.can_generate()  # and may read past its forward what keeps a state
    return [
        site
        for site in base.every_site
        if site.path not in head and site.kind != "embedding" and not (writes and is_state(site))
    ]


def _of_default(tiny: Any, sizes: Sizes, open_to: Iterable[str]) -> tuple[Sizes, float, dict[str, float]]:
    """The weights of the default configuration of the class, the share of what is open to adapters, and what is missed,
    by type. Of the tiny model where the default one cannot be outlined."""
    import torch

    from lorafit.bases.base import Base

    kinds = {(sizes[key][1], key.rpartition(".")[2]) for key in open_to if key in sizes}
    try:
        with _within(SECONDS), torch.device("meta"):
            full = Base("", type(tiny.model)(tiny.default()), "")
        refused = {site.key for site in full.every_site} - {site.key for site in _sites(full)}
        sizes = _sizes(full)
        keys = {key for key, (_, kind) in sizes.items() if (kind, key.rpartition(".")[2]) in kinds} - refused
        keys |= {site.key for site in _sites(full)}  # of types that the tiny model has none of
    except Exception:  # a default configuration need not be one of a whole model
        keys = set(open_to)
    total = max(1, sum(size for size, _ in sizes.values()))
    missed: Counter[str] = Counter()
    for key, (size, kind) in sizes.items():
        missed[kind] += 0 if key in keys else size
    shares = {kind: round(100 * size / total, 2) for kind, size in missed.most_common(4)}
    return sizes, _share(sizes, keys), {kind: share for kind, share in shares.items() if share}


def _share(sizes: Sizes, keys: Collection[str]) -> float:
    total = sum(size for size, _ in sizes.values())
    return round(100 * sum(size for key, (size, _) in sizes.items() if key in keys) / max(1, total), 2)


TABLES = re.compile(
    r"A_log|pos(ition)?_?(emb|enc)|position|_token|tokens?$|query|queries|bias_table|table|codebook|embeddings?"
)


def _sizes(base: Any) -> Sizes:
    """By key, the numbers of each weight that inputs are multiplied with, and the type of its module. Embeddings,
    tables of positions and the output head are none."""
    from torch import nn

    head, found, seen = base.head_paths(), {}, set()
    for path, module in base.model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or sum(side > 1 for side in parameter.shape) < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if (
                path in head
                or isinstance(module, nn.Embedding)
                or TABLES.search(name)
                or not parameter.is_floating_point()
            ):
                continue
            found[f"{path}.{name}"] = (parameter.numel(), type(module).__name__)
    return found


def _laws(base: Any, tiny: Any, sites: Sequence[Any], row: Row) -> None:
    """The laws of a fresh adapter, of the base and of gradients, and a step down the gradient."""
    import torch

    from lorafit.adapters.plan import uniform
    from lorafit.adapters.state import TrainState
    from lorafit.attachment.adapters import attach
    from lorafit.attachment.fused import layer_by_layer
    from lorafit.attachment.pure import fresh
    from lorafit.testing import random_adapter

    plan = uniform(list(sites), 1, 2.0)
    with layer_by_layer(base), torch.no_grad():
        bare = tiny.forward()
        if not torch.equal(bare, tiny.forward()):
            row["laws"] = "its forward differs from call to call"
            return
    before, failed = base.integrity(), []
    with attach(base, fresh(base, plan, 3)), torch.no_grad():
        if not torch.equal(tiny.forward(), bare):
            failed.append("a fresh adapter changes what comes out")
    state = TrainState(random_adapter(base, plan), base.device)
    wanted = torch.randn(bare.shape, generator=torch.Generator().manual_seed(5))
    with attach(base, state) as attached:
        loss = (tiny.forward() - wanted).square().mean()
        loss.backward()
        still = sorted({key.rpartition(".")[0] for key, one in state.gradients().items() if not one.any()})
        gradient = state.master.grad
        assert gradient is not None
        lower = False
        start = state.master.detach().clone()
        for size in (1e-1, 1e-2, 1e-3):
            with torch.no_grad():
                state.master.copy_(start - size * gradient / gradient.norm().clamp(min=1e-30))
                state.drop_casts() if hasattr(state, "drop_casts") else None
                lower = lower or bool((tiny.forward() - wanted).square().mean() < loss)
        with attached.off(), torch.no_grad():
            if not torch.equal(tiny.forward(), bare):
                failed.append("switched off it changes what comes out")
    if base.integrity() != before:
        failed.append("the base is not what it was")
    row["laws"] = "; ".join(failed) or "hold"
    row["step"] = "lowers the loss" if lower else "does not lower the loss"
    if still:
        row["still"] = [len(still), still[0]]


def _to_peft(base: Any, tiny: Any, sites: Sequence[Any], row: Row) -> None:
    """PEFT on what is written here: equal, or named beforehand as what PEFT takes for something else."""
    from peft import PeftModel

    from lorafit.adapters.formats import peft
    from lorafit.adapters.formats.oddities import misread_by_peft
    from lorafit.adapters.plan import LowRank, Plan
    from lorafit.attachment.adapters import attach
    from lorafit.testing import random_adapter

    slots = [LowRank(site, 1, 2.0) for site in sites]
    plain = [slot for slot in slots if misread_by_peft(base.model, [slot]) is None]
    if len(plain) < len(slots):
        row["told"] = [len(slots) - len(plain), len(slots)]
    if not plain:
        row["to_peft"] = "none that PEFT reads"
        return
    adapter = random_adapter(base, Plan(tuple(plain)))
    bare = tiny.forward()
    with attach(base, adapter):
        ours = tiny.forward()
    with tempfile.TemporaryDirectory() as folder:
        peft.write(adapter, Path(folder) / "adapter")
        other = copy.deepcopy(tiny.model)
        try:
            PeftModel.from_pretrained(other, str(Path(folder) / "adapter"))
            theirs = tiny.of(other.eval())
        except Exception as error:  # PEFT may raise anything
            row["to_peft"] = f"PEFT breaks: {_short(error)}"
            return
    row["to_peft"] = _same(ours, theirs, bare)


def _same(ours: Any, theirs: Any, bare: Any) -> str:
    effect, error = float((ours - bare).abs().max()), float((ours - theirs).abs().max())
    if effect == 0:
        return "no effect"
    return "equal" if error <= 1e-3 * effect else f"differs by {error / effect:.0%} of its effect"


def _anywhere(key: str) -> str:
    """The key of a weight in any block."""
    return re.sub(r"\.\d+(?=\.)", ".*", key)


def _from_peft(base: Any, tiny: Any, sizes: Sizes, full: Sizes, row: Row) -> None:
    """The share of PEFT's all-linear, and what is made of its folder: equal, or refused by name."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from lorafit.adapters.formats import peft
    from lorafit.attachment.adapters import attach
    from lorafit.errors import LorafitError

    other = copy.deepcopy(tiny.model)
    try:
        theirs = get_peft_model(other, LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"))
        alike = {_anywhere(key) for key in _adapted_by_peft(theirs, sizes)}
        row["peft_share"] = _share(full, {key for key in full if _anywhere(key) in alike})
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        expected = tiny.of(other.eval())
    except Exception as error:  # PEFT may raise anything
        row.setdefault("peft_share", None)
        row["from_peft"] = f"PEFT breaks: {_short(error)}"
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs.save_pretrained(folder)
        except Exception:  # it asks for embeddings, which some classes do not have
            try:
                theirs.save_pretrained(folder, save_embedding_layers=False)
            except Exception as error:
                row["from_peft"] = f"PEFT breaks: {_short(error)}"
                return
        bare = tiny.forward()
        try:
            with attach(base, peft.read(folder), accept_unknown_base=True):
                row["from_peft"] = _same(tiny.forward(), expected, bare)
        except LorafitError as error:
            row["from_peft"] = f"refused: {_short(error)}"


def _adapted_by_peft(model: Any, sizes: Sizes) -> set[str]:
    """The keys of the weights that PEFT has put a pair on."""
    paired = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    found = set()
    for name, _ in model.named_parameters():
        path, inside, rest = name.partition(".base_layer.")
        key = f"{path}.{rest.replace('base_layer.', '')}".removeprefix("base_model.model.")
        if inside and path in paired and key in sizes:
            found.add(key)
    return found


def _as_text(base: Any, row: Row) -> None:
    """How a causal model is run on rows, and served."""
    from lorafit.data.render import Row as TextRow
    from lorafit.errors import NotCausalError
    from lorafit.serving.engine import Engine
    from lorafit.tasks.probe import mode_of

    rows = [TextRow(tuple(range(5 + i, 30 + 2 * i)), (False, *(True,) * (24 + i)), i) for i in range(2)]
    try:
        mode = mode_of(base, rows)
        row["rows"] = "packed" if mode.packed else "padded"
    except NotCausalError:
        row["rows"] = "not causal"
    except Exception as error:
        row["rows"] = f"cannot be run: {_short(error)}"
    try:
        with Engine(base, room=32, slots=2, native=False):
            row["served"] = "engine"
    except Exception:
        row["served"] = "plain"


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"/\S+/", "", text)
    text = re.sub(r"\{[^}]*\}?", "{...}", text)  # a set is in another order each time
    return f"{type(error).__name__}: {text}"[:160]


def lines() -> dict[str, Row]:
    """What was found, by class."""
    text = LINES.read_text("utf-8") if LINES.exists() else ""
    return {row["class"]: row for row in map(json.loads, text.splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes, or families of them; all where none is named")
    parser.add_argument("--page", action="store_true", help="write the page from what was found before")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs")
    asked = parser.parse_args()
    kept = lines()
    if asked.names or not (asked.page or asked.check):
        found = {row["class"]: row for row in _measured_all(asked.names)}
        if asked.check and (differ := [name for name, row in found.items() if row != kept.get(name)]):
            for name in differ:
                print(f"{name}: {json.dumps(found[name])}, and kept is {json.dumps(kept.get(name))}", file=sys.stderr)
            return 1
        kept |= found
    if asked.check:
        if PAGE.read_text("utf-8") != page(kept):
            print("docs/architectures.md: run scripts/make_architectures.py --page", file=sys.stderr)
            return 1
        return 0
    LINES.write_text("".join(json.dumps(row) + "\n" for row in kept.values()), "utf-8", newline="\n")
    PAGE.write_text(page(kept), "utf-8", newline="\n")
    return 0


def _measured_all(names: Sequence[str]) -> Iterator[Row]:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from tiny_models import classes
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    known = classes()
    if unknown := [name for name in names if name not in known and name not in TITLES]:
        raise SystemExit(f"{', '.join(unknown)}: no class that transformers maps: see docs/architectures.md")
    for name, (family, _) in known.items():
        if not names or name in names or family in names:
            yield measured(name)


INTRODUCTION = """# Model classes of transformers

What works on which model class of transformers. Made by `scripts/make_architectures.py`, which builds a tiny model of
each class from its default configuration, with random weights, and tries it out. `docs/architectures.jsonl` has one
line for each class. The models are tiny and random: the table says what can be adapted and computes the same, not how
well a task is learnt.

- **adapted**: of the numbers in weights that inputs are multiplied with, the share that an adapter can act on, in the
  default configuration. Embeddings, tables of positions and the output head do not count. Whole means at least 99.5 %.
  Convolutions and experts count, though they are adapted only if `--targets` names them.
- **PEFT**: the share that PEFT 0.21's `all-linear` acts on.
- **run**: of what can be adapted, the share that took part in the forward that was tried. The rest needs other inputs,
  such as images with the text.
- **laws**: a fresh adapter changes no bit of the output, switching it off changes none, and training leaves the base's
  bytes as they are.
- **step**: a step against the gradient lowers the loss.
- **PEFT reads ours**, **we read PEFT's**: the outputs are equal, within a thousandth of the adapter's effect. "told":
  `train` says beforehand that PEFT takes some layers for something else; the other layers were compared. "refused":
  the adapter is not read, and the error names the module. "PEFT fails": PEFT raises an error on this class.
- **rows** (causal models): training rows are packed into one sequence, or padded, if the probe finds that packed rows
  do not compute the same. "not causal": the model sees later tokens in its default configuration, and is refused.
- **served**: by the engine, to many adapters at once, or by the plain path.
"""


def page(rows: Mapping[str, Row]) -> str:
    """docs/architectures.md, from what was found."""
    built = [row for row in rows.values() if "unbuilt" not in row]
    parts = [INTRODUCTION, "## Summary", "", _summary(rows.values()), ""]
    for family, title in TITLES.items():
        own = [row for row in built if row["family"] == family]
        more = " rows | served |" if family == "causal" else ""
        parts += [f"## {title}", ""]
        parts += ["| class | adapted | PEFT | run | laws | step | PEFT reads ours | we read PEFT's |" + more]
        parts += ["|---|--:|--:|--:|---|---|---|---|" + ("---|---|" if more else "")]
        parts += [_line(row, bool(more)) for row in own] + [""]
    parts += ["## What is partial, and why", ""]
    parts += ["The types of the modules that hold what cannot be adapted, with the share of each.", ""]
    for row in built:
        if 0 <= row.get("share", 0) < WHOLE and "share" in row:
            types = ", ".join(f"{kind} {share:g} %" for kind, share in row["missed"].items())
            parts.append(f"- `{row['class']}`, {row['share']:g} %: {types}")
    parts += ["", "## What does not hold, or not on both sides", ""]
    parts += [f"- `{row['class']}`: {'; '.join(odd)}" for row in built if (odd := _odd(row))]
    parts += ["", "## What was not built", ""]
    parts += ["The default configuration made small gave no model that runs on the inputs that were tried.", ""]
    parts += [f"- `{row['class']}`: {_plain(row['unbuilt'])}" for row in rows.values() if "unbuilt" in row]
    return "\n".join([*parts, ""])


def _summary(rows: Iterable[Row]) -> str:
    table = ["| family | classes | whole | partial | not at all | not built |", "|---|--:|--:|--:|--:|--:|"]
    total = Counter[str]()
    for family, title in TITLES.items():
        counts = Counter(_state(row) for row in rows if row["family"] == family)
        total += counts
        table.append(_counted(title, counts))
    return "\n".join([*table, _counted("All", total)])


def _counted(title: str, counts: Counter[str]) -> str:
    states = (counts[state] for state in ("whole", "partial", "none", "unbuilt"))
    return f"| {title} | {counts.total()} | " + " | ".join(map(str, states)) + " |"


def _state(row: Row) -> str:
    if "unbuilt" in row:
        return "unbuilt"
    share = row.get("share", 0)
    return "whole" if share >= WHOLE else "partial" if share else "none"


def _line(row: Row, causal: bool) -> str:
    cells = [f"`{row['class']}`", *(_percent(row.get(key)) for key in ("share", "peft_share", "reached"))]
    cells += ["hold" if row.get("laws") == "hold" else "no"]
    cells += ["yes" if row.get("step") == "lowers the loss" else "no"]
    ours = row.get("to_peft", "no")
    cells += [
        _word(ours) + (", told" if row.get("told") and ours == "equal" else ""),
        _word(row.get("from_peft", "no")),
    ]
    cells += [_word(row.get("rows", "no")), row.get("served", "no")] if causal else []
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:g}"


def _word(found: str) -> str:
    """The beginning of what was found, which the lists below tell in full."""
    ends = {
        "PEFT breaks": "PEFT fails",
        "refused": "refused",
        "differs": "differs",
        "cannot be run": "no",
        "none": "told",
    }
    return next((word for start, word in ends.items() if found.startswith(start)), found)


def _odd(row: Row) -> list[str]:
    said = [row["broke"]] if "broke" in row else []
    said += [row["laws"]] if row.get("laws", "hold") != "hold" else []
    said += [f"a step {row['step']}"] if row.get("step", "lowers the loss") != "lowers the loss" else []
    if "still" in row:
        said.append(f"{row['still'][0]} layers get no gradient, such as {row['still'][1]}")
    said += [f"{row['told'][0]} of {row['told'][1]} layers are told to be misread by PEFT"] if "told" in row else []
    for key, what in (("to_peft", "PEFT reads ours"), ("from_peft", "we read PEFT's")):
        said += [f"{what}: {row[key]}"] if key in row and row[key] != "equal" else []
    said += [row["rows"]] if row.get("rows", "").startswith("cannot") else []
    return [_plain(one) for one in said]


def _plain(text: str) -> str:
    """Text that Markdown takes as it is."""
    return re.sub(r"([*_`|<>\[\]])", r"\\\1", text)


if __name__ == "__main__":
    sys.exit(main())
