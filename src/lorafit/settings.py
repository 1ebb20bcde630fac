"""What a user may set for a training run: one declaration, from which the flags of the command line are made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorafit.errors import SettingsError


class TrainSettings(BaseModel):
    """Settings of one run. None leaves the choice to the rules, which print their reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    targets: Annotated[
        tuple[str, ...] | None,
        Field(description="Where to adapt: ends of module paths, as in q_proj,v_proj; * stands for any. By rule: all "
              "linear layers of the blocks."),
    ] = None  # fmt: skip
    variant: Annotated[Literal["lora", "dora"], Field(description="Method of adaptation.")] = "lora"
    rank: Annotated[int | None, Field(ge=1, description="Rank of every pair.")] = None
    alpha: Annotated[float, Field(gt=0, description="Scale: the pair counts alpha/rank.")] = 32.0
    learning_rate: Annotated[float | None, Field(gt=0, description="Peak learning rate.")] = None
    epochs: Annotated[float | None, Field(gt=0, description="Times each example is seen.")] = None
    batch_size: Annotated[int | None, Field(ge=1, description="Examples per step.")] = None
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the steps that warms up.")] = 0.04
    weight_decay: Annotated[float, Field(ge=0, description="AdamW's decay of the matrices.")] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the pairs.")] = 0.0
    validations: Annotated[int, Field(ge=1, description="Validations during the run, beside the first.")] = 3
    patience: Annotated[int, Field(ge=1, description="Stop after so many validations without a better one.")] = 3
    max_length: Annotated[int, Field(ge=8, description="Longest example, in tokens; longer ones are refused.")] = 1024
    columns: Annotated[
        tuple[str, ...] | None,
        Field(description="Columns of other names: FIELD=COLUMN, e.g. prompt=question. Once for each."),
    ] = None
    skip_bad: Annotated[bool, Field(description="Leave out rows that cannot be used, and name them.")] = False
    system: Annotated[str | None, Field(description="System prompt for conversations that bring none.")] = None
    val_share: Annotated[
        float, Field(gt=0, lt=0.5, description="Share for validation, and for test, of a single file.")
    ] = 0.1
    few_shot: Annotated[
        int, Field(ge=0, description="Answered examples in the base's prompt, for the second baseline; 0: none.")
    ] = 3
    dtype: Annotated[Literal["auto", "fp32", "bf16"], Field(description="Of the base; auto measures.")] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Of everything that is drawn.")] = 0

    @field_validator("targets")
    @classmethod
    def _apart(cls, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return given and tuple(name.strip() for part in given for name in part.split(",") if name.strip())


def settings_from(given: Mapping[str, Any]) -> TrainSettings:
    """Settings with `given` fields set. Raises SettingsError listing every one that cannot be, by its flag."""
    try:
        return TrainSettings(**given)
    except ValidationError as error:
        raise SettingsError("\n".join(_said(dict(found)) for found in error.errors())) from error


BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
KINDS = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false",
         "string": "text", "tuple": "a list"}  # fmt: skip


def _said(found: dict[str, Any]) -> str:
    """One fault that pydantic found, in words: the flag, what was given, what to choose instead."""
    name, kind = str(found["loc"][0]), found["type"]
    given = f"--{name.replace('_', '-')} {found['input']!r}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, TrainSettings.model_fields, n=1)
        fix = f"did you mean --{near[0].replace('_', '-')}?" if near else "see lorafit train --help"
        return f"{given}: no such setting: {fix}"
    if kind == "literal_error":
        return f"{given}: unknown: choose {found['ctx']['expected'].replace(chr(39), '')}"
    limits = [text.format(value) for rule in TrainSettings.model_fields[name].metadata
              for key, text in BOUNDS.items() if (value := getattr(rule, key, None)) is not None]  # fmt: skip
    wanted = KINDS.get(kind.partition("_")[0], "")
    return f"{given}: {'out of range' if not wanted else f'not {wanted}'}: choose {' and '.join(limits) or wanted}"
