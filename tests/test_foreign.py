"""Adapters that others wrote: read with PEFT's own logits where one way leads to the base, else refused in words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MambaConfig, MambaForCausalLM

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.adapters.plan import LowRank, Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fits
from lorafit.attachment.pure import merged
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, FormatError
from lorafit.layers.site import Site
from lorafit.planning.rules import all_linear
from lorafit.testing import random_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(4))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def untied() -> nn.Module:
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    model.config.tie_word_embeddings = False
    return model


def written(folder: Path, model: nn.Module, **settings: Any) -> Tensor:
    """Save a random adapter of PEFT's on the model, and give back the logits it computes there."""
    theirs = get_peft_model(
        model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj"], **settings})
    ).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(folder))
    return logits_of(theirs)


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def put(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def read_with(folder: Path, model: nn.Module) -> Tensor:
    base = Base.of(model, "tiny")
    with attach(base, peft.read(folder), accept_unknown_base=True):
        return logits_of(base.model)


def assert_same(ours: Tensor, theirs: Tensor, model: nn.Module) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert float((logits_of(model) - theirs).abs().max()) >= 1e-2


def refused(folder: Path, model: nn.Module) -> str:
    with pytest.raises((FormatError, AdapterError)) as caught:
        read_with(folder, model)
    return str(caught.value)


# Names

INNER = "base_model.model."
NAMES: dict[str, Callable[[str], str]] = {
    "torch.compile of PEFT's model": lambda name: f"_orig_mod.{name}",
    "torch.compile of the model within": lambda name: name.replace(INNER, f"{INNER}_orig_mod."),
    "torch.compile of every block": lambda name: name.replace(".self_attn", "._orig_mod.self_attn").replace(
        ".mlp", "._orig_mod.mlp"
    ),
    "DDP": lambda name: f"module.{name}",
    "DDP around torch.compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: name.replace(INNER, f"{INNER}_fsdp_wrapped_module.").replace(
        ".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ),
    "Lightning": lambda name: f"model.{name}",
    "a value head": lambda name: f"pretrained_model.{name}",
    "an adapter's name": lambda name: name.replace(".weight", ".my_task.weight"),
    "the model alone": lambda name: name.removeprefix(INNER),
    "the model alone in DDP": lambda name: name.replace(INNER, "module."),
    "the decoder alone": lambda name: name.removeprefix(f"{INNER}model."),
    "a multimodal model": lambda name: name.replace(f"{INNER}model.", f"{INNER}model.language_model."),
    "an older multimodal model": lambda name: name.replace(INNER, f"{INNER}language_model."),
}


@pytest.mark.parametrize("writer", NAMES)
def test_names_of_other_writers_are_read_with_the_same_logits(tmp_path: Path, writer: str) -> None:
    theirs = written(tmp_path, tiny_llama())
    renamed(tmp_path, NAMES[writer])
    assert_same(read_with(tmp_path, tiny_llama()), theirs, tiny_llama())


def test_magnitudes_under_an_adapters_name_are_read(tmp_path: Path) -> None:
    theirs = written(tmp_path, tiny_llama(), use_dora=True)
    renamed(tmp_path, lambda name: f"{name.removesuffix('.weight')}.default" + ".weight" * name.endswith(".weight"))
    assert_same(read_with(tmp_path, tiny_llama()), theirs, tiny_llama())


def test_an_adapter_of_the_text_model_is_read_into_one_that_holds_it(tmp_path: Path) -> None:
    """And modules outside of what it was saved from are not missed, though its targets end their paths, too."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = tiny_llama()
            self.eyes = nn.ModuleDict({"k_proj": nn.Linear(32, 7)})

        def forward(self, **given: Any) -> Any:
            return self.text(**given)

    theirs = written(tmp_path, tiny_llama())
    assert_same(read_with(tmp_path, Holder().eval()), theirs, tiny_llama())


def test_merging_and_the_check_before_serving_go_the_same_way(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    renamed(tmp_path, NAMES["a multimodal model"])
    base, adapter = Base.of(tiny_llama(), "tiny"), peft.read(tmp_path)
    require_fits(base, adapter, accept_unknown_base=True)
    assert "model.layers.0.self_attn.k_proj.weight" in merged(base, adapter, accept_unknown_base=True)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}) for _ in range(2))


def foreign_on(path: str) -> Adapter:
    slot = LowRank(Site(path, "linear", 4, 4), 1, 1.0)
    return Adapter(Plan((slot,)), {f"{path}.A": torch.ones(1, 4), f"{path}.B": torch.ones(4, 1)})


def test_an_adapter_that_could_land_in_two_places_lands_in_none() -> None:
    with pytest.raises(AdapterError, match=r"layers\.0: 'towers' has no such module, but 2 .*left.*right"):
        require_fits(Base.of(Towers(), "towers"), foreign_on("layers.0"), accept_unknown_base=True)


@pytest.mark.parametrize("path", ["left.layers.1", "left.blocks.0", "up.layers.0", "0"])
def test_a_module_of_another_name_or_layer_is_not_taken_for_the_one(path: str) -> None:
    with pytest.raises(AdapterError, match=r"the base has no such module|that could be meant"):
        require_fits(Base.of(Towers(), "towers"), foreign_on(path), accept_unknown_base=True)


def test_an_adapter_that_names_its_base_keeps_its_paths() -> None:
    base = Base.of(Towers(), "towers")
    stray = foreign_on("layers.0")
    with pytest.raises(AdapterError, match="the base has no such module"):
        require_fits(base, Adapter(stray.plan, stray.tensors, base.identity, base.name))


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    renamed(tmp_path, lambda name: name.replace(".weight", f".{'ab'['layers.1' in name]}.weight"))
    assert "several adapters in one file (a, b)" in refused(tmp_path, tiny_llama())


def test_names_that_begin_in_two_ways_are_refused(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    renamed(tmp_path, lambda name: name if "layers.1" in name else f"module.{name}")
    assert "begin in 2 ways ('base_model.model.', 'module.base_model.model.')" in refused(tmp_path, tiny_llama())


def test_pairs_under_another_programs_names_are_refused_as_such(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    renamed(tmp_path, lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))
    assert "another program's names" in refused(tmp_path, tiny_llama())


@pytest.mark.parametrize("all_of_them", [True, False])
def test_empty_tensors_are_said_to_be_ungathered(tmp_path: Path, all_of_them: bool) -> None:
    written(tmp_path, tiny_llama())
    tensors = load_file(tmp_path / WEIGHTS)
    some = tensors if all_of_them else [min(tensors)]
    save_file({**tensors, **{name: torch.zeros(0) for name in some}}, tmp_path / WEIGHTS)
    said = refused(tmp_path, tiny_llama())
    assert f"{len(some)} of 8 tensors are empty" in said and "GatheredParameters" in said


# What lies beside a pair


@pytest.mark.parametrize("model", [tiny_llama, untied, tiny_gpt2], ids=["tied", "untied", "gpt2"])
def test_the_heads_own_weight_beside_its_pair_is_compared_and_left_out(
    tmp_path: Path, model: Callable[[], nn.Module]
) -> None:
    targets = ["c_attn", "lm_head"] if model is tiny_gpt2 else ["k_proj", "lm_head"]
    theirs = written(tmp_path, model(), target_modules=targets)
    assert any("base_layer" in name for name in load_file(tmp_path / WEIGHTS))
    assert_same(read_with(tmp_path, model()), theirs, model())


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")], ids=str)
def test_the_heads_weight_is_the_same_in_a_coarser_dtype(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    saved, opened = (getattr(torch, name) for name in dtypes)
    written(tmp_path, untied(), target_modules=["lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: t.to(saved) for name, t in tensors.items()}, tmp_path / WEIGHTS)
    require_fits(Base.of(untied().to(opened), "tiny"), peft.read(tmp_path), accept_unknown_base=True)


def test_a_head_that_was_trained_beside_its_pair_is_refused(tmp_path: Path) -> None:
    written(tmp_path, untied(), target_modules=["k_proj", "lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    (name,) = (name for name in tensors if "base_layer" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    assert "lm_head.weight: came with the adapter and differs from the weight of 'tiny'" in refused(tmp_path, untied())


def test_a_weight_of_a_module_without_a_pair_is_refused(tmp_path: Path) -> None:
    written(tmp_path, untied())
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, f"{INNER}lm_head.base_layer.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    assert "1 of 9 tensors are whole weights" in refused(tmp_path, untied())


def test_what_it_says_of_its_base_is_kept_when_it_is_written_again(tmp_path: Path) -> None:
    written(tmp_path, untied(), target_modules=["k_proj", "lm_head"])
    peft.write(peft.read(tmp_path), tmp_path / "again")
    other = untied()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert "came with the adapter" in refused(tmp_path / "again", other)


@pytest.mark.parametrize("model", [tiny_llama, untied])
def test_an_adapter_of_an_embedding_computes_what_peft_computes(tmp_path: Path, model: Callable[[], Any]) -> None:
    theirs = written(tmp_path, model(), target_modules=["k_proj", "embed_tokens"])
    assert_same(read_with(tmp_path, model()), theirs, model())


def test_an_embedding_that_was_trained_beside_its_pair_is_refused(tmp_path: Path) -> None:
    written(tmp_path, untied(), target_modules=["k_proj", "embed_tokens"])
    tensors = load_file(tmp_path / WEIGHTS)
    (name,) = (name for name in tensors if "embed_tokens" in name and "lora" not in name)
    tensors[name][0, 0] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    assert "embed_tokens.weight: came with the adapter and differs from the weight of" in refused(tmp_path, untied())


# What the config names


def test_targets_that_the_model_lacks_are_no_fault(tmp_path: Path) -> None:
    theirs = written(tmp_path, tiny_llama(), target_modules=["k_proj", "up_proj", "c_attn", "query_key_value"])
    assert_same(read_with(tmp_path, tiny_llama()), theirs, tiny_llama())


CHOSEN: dict[str, dict[str, Any]] = {
    "excluded": {"exclude_modules": ["layers.0.mlp.up_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*layers\.0.*"},
    "one layer": {"layers_to_transform": 1},
    "layers of a list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*1\.self_attn\.(k|o)_proj"},
}


@pytest.mark.parametrize("case", CHOSEN)
def test_modules_that_the_config_leaves_alone_are_not_missed(tmp_path: Path, case: str) -> None:
    theirs = written(tmp_path, tiny_llama(), **CHOSEN[case])
    assert_same(read_with(tmp_path, tiny_llama()), theirs, tiny_llama())


def test_a_pair_that_is_lost_is_named(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    tensors = load_file(tmp_path / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, tmp_path / WEIGHTS)
    assert "1 modules of 'tiny' for which it has no tensors (model.layers.1.mlp.up_proj)" in refused(
        tmp_path, tiny_llama()
    )


def test_tensors_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    """PEFT passes over them with a warning."""
    written(tmp_path, tiny_llama())
    put(tmp_path, target_modules=["k_proj"])
    assert "model.layers.0.mlp.up_proj: has tensors, but the config names it neither" in refused(tmp_path, tiny_llama())


@pytest.mark.parametrize("key", ["use_future_variant", "ensure_weight_tying", "lora_bias", "enable_lora"])
@pytest.mark.parametrize("value", [True, 3, "on", {"a": 1}, ["x"]], ids=str)
def test_a_setting_that_is_not_known_and_set_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    written(tmp_path, tiny_llama())
    put(tmp_path, **{key: value})
    assert f"{key} = {value!r}" in refused(tmp_path, tiny_llama())


def test_a_setting_that_is_not_known_is_refused_in_a_folder_of_ours(tmp_path: Path) -> None:
    base = Base.of(tiny_llama(), "tiny")
    peft.write(random_adapter(base, Plan((LowRank(base.sites[0], 2, 4.0),))), tmp_path / "adapter")
    put(tmp_path / "adapter", use_future_variant=True)
    assert "use_future_variant = True" in refused(tmp_path / "adapter", tiny_llama())


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=str)
def test_a_setting_that_is_not_known_and_says_nothing_passes(tmp_path: Path, value: object) -> None:
    theirs = written(tmp_path, tiny_llama())
    put(tmp_path, use_future_variant=value)
    assert_same(read_with(tmp_path, tiny_llama()), theirs, tiny_llama())


def test_every_setting_of_pefts_own_default_config_passes(tmp_path: Path) -> None:
    written(tmp_path, tiny_llama())
    defaults = {name: value for name, value in LoraConfig().to_dict().items() if name != "target_modules"}
    put(tmp_path, **defaults | {"r": 3, "lora_alpha": 5, "peft_type": "LORA"})
    peft.read(tmp_path)


# Families in which PEFT means other modules


def tiny_deepseek() -> nn.Module:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=261,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=256,
        )
    ).eval()


def test_modules_that_peft_passes_over_are_said_before_training(tmp_path: Path) -> None:
    base = Base.of(tiny_deepseek(), "tiny")
    sites = [site for site in base.sites if site.name in {"o_proj", "up_proj", "gate_proj", "down_proj"}]
    peft.write(random_adapter(base, Plan(tuple(LowRank(site, 2, 4.0) for site in sites))), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(tiny_deepseek(), str(tmp_path / "adapter"))
    adapted = {name.partition(".lora_A")[0].removeprefix(INNER) for name in theirs.state_dict() if ".lora_A" in name}
    passed_over = [site.path for site in sites if site.path not in adapted]
    said = misread_by_peft(base.model, uniform(sites, 2, 4.0).slots)
    assert passed_over and said is not None
    assert f"pass over {len(passed_over)} modules of this plan, such as {passed_over[0]}" in said
    others = [site for site in sites if site.name == "o_proj"]
    assert misread_by_peft(base.model, uniform(others, 2, 4.0).slots) is None


def test_the_output_of_a_mamba_is_left_out_as_peft_does() -> None:
    torch.manual_seed(0)
    base = Base.of(
        MambaForCausalLM(MambaConfig(vocab_size=261, hidden_size=16, num_hidden_layers=1, state_size=4)), "m"
    )
    names = {site.name for site in all_linear(base)}
    assert "in_proj" in names and "out_proj" not in names
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        get_peft_model(base.model, LoraConfig(target_modules=["out_proj"]))
    named = [site for site in base.sites if site.name == "out_proj"]
    assert "PEFT refuses out_proj of a mamba" in str(misread_by_peft(base.model, uniform(named, 2, 4.0).slots))
