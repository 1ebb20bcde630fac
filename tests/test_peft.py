"""The PEFT folder, with PEFT itself as the oracle: it reads ours, we read its, both compute the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import plain_module, tiny_falcon, tiny_gpt2, tiny_llama
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafit
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import LowRank, Plan
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.errors import AdapterError, FormatError, RunError
from lorafit.layers.site import Site
from lorafit.planning.rules import all_linear
from lorafit.testing import random_adapter
from lorafit.variants import VARIANTS

# PEFT 0.21.2 asks transformers 5 for a property by its old name when it prepares a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "falcon": tiny_falcon}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def mixed(base: Base, variant: str = "lora") -> Adapter:
    """Every site but the head, ranks 1 to 4, four alphas."""
    slots = [LowRank(site, 1 + i % 4, 2.0 + i % 3 * 1.5, variant) for i, site in enumerate(all_linear(base))]
    return random_adapter(base, Plan(tuple(slots)), size=0.2)


def assert_the_same(ours: Tensor, theirs: Tensor, bare: Tensor) -> None:
    difference, effect = (float((theirs - other).abs().max()) for other in (ours, bare))
    assert difference <= 1e-4
    assert effect >= 100 * max(difference, 1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ours, of mixed ranks, on the tiny llama."""
    peft.write(mixed(Base.of(tiny_llama(), "tiny")), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same folder as anyone's: it does not say which base it belongs to."""
    (folder / "lorafit.json").unlink()
    return folder


# PEFT reads ours


@EVERY_MODEL
@EVERY_VARIANT
def test_peft_reads_ours_and_computes_the_same(tmp_path: Path, name: str, variant: str) -> None:
    base = Base.of(MODELS[name](), name)
    bare, adapter = logits_of(base.model), mixed(base, variant)
    with attach(base, adapter):
        ours = logits_of(base.model)
    peft.write(adapter, tmp_path / "adapter")
    theirs = logits_of(PeftModel.from_pretrained(MODELS[name](), str(tmp_path / "adapter")).eval())
    assert_the_same(ours, theirs, bare)


def test_peft_adapts_the_planned_sites_and_no_others(tmp_path: Path) -> None:
    base = Base.of(tiny_llama(), "tiny")
    path = "model.layers.1.self_attn.q_proj"
    site = next(site for site in base.sites if site.path == path)
    peft.write(random_adapter(base, Plan((LowRank(site, 2, 4.0),))), tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    adapted = {key.split(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
    assert adapted == {f"base_model.model.{path}"}


class Nested(nn.Module):
    """Layers whose paths end in each other's, and one with a name that means something else as a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "block": nn.ModuleDict({"fc": nn.Linear(6, 6)})})
        self.add_module("a+c", nn.Linear(6, 6))
        self.aac = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.fc, self.block["fc"], self.block["block"]["fc"], self.get_submodule("a+c"), self.aac):  # type: ignore[index]
            x = torch.tanh(layer(x))
        return x


# Ranks and alphas by path; what is named in no case is left alone.
NESTED = [
    {"fc": (1, 2.0), "block.fc": (2, 8.0), "block.block.fc": (2, 16.0), "a+c": (2, 3.0), "aac": (2, 8.0)},
    {"fc": (2, 8.0), "a+c": (1, 2.0)},
    {"block.fc": (2, 8.0)},
]


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested().eval()


def nested_adapter(base: Base, case: dict[str, tuple[int, float]]) -> Adapter:
    sites = {site.path: site for site in base.sites}
    return random_adapter(base, Plan(tuple(LowRank(sites[path], *case[path]) for path in case)), size=0.5)


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_peft_reads_a_path_that_ends_another_as_that_path_alone(
    tmp_path: Path, case: dict[str, tuple[int, float]]
) -> None:
    base = Base.of(nested(), "nested")
    adapter, x = nested_adapter(base, case), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    with attach(base, adapter), torch.no_grad():
        ours = base.model(x)
    peft.write(adapter, tmp_path / "adapter")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(nested(), str(tmp_path / "adapter")).eval()(x)
    assert_the_same(ours, theirs, base.model(x).detach())


@pytest.mark.parametrize("case", NESTED, ids=str)
def test_pefts_own_matcher_finds_the_planned_ranks_and_alphas_and_no_others(
    tmp_path: Path, case: dict[str, tuple[int, float]]
) -> None:
    base = Base.of(nested(), "nested")
    peft.write(nested_adapter(base, case), tmp_path / "adapter")
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    taken = {path for path, _ in base.model.named_modules() if path and bool(check_target_module_exists(config, path))}
    found = {
        path: (
            config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r),
            config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha),
        )
        for path in taken
    }
    assert found == case


def test_the_check_by_peft_runs_from_the_command_line(tmp_path: Path, tiny_base: Base, tiny_folder: Path) -> None:
    peft.write(mixed(tiny_base, "dora"), tmp_path / "adapter")
    command = [sys.executable, "-m", "lorafit.jobs.with_peft", str(tmp_path / "adapter"), str(tiny_folder)]
    done = subprocess.run(command, input=json.dumps(IDS.tolist()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["max_logit_difference"] <= 1e-4
    assert found["adapter_effect"] >= 1e-2


# We read PEFT's


def made_by_peft(name: str, folder: Path, **settings: Any) -> tuple[Tensor, Tensor]:
    """Save a random adapter of PEFT's; returns its logits and the bare ones."""
    model = MODELS[name]()
    bare = logits_of(model)
    theirs = get_peft_model(model, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(folder))
    return logits_of(theirs), bare


LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {**LLAMA, "r": 4, "lora_alpha": 8}),
    "a rank above the narrow side": ("llama", {"target_modules": ["k_proj", "o_proj"], "r": 40}),
    "dora above the narrow side": ("llama", {"target_modules": ["k_proj", "o_proj"], "r": 40, "use_dora": True}),
    "patterns": (
        "llama",
        {
            **LLAMA,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 3},
            "alpha_pattern": {"layers.0.mlp.down_proj": 5},
        },
    ),
    "rslora": ("llama", {**LLAMA, "r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "dora": ("llama", {**LLAMA, "r": 4, "lora_alpha": 6, "use_dora": True}),
    "some layers": ("llama", {**LLAMA, "r": 4, "layers_to_transform": [1]}),
    "a pattern as target": ("llama", {"r": 4, "target_modules": r".*\.(q|k)_proj"}),
    "gpt2": ("gpt2", {**GPT2, "r": 4, "rank_pattern": {"c_fc": 2}}),
    "gpt2 dora": ("gpt2", {**GPT2, "r": 4, "use_dora": True}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_we_read_pefts_and_compute_the_same(tmp_path: Path, case: str) -> None:
    name, settings = FOREIGN[case]
    theirs, bare = made_by_peft(name, tmp_path, **settings)
    base = Base.of(MODELS[name](), name)
    with attach(base, peft.read(tmp_path), accept_unknown_base=True):
        ours = logits_of(base.model)
    assert_the_same(ours, theirs, bare)


def test_an_adapter_from_elsewhere_attaches_only_when_its_base_is_accepted(foreign: Path) -> None:
    base = Base.of(tiny_llama(), "tiny")
    adapter = peft.read(foreign)
    with pytest.raises(AdapterError, match="--accept-unknown-base"), attach(base, adapter):
        pass
    with attach(base, adapter, accept_unknown_base=True):
        pass


def test_pefts_defaults_hold_where_its_config_names_no_alpha(foreign: Path) -> None:
    edit(foreign, lambda config: [config.pop("lora_alpha"), config.pop("alpha_pattern")])
    assert {slot.alpha for slot in peft.read(foreign).plan.slots} == {LoraConfig().lora_alpha}


UNREAD: dict[str, tuple[PeftConfig, str]] = {
    "modules_to_save": (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "modules_to_save"),
    "bias": (LoraConfig(target_modules=["q_proj"], bias="all"), "bias = 'all'"),
    "target_parameters": (LoraConfig(target_modules=[], target_parameters=["q_proj.weight"]), "target_parameters"),
    "trainable_token_indices": (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "trainable_token"),
    "pissa": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type = 'IA3'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("feature", UNREAD)
def test_what_is_not_read_of_peft_is_refused_by_name(tmp_path: Path, feature: str) -> None:
    config, named = UNREAD[feature]
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(FormatError, match=named):
        peft.read(tmp_path)


# Files that are not what they should be


def edit(folder: Path, change: Callable[[Any], object], name: str = "adapter_config.json") -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    change(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """Change the tensors in a folder; returns the key of the first, which is the one that changes."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    change(tensors)
    save_file(tensors, path)
    return first


def drop_first(tensors: dict[str, Tensor]) -> None:
    tensors.pop(min(tensors))


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(2, 32)


def misshape_first(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.ones(7, 5)


def nan_in_first(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)][0, 0] = torch.nan


def site_of(key: str) -> str:
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


@pytest.mark.parametrize("change", [drop_first, misshape_first, nan_in_first])
@pytest.mark.parametrize("whose", ["folder", "foreign"])
def test_a_tensor_that_is_missing_or_odd_is_named(
    change: Callable[[dict[str, Tensor]], object], whose: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(whose)
    first = rewrite(path, change)
    with pytest.raises((FormatError, AdapterError), match=site_of(first)):
        peft.read(path)


@pytest.mark.parametrize("whose", ["folder", "foreign"])
def test_a_tensor_too_many_is_named(whose: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(whose)
    rewrite(path, add_one)
    with pytest.raises((FormatError, AdapterError), match=r"layers\.9\.mlp\.up_proj"):
        peft.read(path)


def test_tensors_of_another_kind_are_named(foreign: Path) -> None:
    rewrite(foreign, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    with pytest.raises(
        FormatError, match=r"1 of 29 tensors are whole weights \(base_model\.model\.lm_head\.weight\).*: merge"
    ):
        peft.read(foreign)


def test_every_problem_of_the_tensors_is_listed_at_once(folder: Path) -> None:
    first = rewrite(folder, lambda tensors: [drop_first(tensors), add_one(tensors), misshape_first(tensors)])
    with pytest.raises(AdapterError) as caught:
        peft.read(folder)
    assert all(word in str(caught.value) for word in ("missing:", "not in the plan:", "wrong shape:", site_of(first)))


def test_an_empty_adapter_is_refused(foreign: Path) -> None:
    save_file({}, foreign / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        peft.read(foreign)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: damaged"):
        peft.read(folder)


def test_a_pickle_is_never_opened(foreign: Path) -> None:
    (foreign / "adapter_model.safetensors").rename(foreign / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin: a pickle"):
        peft.read(foreign)


def test_an_mlx_adapter_is_known_as_such(foreign: Path) -> None:
    (foreign / "adapter_model.safetensors").rename(foreign / "adapters.safetensors")
    with pytest.raises(FormatError, match="mlx-lm"):
        peft.read(foreign)


def test_tensors_changed_behind_our_back_are_noticed(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[min(tensors)].view(torch.int32)[0, 0].bitwise_xor_(1))
    with pytest.raises(FormatError, match="not those that were saved"):
        peft.read(folder)


def test_a_rank_that_config_and_tensors_disagree_on_is_named(foreign: Path) -> None:
    edit(foreign, lambda config: config.update(rank_pattern={}))
    with pytest.raises(FormatError, match="in the tensors, 1 in the config"):
        peft.read(foreign)


def test_a_target_without_tensors_is_named(foreign: Path) -> None:
    edit(foreign, lambda config: config["target_modules"].append("lm_head"))
    edit(foreign, lambda config: config.pop("exclude_modules"))
    base = Base.of(tiny_llama(), "tiny")
    with (
        pytest.raises(AdapterError, match=r"1 modules of 'tiny' for which it has no tensors \(lm_head\)"),
        attach(base, peft.read(foreign), accept_unknown_base=True),
    ):
        pass


@pytest.mark.parametrize("odd", [{"lora_alpha": "many"}, {"rank_pattern": [1]}, {"alpha_pattern": {"(": 2}}], ids=str)
def test_odd_values_in_the_config_are_refused(foreign: Path, odd: dict[str, Any]) -> None:
    edit(foreign, lambda config: config.update(odd))
    with pytest.raises(FormatError, match=r"adapter_config\.json: a rank, alpha or pattern in it is odd"):
        peft.read(foreign)


@pytest.mark.parametrize("text", ["[]", "{", '{"peft_type": "LO'])
def test_a_config_that_is_no_json_object_is_refused(foreign: Path, text: str) -> None:
    (foreign / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=r"adapter_config\.json: not"):
        peft.read(foreign)


def test_a_saved_adapter_is_read_from_the_path_that_is_returned(folder: Path, tmp_path: Path) -> None:
    adapter = lorafit.read_adapter(folder)
    saved = lorafit.save_adapter(adapter, str(tmp_path / "more" / "mine"))
    assert saved == tmp_path / "more" / "mine" and lorafit.read_adapter(saved) == adapter


def test_only_an_adapter_folder_is_replaced(folder: Path, tmp_path: Path) -> None:
    """A folder with a README.md alone is somebody's project, though an adapter folder has such a file too."""
    adapter = random_adapter(Base.of(tiny_llama(), "tiny"), lorafit.read_adapter(folder).plan, seed=7)
    assert lorafit.read_adapter(lorafit.save_adapter(adapter, folder)) == adapter
    (folder / "notes.txt").write_text("keep", encoding="utf-8")
    (project := tmp_path / "project").mkdir()
    (project / "README.md").write_text("keep", encoding="utf-8")
    for place, kept in ((folder, "notes.txt"), (project, "README.md")):
        with pytest.raises(FormatError, match=f"holds {kept}, which would be lost: name another folder"):
            lorafit.save_adapter(adapter, place)
        assert (place / kept).read_text(encoding="utf-8") == "keep"
    with pytest.raises(RunError, match="a file, not a folder"):
        lorafit.save_adapter(adapter, project / "README.md")


def test_where_saving_fails_what_was_there_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = lorafit.read_adapter(folder)
    other = random_adapter(Base.of(tiny_llama(), "tiny"), before.plan, seed=7)
    monkeypatch.setattr("lorafit.adapters.formats.peft.write_text", full)
    with pytest.raises(OSError, match="No space left"):
        lorafit.save_adapter(other, folder)
    assert lorafit.read_adapter(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_edited_lorafit_json_is_refused(folder: Path) -> None:
    edit(folder, lambda ours: ours.pop("digest"), "lorafit.json")
    with pytest.raises(FormatError, match=r"lorafit\.json.*'digest'"):
        peft.read(folder)


# Formats of lorafit.json


OLD = Path(__file__).parent / "adapters_of_format_1"


@pytest.mark.parametrize("name", ["lora", "dora", "one-slot"])
def test_a_folder_of_format_1_is_read_for_ever(name: str) -> None:
    adapter = peft.read(OLD / name)
    slots = {slot.site.path: (slot.rank, slot.alpha, slot.variant) for slot in adapter.plan.slots}
    assert slots["model.layers.0.self_attn.q_proj"] == (2, 4.0, "dora" if name != "lora" else "lora")
    assert adapter.base_name == "tiny"


def test_a_changed_tensor_in_a_folder_of_format_1_is_noticed(tmp_path: Path) -> None:
    folder = Path(copytree(OLD / "lora", tmp_path / "old"))
    rewrite(folder, lambda tensors: tensors[min(tensors)].view(torch.int32)[0, 0].bitwise_xor_(1))
    with pytest.raises(FormatError, match="not those that were saved"):
        peft.read(folder)


def test_what_is_read_of_format_1_is_written_and_read_again(tmp_path: Path) -> None:
    adapter = peft.read(OLD / "lora")
    peft.write(adapter, tmp_path / "new")
    assert peft.read(tmp_path / "new") == adapter


def test_a_digest_is_the_same_in_a_later_version_with_one_more_field(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Wider(LowRank):
        count: int = 1

    base = Base.of(tiny_llama(), "tiny")
    today = random_adapter(base, Plan((LowRank(base.sites[0], 2, 4.0),)))
    later = Adapter(Plan((Wider(base.sites[0], 2, 4.0),)), today.tensors)
    other = Adapter(Plan((Wider(base.sites[0], 2, 4.0, count=2),)), today.tensors)
    assert later.digest() == today.digest() != other.digest()


def test_a_digest_is_this_one() -> None:
    """It is kept in folders and registries: where this fails, raise FORMAT and keep the old one readable."""
    site = Site("fc", "linear", 2, 2)
    ones = {"fc.A": torch.ones(1, 2), "fc.B": torch.ones(2, 1)}
    plan = '{"format":2,"slots":[{"alpha":4.0,"rank":1,"site":{"d_in":2,"d_out":2,"kind":"linear","path":"fc"}}]}'
    by_hand = hashlib.sha256(
        plan.encode() + b"fc.A" + bytes.fromhex("0000803f" * 2) + b"fc.B" + bytes.fromhex("0000803f" * 2)
    )
    assert Adapter(Plan((LowRank(site, 1, 4.0),)), ones).digest() == by_hand.hexdigest()


@pytest.mark.parametrize("look", [peft.read, peft.glance])
def test_a_folder_of_a_later_format_is_refused_with_the_way_out(folder: Path, look: Callable[[Path], object]) -> None:
    edit(folder, lambda ours: ours.update(format=3), "lorafit.json")
    with pytest.raises(FormatError, match=r"lorafit\.json: of format 3, .*: use a newer lorafit"):
        look(folder)


@pytest.mark.parametrize("odd", [None, "2", True, 0])
def test_a_format_that_is_none_is_refused(folder: Path, odd: object) -> None:
    edit(folder, lambda ours: ours.update(format=odd), "lorafit.json")
    with pytest.raises(FormatError, match=r"lorafit\.json"):
        peft.read(folder)


def test_two_variants_in_one_adapter_cannot_be_written(tmp_path: Path) -> None:
    base = Base.of(tiny_llama(), "tiny")
    slots = [LowRank(site, 2, 4.0, variant) for site, variant in zip(base.sites, ["lora", "dora"], strict=False)]
    with pytest.raises(FormatError, match="one variant per adapter"):
        peft.write(random_adapter(base, Plan(tuple(slots))), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# The right base


def test_an_adapter_of_another_base_does_not_attach(folder: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    other = Base.of(model, "other")
    with pytest.raises(AdapterError, match=r"belongs to base 'tiny'.*not to 'other'"), attach(other, peft.read(folder)):
        pass


def test_an_adapter_whose_widths_do_not_fit_lists_every_slot() -> None:
    base = Base.of(plain_module(), "plain")
    slots = [LowRank(site, 2, 4.0) for site in base.sites]
    ours = random_adapter(base, Plan(tuple(slots)))
    adapter = Adapter(ours.plan, ours.tensors)
    narrow = plain_module()
    narrow.blocks = nn.ModuleList([nn.Linear(8, 24), nn.Linear(24, 8), nn.Tanh()])
    other = Base.of(narrow, "narrow")
    with pytest.raises(AdapterError) as caught, attach(other, adapter, accept_unknown_base=True):
        pass
    assert "3 parts of the adapter do not fit 'narrow'" in str(caught.value)
    assert all(f"blocks.{i}: " in str(caught.value) for i in range(3))


def test_an_alpha_written_as_a_whole_number_is_the_same_adapter() -> None:
    base = Base.of(tiny_llama(), "tiny")
    one, other = (Plan((LowRank(base.sites[0], 2, alpha),)) for alpha in (4, 4.0))
    assert random_adapter(base, one) == random_adapter(base, other)
