"""Adapters on the experts of mixtures of experts, which transformers keeps as one parameter of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import LowRank, Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fits
from lorafit.attachment.pure import fresh, served
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import AdapterError, FormatError, PlanError
from lorafit.layers.experts import Sum
from lorafit.layers.site import select
from lorafit.planning.rules import decide
from lorafit.planning.trim import trimmed
from lorafit.settings import TrainSettings
from lorafit.testing import Case, check_laws, idle_experts, law_gradients, law_identity_at_the_start, random_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes ranks and alphas of parameters for ones that name nothing, and uses them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

SMALL = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "eos_token_id": 256,
    "bos_token_id": 256,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4},
}
IDS = torch.arange(1, 24).view(1, -1)
ROWS = [Row(tuple(range(1, 24)), (False,) * 12 + (True,) * 11, 0)]


def tiny(family: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family] | more)).eval()
    for parameter in model.parameters():  # gpt-oss starts some of them at zero
        nn.init.normal_(parameter, std=0.1) if not parameter.any() else None
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def case_of(model: nn.Module, *targets: str) -> Case:
    base = Base.of(model, "tiny")
    plan = uniform(select(base.every_site, targets), 2, 8.0)
    return Case(base, lambda: model(input_ids=IDS, use_cache=False).logits, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_law_holds_on_experts(family: str) -> None:
    case = case_of(tiny(family), "experts")
    assert case.plan.slots and all(slot.site.count == 4 for slot in case.plan.slots)
    check_laws(case)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_products_are_taken_apart_however_the_base_computes_its_experts(
    family: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Sum, "tensor")
    model = tiny(family)
    case = case_of(model, "experts")
    model.set_experts_implementation("eager")
    adapter = random_adapter(case.base, case.plan)
    expected, bare = case.output(adapter), case.bare()
    model.set_experts_implementation(how)
    law_identity_at_the_start(case)
    assert (case.output(adapter) - expected).abs().max() < 1e-4 * (expected - bare).abs().max()
    law_gradients(case)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_laws_hold_on_experts_in_bf16() -> None:
    check_laws(case_of(tiny("mixtral").to(torch.bfloat16), "experts"))


def test_a_delta_that_would_be_rounded_away_in_a_weight_of_bf16_still_acts() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1024), torch.randn(8, 1024) / 32
    x, weight, a, b = (one.to(torch.bfloat16) for one in (x, weight, x, torch.full((8, 1), 2e-5)))
    exact = x.double() @ (weight.double() + b.double() @ a.double()).T
    summed: Any = Sum(weight, b, a, 1.0)
    apart, rounded = F.linear(x, summed), F.linear(x, summed.tensor())
    assert (apart - exact).abs().mean() < 0.5 * (rounded - exact).abs().mean()


def test_experts_that_no_token_reaches_are_listed_and_exempt_from_the_law_of_gradients() -> None:
    case = case_of(tiny("mixtral", num_local_experts=16), "down_proj")
    short = Case(case.base, lambda: case.base.model(input_ids=IDS[:, :2], use_cache=False).logits, case.plan)
    idle = idle_experts(short)
    assert set(idle) == {slot.site.path for slot in case.plan.slots} and all(len(each) >= 12 for each in idle.values())
    law_gradients(short)


# PEFT's target_parameters


def from_peft(folder: Path, model: nn.Module, **settings: object) -> Tensor:
    """Logits of an adapter that PEFT has made, and saved in `folder`."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings})
    theirs = get_peft_model(model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(str(folder))
    return logits(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_pefts_target_parameters_computes_the_same(family: str, tmp_path: Path) -> None:
    expected = from_peft(
        tmp_path,
        tiny(family),
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 9},
    )
    base = Base.of(tiny(family), "tiny")
    with attach(base, peft.read(tmp_path), accept_unknown_base=True):
        assert torch.allclose(logits(base.model), expected, atol=1e-5)
    assert (logits(base.model) - expected).abs().max() > 0.01


def test_one_parameter_that_peft_adapts_alone_is_read_at_its_place(tmp_path: Path) -> None:
    expected = from_peft(tmp_path, tiny("mixtral"), target_modules=[], target_parameters=["experts.down_proj"])
    base = Base.of(tiny("mixtral"), "tiny")
    adapter = peft.read(tmp_path)
    assert {slot.site.kind for slot in adapter.plan.slots} == {"experts.down_proj"}
    with attach(base, adapter, accept_unknown_base=True):
        assert torch.allclose(logits(base.model), expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_from_ours(family: str, variant: str, tmp_path: Path) -> None:
    case = case_of(tiny(family), "experts", "o_proj")
    slots = [LowRank(slot.site, 1 + i % 3, 4.0, variant) for i, slot in enumerate(case.plan.slots)]
    adapter = random_adapter(case.base, Plan(tuple(slots)))
    peft.write(adapter, tmp_path / "adapter")
    theirs = logits(PeftModel.from_pretrained(tiny(family), str(tmp_path / "adapter")).eval())
    ours, bare = case.output(adapter), case.bare()
    assert (theirs - ours).abs().max() < 1e-4 * max(1.0, float((ours - bare).abs().max()))
    assert (ours - bare).abs().max() > 0.01


def test_peft_reads_an_adapter_of_experts_only(tmp_path: Path) -> None:
    case = case_of(tiny("mixtral"), "gate_up_proj")
    adapter = random_adapter(case.base, case.plan)
    peft.write(adapter, tmp_path / "adapter")
    theirs = logits(PeftModel.from_pretrained(tiny("mixtral"), str(tmp_path / "adapter")).eval())
    assert torch.allclose(theirs, case.output(adapter), atol=1e-5)


def test_a_folder_whose_tensors_are_fewer_than_it_names_is_refused(tmp_path: Path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    from_peft(tmp_path, tiny("mixtral"), target_modules=["o_proj"], target_parameters=names)
    tensors = load_file(tmp_path / peft.WEIGHTS)
    inner = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}
    save_file(inner, tmp_path / peft.WEIGHTS)
    with pytest.raises(FormatError, match=r"experts has pairs for 1 parameters, and .* name 2"):
        peft.read(tmp_path)
    lower = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(lower, tmp_path / peft.WEIGHTS)
    with pytest.raises(AdapterError, match=r"for which it has no tensors \(model.layers.1.*experts.gate_up_proj"):
        require_fits(Base.of(tiny("mixtral"), "tiny"), peft.read(tmp_path), accept_unknown_base=True)


def test_another_number_of_experts_does_not_land() -> None:
    case = case_of(tiny("mixtral"), "experts")
    other = Base.of(tiny("mixtral", num_local_experts=8), "other")
    with pytest.raises(AdapterError, match=r"experts \(8,\) in the base, \(4,\) in the adapter"):
        fresh(other, case.plan, 0)


def test_a_config_of_ours_that_no_longer_names_the_experts_is_refused(tmp_path: Path) -> None:
    case = case_of(tiny("mixtral"), "experts")
    peft.write(random_adapter(case.base, case.plan), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    config["target_parameters"] = config["target_parameters"][:2]
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"target_parameters differ from lorafit\.json"):
        peft.read(tmp_path / "adapter")


# What is said of them


def test_experts_are_refused_by_the_engine_of_many_adapters_in_words() -> None:
    case = case_of(tiny("mixtral"), "experts")
    with pytest.raises(AdapterError, match=r"experts.gate_up_proj.* cannot be served together .*: use attach\(\)"):
        served(case.base, random_adapter(case.base, case.plan))


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_methods_that_are_more_than_a_pair_are_refused_on_experts(variant: str) -> None:
    sites = select(Base.of(tiny("mixtral"), "tiny").every_site, ["experts"])
    with pytest.raises(PlanError, match=f"experts.gate_up_proj: {variant} does not act on"):
        uniform(sites, 2, 4.0, variant)


def test_named_experts_get_a_rank_divided_by_how_many_a_token_takes() -> None:
    base = Base.of(tiny("mixtral"), "tiny")
    by_rule = decide(base, ROWS, TrainSettings(targets=("q_proj", "experts"), dropout=0.1))
    ranks = {slot.site.name: slot.rank for slot in by_rule.plan.slots}
    assert ranks == {"q_proj": 8, "gate_up_proj": 4, "down_proj": 4}
    said = {choice.name: choice.reason for choice in by_rule.choices}
    assert "4 for each expert, because a token uses 2 of them" in said["rank"]
    assert "dropout does not act on the experts" in said["sites"]
    by_hand = decide(base, ROWS, TrainSettings(targets=("q_proj", "experts"), rank=6))
    assert {slot.rank for slot in by_hand.plan.slots} == {6}


def test_a_plan_that_names_nothing_leaves_the_experts_and_says_how_to_name_them() -> None:
    base = Base.of(tiny("olmoe"), "tiny")
    decision = decide(base, ROWS, TrainSettings())
    assert all(slot.is_product for slot in decision.plan.slots)
    assert "in OlmoeExperts; --targets q_proj,k_proj,v_proj,o_proj,experts adapts" in decision.choices[0].reason


def test_trimming_cuts_the_pairs_of_layers_and_keeps_the_experts() -> None:
    case = case_of(tiny("mixtral"), "experts", "o_proj")
    small, _ = trimmed(random_adapter(case.base, case.plan), 0.5)
    experts = [slot for slot in case.plan.slots if slot.site.count > 1]
    assert [slot for slot in small.plan.slots if slot.site.count > 1] == experts
    assert sum(slot.rank for slot in small.plan.slots if slot.site.count == 1) == 2
    assert not torch.equal(case.output(small), case.bare())
