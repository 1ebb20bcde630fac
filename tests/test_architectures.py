"""Tiny models of classes of transformers: what docs/architectures.md says of them holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


tiny_models = script("tiny_models")
architectures = script("make_architectures")
KEPT: dict[str, dict[str, Any]] = architectures.lines()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # transformers' and PEFT's

QUICK = (
    "LlamaForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "Llama4ForCausalLM",
    "LagunaForCausalLM",
    "MambaForCausalLM",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "ResNetForImageClassification",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "LlavaForConditionalGeneration",
)
BUILT = [name for name, row in KEPT.items() if "unbuilt" not in row and name not in QUICK]
MORE = BUILT[:: max(1, len(BUILT) // 60)]  # of every family, for the table is in their order


@pytest.mark.parametrize("name", QUICK)
def test_what_the_table_says_of_a_class_holds(name: str) -> None:
    assert architectures.measured(name) == KEPT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_what_the_table_says_of_more_classes_holds(name: str) -> None:
    assert architectures.measured(name) == KEPT[name]


def test_the_page_is_what_the_measurements_give() -> None:
    assert architectures.PAGE.read_text("utf-8") == architectures.page(KEPT)


def test_every_class_that_transformers_maps_has_a_row() -> None:
    assert list(KEPT) == list(tiny_models.classes())


def test_the_table_is_of_200_models_and_nothing_breaks_in_silence() -> None:
    built = [row for row in KEPT.values() if "unbuilt" not in row]
    assert len(built) >= 200
    assert not [row["class"] for row in built if "broke" in row]
    partial = [row for row in built if row["share"] < architectures.WHOLE]
    assert all(row["missed"] for row in partial)
