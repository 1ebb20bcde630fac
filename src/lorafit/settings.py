"""What a user may set for a training run: one declaration, from which flags, files, schema and docs are made."""

from __future__ import annotations

import codecs
import difflib
import json
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from lorafit.adapters.rendering import Scalar
from lorafit.errors import SettingsError
from lorafit.variants import NAMES

BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
}
BY_RULE = {
    "targets",
    "rank",
    "learning_rate",
    "epochs",
    "batch_size",
    "memory",
}  # chosen from the data where nothing is set


class TrainSettings(BaseModel):
    """Settings of one run. None leaves the choice to the rules, which print their reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    targets: Annotated[
        tuple[str, ...] | None,
        Field(
            description="Layers to adapt: ends of module paths, such as q_proj,v_proj; * matches any name.",
            examples=[["q_proj", "v_proj"]],
        ),
    ] = None
    task: Annotated[
        Literal["auto", "completion", "classification", "regression", "multilabel", "entities", "embedding"],
        Field(
            description="What to learn: to write an answer (completion), or to predict with another head: a label "
            "(classification, for data with text and label), a number (regression, text and score), several labels "
            "(multilabel, text and labels), spans with labels (entities, text and entities), or vectors by which texts "
            "find each other (embedding, anchor and positive). auto: what the data are for, and an answer if they have "
            "one and the base writes text."
        ),
    ] = "auto"
    label_weights: Annotated[
        Literal["none", "balanced"],
        Field(
            description="Weight of the examples when a classifier is trained and validated: the same for every "
            "example (none), or the same for every label (balanced)."
        ),
    ] = "none"
    variant: Annotated[Literal[NAMES], Field(description="The adaptation method.")] = "lora"  # type: ignore[valid-type]
    rank: Annotated[int | None, Field(ge=1, description="Rank of each pair of matrices.", examples=[16])] = None
    alpha: Annotated[float, Field(gt=0, description="Scale: each pair is multiplied by alpha/rank.")] = 32.0
    learning_rate: Annotated[float | None, Field(gt=0, description="Peak learning rate.", examples=[5e-4])] = None
    search: Annotated[
        Literal["none", "fast", "thorough"],
        Field(
            description="Short trial runs before training, compared on validation: fast tries learning rates, for at "
            "most about half of the run's time; thorough also tries layers and ranks."
        ),
    ] = "fast"
    trim: Annotated[
        Literal["auto", "none"],
        Field(
            description="After training, keep the smallest adapter that loses less than 0.5 % of the improvement on "
            "validation and no right answer (auto), or the whole adapter (none)."
        ),
    ] = "auto"
    rounds: Annotated[
        int, Field(ge=0, description="Most rounds of lorafit refine before the test is opened; they may end earlier.")
    ] = 0
    general: Annotated[
        str | None,
        Field(
            description="A text file on which forgetting is measured (by NLL), in addition to a few built-in pages.",
            examples=["letters.txt"],
        ),
    ] = None
    epochs: Annotated[float | None, Field(gt=0, description="Passes over the training examples.", examples=[2])] = None
    batch_size: Annotated[int | None, Field(ge=1, description="Examples per step.", examples=[8])] = None
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the steps used for warm-up.")] = 0.04
    weight_decay: Annotated[float, Field(ge=0, description="Weight decay of AdamW.")] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout on the inputs of the adapter.")] = 0.0
    validations: Annotated[
        int, Field(ge=1, description="Validations during the run, in addition to the first and an early one.")
    ] = 3
    patience: Annotated[int, Field(ge=1, description="Stop after this many validations without improvement.")] = 3
    max_length: Annotated[int, Field(ge=8, description="Longest example, in tokens; longer ones are refused.")] = 1024
    columns: Annotated[
        tuple[str, ...] | None,
        Field(
            description="Which column is which field: FIELD=COLUMN, e.g. prompt=question; unused=COLUMN ignores one; "
            "columns in braces are joined, e.g. 'completion=Team: {Team}\\n{Reply}'. May be repeated.",
            examples=[["prompt=question", "completion=answer"]],
        ),
    ] = None
    skip_bad: Annotated[bool, Field(description="Leave out rows that cannot be used, and list them.")] = False
    system: Annotated[
        str | None,
        Field(
            description='System prompt for conversations that have none; "": never add one.',
            examples=["You answer for ..."],
        ),
    ] = None
    template: Annotated[
        tuple[str, ...] | None,
        Field(
            description="A setting of the base's chat template: NAME=VALUE. May be repeated; stored with the adapter.",
            examples=[["enable_thinking=false"]],
        ),
    ] = None
    val_share: Annotated[
        float, Field(gt=0, lt=0.5, description="Share of a single file for validation, and the same for the test.")
    ] = 0.1
    few_shot: Annotated[
        int, Field(ge=0, description="Answered examples in the base's prompt for the second baseline; 0: none.")
    ] = 3
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="Number format of the base; auto measures which is faster.")
    ] = "auto"
    trunk_gb: Annotated[
        float,
        Field(
            ge=0, description="Disk (GB) for the output of the blocks below all adapted layers; 0: computed every time."
        ),
    ] = 4.0
    memory: Annotated[
        str | None,
        Field(
            description="Memory limit of the process for the whole run, such as 4GB or 500MB (GPU memory, if a GPU is "
            "used).",
            examples=["4GB"],
        ),
    ] = None
    routing_questions: Annotated[
        int, Field(ge=0, description="Training questions whose hidden states the adapter stores for a router; 0: none.")
    ] = 512
    report_to: Annotated[
        Literal["none", "tensorboard", "trackio", "wandb", "mlflow"],
        Field(description="Also send curves and scores to a tracking program (install the extra of its name)."),
    ] = "none"
    seed: Annotated[
        int,
        Field(
            ge=0, lt=1 << 63, description="Seed of random choices; only the data decide which examples are held out."
        ),
    ] = 0

    @property
    def trunk_bytes(self) -> int:
        """`trunk_gb` in bytes."""
        return int(self.trunk_gb * 1e9)

    @property
    def template_settings(self) -> tuple[tuple[str, Scalar], ...]:
        """`template` by name: numbers, true, false and null as JSON has them, all else as text."""
        parts = (given.partition("=") for given in self.template or ())
        return tuple((name, _value(text)) for name, _, text in parts)

    @field_validator("template")
    @classmethod
    def _named(cls, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = [one.partition("=")[0] for one in given or ()]
        if not all(name and "=" in one for name, one in zip(names, given or (), strict=True)):
            raise ValueError("not NAME=VALUE: write it as enable_thinking=false")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is set twice: leave one of them")
        return given

    @field_validator("targets")
    @classmethod
    def _apart(cls, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = given and tuple(name.strip() for part in given for name in part.split(",") if name.strip())
        if names == ():
            raise ValueError("names no layer: name at least one, such as q_proj, or leave it out")
        return names

    @field_validator("general", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, Path) else given

    @field_validator("memory", mode="before")
    @classmethod
    def _measured(cls, given: Any) -> Any:
        if given is not None and bytes_of(str(given)) is None:
            raise ValueError("not a size with its unit: write it as 4GB or 500MB")
        return given


def _value(text: str) -> Scalar:
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, Scalar):
            return value
    return text


def bytes_of(size: str) -> int | None:
    """4GB, 1.5GB, 500MB (10⁹, 10⁶), 4GiB, 500MiB (2³⁰, 2²⁰) → bytes; None for what is no size, or has no unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(i?)B", size.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        return None
    base, power = 1024.0 if found[3] else 1000.0, 3 if found[2] in "Gg" else 2
    return round(float(found[1]) * base**power)


def require_meant(settings: TrainSettings, idle: Sequence[str], model: str) -> None:
    """Raise SettingsError naming every setting that is set and would do nothing.

    Args:
        settings: the settings of a run.
        idle: the settings that do nothing in it.
        model: what is trained, such as `a classifier`.
    """
    fields = TrainSettings.model_fields
    named = ["--" + name.replace("_", "-") for name in idle if getattr(settings, name) != fields[name].default]
    if named:
        does, them = ("does", "it") if len(named) == 1 else ("do", "them")
        raise SettingsError(f"{', '.join(named)}: {does} nothing for {model}: leave {them} out")


def share_of(text: str) -> float:
    """25% or 0.25 → 0.25. Raises SettingsError for what is no share between nothing and all."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise SettingsError(f"--to {text}: not a share of an adapter: write 25%, more than 0% and less than 100%")
    return share


class RunFile(TrainSettings):
    """A TOML file given with -c: any setting, and what to train on what, and where to write it."""

    base: Annotated[
        str | None,
        Field(
            description="A model folder, a .gguf file, a hub id (org/name@revision), or smollm2-135m.",
            examples=["smollm2-135m"],
        ),
    ] = None
    data: Annotated[
        str | None,
        Field(
            description="A file of examples, a folder with train, valid and test files, or 'builtin'.",
            examples=["my.jsonl"],
        ),
    ] = None
    out: Annotated[str, Field(description="The run folder to write.")] = "runs/run"


def settings_from(given: Mapping[str, Any]) -> TrainSettings:
    """Settings with `given` fields set. Raises SettingsError listing every one that cannot be, by its flag."""
    try:
        return TrainSettings(**given)
    except ValidationError as error:
        wrong = [_told("--" + str(found["loc"][0]).replace("_", "-"), found) for found in error.errors()]
        raise SettingsError("\n".join(wrong)) from error


def read_run_file(path: Path) -> dict[str, Any]:
    """The settings a TOML file gives, by name, its paths counted from its folder; 16 is a number there, "16" is text.
    Raises SettingsError listing every one that cannot be, by its line."""
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SettingsError(
                f"{path}: saved as UTF-16, as PowerShell's > does: save it as UTF-8 "
                "(lorafit settings | Out-File -Encoding utf8 FILE)"
            )
        text = content.decode("utf-8-sig")
        written = tomllib.loads(text)
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: there is no such file: lorafit settings prints one to start from") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"{path}: not TOML ({error}): correct it, or begin with the output of lorafit settings"
        ) from error
    found = {key.replace("-", "_"): value for key, value in written.items()}
    twice = [key for key in found if "_" in key and {key, key.replace("_", "-")} <= set(written)]
    if twice:
        raise SettingsError(f"{path}: {', '.join(twice)}: given with - and with _: remove one of the two")
    try:
        given = RunFile.model_validate_json(json.dumps(found, default=str), strict=True).model_dump(exclude_unset=True)
    except ValidationError as error:
        wrong = [
            _told(f"{path}:{_line_of(str(each['loc'][0]), text)}: {each['loc'][0]}", each) for each in error.errors()
        ]
        raise SettingsError("\n".join(wrong)) from error
    beside = {
        name: str(path.parent / Path(given[name]).expanduser()) for name in ("base", "data", "out") if given.get(name)
    }
    if given.get("data") == "builtin":
        del beside["data"]
    if "base" in beside and not Path(beside["base"]).exists():
        del beside["base"]  # a name, not a path
    return given | beside


def _line_of(key: str, text: str) -> int:
    """The line a key stands on, whichever way it is written there."""
    written = re.compile(rf"\s*[\"']?\[*{re.escape(key).replace('_', '[-_]')}\b")
    return next((number for number, line in enumerate(text.splitlines(), 1) if written.match(line)), 1)


def _told(where: str, found: Mapping[str, Any]) -> str:
    """One fault that pydantic found, in words: where, what was given, what to choose instead."""
    name, kind = str(found["loc"][0]), found["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, RunFile.model_fields, n=1)
        close = "--" + near[0].replace("_", "-") if near and where.startswith("--") else "".join(near)
        meant = f"did you mean {close}?" if near else "'lorafit settings' lists them all"
        return f"{where}: no such setting: {meant}"
    given = f"{where} {found['input']!r}"
    if kind == "value_error":
        return f"{given}: {found['ctx']['error']}"
    if kind == "literal_error":
        return f"{given}: unknown: choose {found['ctx']['expected'].replace(chr(39), '')}"
    limits = [
        text.format(value)
        for rule in RunFile.model_fields[name].metadata
        for key, text in BOUNDS.items()
        if (value := getattr(rule, key, None)) is not None
    ]
    wanted = KINDS.get(kind.partition("_")[0], "")
    return f"{given}: {'out of range' if not wanted else f'not {wanted}'}: choose {' and '.join(limits) or wanted}"


def template() -> str:
    """A TOML file that sets nothing: every setting with its default and what it means, commented out."""
    lines = [
        "# Remove the # before what you want to set. Flags override this file: lorafit train -c FILE",
        "# Paths (base, data, out) are relative to the folder of this file.",
        "",
    ]
    for name, field in (*_first(), *TrainSettings.model_fields.items()):
        value = (field.examples or [None])[0] if field.default is None else field.default
        note = " Chosen by rule if not set." if name in BY_RULE else ""
        lines += [f"# {line}" for line in textwrap.wrap(f"{field.description}{note}", 100)]
        lines += [f"# {name} = {json.dumps(value)}", ""]
    return "\n".join(lines)


def _first() -> list[tuple[str, FieldInfo]]:
    own = set(RunFile.model_fields) - set(TrainSettings.model_fields)
    return [(name, field) for name, field in RunFile.model_fields.items() if name in own]
