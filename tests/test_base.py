"""Bases: two fingerprints, and folders that cannot be used."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lorafit.adapters.plan import uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.pure import merged
from lorafit.bases import base as bases
from lorafit.bases.base import Base, open_base
from lorafit.bases.builtin import BUILTIN
from lorafit.errors import AdapterError, BaseError
from lorafit.testing import random_adapter


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, nothing is looked for elsewhere."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A base folder of one's own to spoil."""
    return Path(copytree(tiny_folder, tmp_path / "base"))


# Identity: the content, however it is opened and stored


def test_identity_is_the_same_in_every_dtype(tiny_folder: Path) -> None:
    wide, narrow = (open_base(tiny_folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert wide.identity == narrow.identity


def test_identity_is_the_same_however_the_weights_are_sharded(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert open_base(tmp_path / "shards", torch.float32).identity == open_base(tiny_folder, torch.float32).identity


def test_identity_is_the_same_under_another_name(tiny_folder: Path, folder: Path) -> None:
    assert open_base(folder, torch.float32).identity == open_base(tiny_folder, torch.float32).identity


def test_identity_differs_when_one_weight_differs(tiny_folder: Path, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].view(torch.int32)[3].bitwise_xor_(1))
    assert open_base(folder, torch.float32).identity != open_base(tiny_folder, torch.float32).identity


def test_opened_twice_a_base_has_the_same_bytes(tiny_folder: Path) -> None:
    assert open_base(tiny_folder, torch.float32).integrity() == open_base(tiny_folder, torch.float32).integrity()


# Integrity: every byte in memory

PLACES = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.rotary_emb.inv_freq"]


def flip(tensor: Tensor) -> None:
    """Flip the lowest bit of the last number."""
    tensor.detach().view(-1).view(torch.uint8)[-4].bitwise_xor_(1)


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_bit_changes_the_integrity(tiny_base: Base, place: str) -> None:
    before = tiny_base.integrity()
    held = dict([*tiny_base.model.named_parameters(), *tiny_base.model.named_buffers()])
    flip(held[place])
    assert tiny_base.integrity() != before
    flip(held[place])
    assert tiny_base.integrity() == before


def test_every_parameter_and_buffer_counts(tiny_base: Base) -> None:
    before = tiny_base.integrity()
    for name, tensor in [*tiny_base.model.named_parameters(), *tiny_base.model.named_buffers()]:
        flip(tensor)
        assert tiny_base.integrity() != before, name
        flip(tensor)


def test_buffers_of_any_type_and_size_have_an_integrity() -> None:
    model = nn.Linear(2, 2)
    for name, tensor in {"flag": torch.tensor(True), "none": torch.empty(0), "count": torch.tensor([3])}.items():
        model.register_buffer(name, tensor)
    base = Base.of(model, "odd")
    before = base.integrity()
    model.flag.logical_not_()
    assert base.integrity() != before


def test_a_compiled_wrapper_is_no_base() -> None:
    with pytest.raises(BaseError, match="compiled wrapper"):
        Base.of(torch.compile(nn.Linear(2, 2), backend="eager"), "compiled")  # type: ignore[arg-type]


def test_the_context_is_what_the_model_was_made_for(tiny_base: Base) -> None:
    assert (tiny_base.context, Base.of(tiny_gpt2(), "gpt2").context) == (512, 512)
    assert Base.of(nn.Linear(2, 2), "plain").context is None


def test_a_tied_weight_is_known_and_not_merged(tiny_base: Base) -> None:
    """Merged into the head it would change the embedding too (peft#2777, #2018)."""
    assert tiny_base.tied("lm_head") == ("model.embed_tokens",)
    assert tiny_base.tied(tiny_base.sites[0].path) == ()
    head = tuple(site for site in tiny_base.sites if site.path == "lm_head")
    adapter = random_adapter(tiny_base, uniform(head, 4, 32))
    with attach(tiny_base, adapter):
        pass  # attached it acts on the head alone
    with pytest.raises(AdapterError, match=r"lm_head \(with model\.embed_tokens\)"):
        merged(tiny_base, adapter)


def test_the_head_is_found_and_left_to_be_named(tiny_base: Base) -> None:
    assert tiny_base.head_paths() == {"lm_head"}
    assert Base.of(tiny_gpt2(), "gpt2").head_paths() == {"lm_head"}


# Folders that cannot be used


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def shard_missing(folder: Path) -> None:
    tiny_llama().save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-00002*")).unlink()


def code_of_its_own(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def more_layers_than_the_file(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)


def other_widths_than_the_file(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)


def config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'single': quotes}", encoding="utf-8")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]", encoding="utf-8")


def tokenizer_with_code_of_its_own(folder: Path) -> None:
    (folder / "mytok.py").write_text("raise SystemExit('code of the folder ran')", encoding="utf-8")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mytok.T", None]}, tokenizer_class="T")


def fewer_layers_than_the_file(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="nobodys", architectures=["NobodysForCausalLM"])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (no_tokenizer, "no tokenizer"),
        (shard_missing, r"1 of \d+ shards missing: model-00002"),
        (code_of_its_own, "auto_map"),
        (tokenizer_with_code_of_its_own, "tokenizer_config.json names code of its own"),
        (fewer_layers_than_the_file, r"unexpected keys: model\.layers\.1\."),
        (pickle_only, r"pytorch_model\.bin is a pickle"),
        (truncated, r"model\.safetensors: damaged"),
        (more_layers_than_the_file, r"missing keys: model\.layers\.2\."),
        (other_widths_than_the_file, "transformers cannot open it|mismatched keys"),
        (config_no_json, r"config\.json cannot be read"),
        (config_a_list, r"config\.json is not a JSON object"),
        (no_config, r"config\.json is missing"),
        (unknown_architecture, "nobodys"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error_naming_why(
    folder: Path, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(folder)
    with pytest.raises(BaseError, match=named) as caught:
        open_base(folder, torch.float32)
    assert str(folder) in str(caught.value)


# Models of another kind


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("t5", "T5ForConditionalGeneration"),
        ("vit", "ViTForImageClassification"),
        ("llava", "LlavaForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertModel"),
        ("bert", "BertForPreTraining"),
        ("bert", "BertForMultipleChoice"),
        ("bert", "BertForNextSentencePrediction"),
        ("camembert", "CamembertModel"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama4", "Llama4ForConditionalGeneration"),
        ("mllama", "MllamaForConditionalGeneration"),
        ("emu3", "Emu3ForConditionalGeneration"),
        ("musicgen", "MusicgenForConditionalGeneration"),
        ("whisper", "WhisperForAudioClassification"),
        ("distilbert", None),
    ],
)
def test_a_model_of_another_kind_is_told_in_one_sentence(tmp_path: Path, kind: str, saved: str | None) -> None:
    """Whatever else is missing from the folder: a tokenizer would not help."""
    named = {"architectures": [saved]} if saved else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **named}), encoding="utf-8")
    with pytest.raises(BaseError) as caught:
        open_base(tmp_path)
    reads = kind in ("bert", "camembert", "llama", "distilbert")
    trained = "; with texts and labels, --task classification trains it" * reads
    assert str(caught.value) == (
        f"{tmp_path}: holds {saved or kind}, which is no causal language model{trained}: name the folder of one, which "
        "writes from left to right; lorafit bases lists some"
    )


@pytest.mark.parametrize("saved", ["BertForMaskedLM", "BertModel"])
def test_a_masked_model_that_is_configured_as_a_decoder_is_opened(folder: Path, saved: str) -> None:
    edit(folder / "config.json", model_type="bert", architectures=[saved], is_decoder=True)
    with pytest.raises(BaseError) as caught:
        open_base(folder, torch.float32)
    assert "which is no causal language model" not in str(caught.value), "but for its weights, which are a Llama's"


def test_a_classifier_that_is_configured_as_a_decoder_is_none(folder: Path) -> None:
    edit(folder / "config.json", model_type="bert", architectures=["BertForSequenceClassification"], is_decoder=True)
    with pytest.raises(BaseError, match="holds BertForSequenceClassification, which is no causal language model"):
        open_base(folder, torch.float32)


@pytest.mark.parametrize(
    "saved", ["BloomForCausalLM", pytest.param("Gemma3ForConditionalGeneration", marks=pytest.mark.slow)]
)
def test_a_causal_class_is_taken_whatever_other_task_it_serves(folder: Path, saved: str) -> None:
    kind = "bloom" if saved.startswith("Bloom") else "gemma3"
    edit(folder / "config.json", model_type=kind, architectures=[saved])
    with pytest.raises(BaseError) as caught:
        open_base(folder, torch.float32)
    assert "which is no causal language model" not in str(caught.value), "but for its weights, which are a Llama's"


def test_a_body_without_its_head_is_told_by_its_class(folder: Path) -> None:
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model.model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaModel"]
    with pytest.raises(BaseError, match="holds LlamaModel, whose weights are not those of LlamaForCausalLM"):
        open_base(folder, torch.float32)


# Weights that are codes


@pytest.mark.parametrize(
    ("said", "how"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised by fp8"),
        ({"quantization_config": "4bit"}, "quantised"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised to 4 bits"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantised"),
    ],
)
def test_a_quantised_folder_is_refused_with_the_reason(folder: Path, said: dict[str, Any], how: str) -> None:
    edit(folder / "config.json", **said)
    key = next(iter(said.get("text_config", said)))
    with pytest.raises(BaseError, match=rf"its weights are {how} \({key} in config\.json\)"):
        open_base(folder, torch.float32)


@pytest.mark.parametrize(
    ("file", "said", "how"),
    [
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "NVFP4"}},
            r"quantised to NVFP4 \(quantization in hf_quant_config\.json\)",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, r"quantised to 4 bits \(quantize_config\.json\)"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True}, r"quantised to 4 bits \(quant_config\.json\)"),
        (
            "quantization_config.json",
            {"quant_method": "auto-round"},
            r"quantised by auto-round \(quantization_config\.json\)",
        ),
        ("quanto_qmap.json", {"model.layers.0.mlp.up_proj": {"weights": "qint4"}}, r"quantised \(quanto_qmap\.json\)"),
    ],
)
def test_a_folder_with_a_file_about_its_quantising_is_refused(
    folder: Path, file: str, said: dict[str, Any], how: str
) -> None:
    (folder / file).write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(BaseError, match=f"its weights are {how}"):
        open_base(folder, torch.float32)


def test_a_quantization_config_of_nothing_is_none(folder: Path) -> None:
    edit(folder / "config.json", quantization_config=None)
    assert open_base(folder, torch.float32).sites


class Codes(Tensor):
    """A tensor of a kind of its own, as packed weights are."""


def test_a_module_whose_weights_are_codes_is_no_base() -> None:
    numbers = nn.Linear(4, 4)
    numbers.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    packed = nn.Sequential(nn.Linear(4, 4))
    packed[0].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Codes), requires_grad=False)
    for model, path in ((numbers, "weight"), (packed, r"0\.weight")):
        with pytest.raises(BaseError, match=f"'mine': 1 of its weights are quantised, such as {path}"):
            Base.of(model, "mine")


class Packed(nn.Module):
    """A layer as GPTQ's are: codes, zeros and scales are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.ones(2, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 4))


def test_codes_in_buffers_are_told_as_those_in_parameters() -> None:
    narrow = nn.Sequential(nn.Linear(4, 4))
    narrow[0].weight = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    for model, path in ((nn.Sequential(Packed(), nn.Linear(4, 4)), r"0\.qweight"), (narrow, r"0\.weight")):
        with pytest.raises(BaseError, match=f"'mine': 1 of its weights are quantised, such as {path}"):
            Base.of(model, "mine")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_layers_that_torch_has_quantised_are_no_base() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(BaseError, match="'mine': 1 of its weights are quantised, such as 0"):
        Base.of(model, "mine")


class Positions(nn.Module):
    """A layer with tables that are no codes: a mask, and places."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
        self.register_buffer("places", torch.arange(4)[None])


def test_tables_of_masks_and_places_are_no_codes() -> None:
    assert Base.of(nn.Sequential(Positions(), nn.Linear(4, 4)), "mine").sites


def test_a_scale_of_whole_numbers_is_no_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("steps", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    assert Base.of(model, "mine").sites


# Models without a place for an adapter


class BareConfig(PreTrainedConfig):
    model_type = "bare_matrices"
    vocab_size: int = 261


class BareBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class BareForCausalLM(PreTrainedModel):
    """Its one block multiplies by a parameter of its own; its head alone is a linear layer."""

    config_class = BareConfig

    def __init__(self, config: BareConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 16)
        self.block = BareBlock()
        self.lm_head = nn.Linear(16, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.block(self.embed(input_ids))))


def test_a_base_without_a_layer_to_adapt_is_told_when_it_is_opened(tmp_path: Path) -> None:
    AutoConfig.register("bare_matrices", BareConfig, exist_ok=True)
    AutoModelForCausalLM.register(BareConfig, BareForCausalLM, exist_ok=True)
    BareForCausalLM(BareConfig()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseError, match=r"no layer of its blocks is of a kind that can be adapted.*BareBlock"):
        open_base(tmp_path, torch.float32)


# Where weights go


def test_weights_are_read_to_where_the_base_is_to_be(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not through the host's memory. A device without memory stands for a GPU."""
    monkeypatch.setattr(bases, "_device_map", lambda: {"": "meta"})
    assert {parameter.device.type for parameter in open_base(tiny_folder).model.parameters()} == {"meta"}


def test_on_a_machine_with_a_gpu_that_is_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # which is undone, as what is set below is
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert bases._device_map() == {"": "cuda"}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "or the same product may have other bits next time"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    bases._device_map()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bases._device_map() is None


def test_few_tensors_of_a_gpu_are_on_the_host_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory stands for a GPU."""
    asked: list[int | None] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int | None = None):
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(bases, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(bases, "_tensor_bytes", lambda tensor: b"")
    for device in ("cpu", "meta"):
        bases._digest({"weight": torch.empty(2, device=device)})
    assert asked == [None, bases.HOST_COPIES]


def test_all_problems_of_a_folder_are_told_at_once(folder: Path) -> None:
    for spoil in (no_tokenizer, code_of_its_own, pickle_only):
        spoil(folder)
    with pytest.raises(BaseError) as caught:
        open_base(folder, torch.float32)
    assert all(word in str(caught.value) for word in ("no tokenizer", "auto_map", "is a pickle"))


def test_a_text_file_named_gguf_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("not weights", encoding="utf-8")
    with pytest.raises(BaseError, match=r"x\.gguf: not a GGUF file"):
        open_base(tmp_path / "x.gguf")


def test_a_half_copied_gguf_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BaseError, match=r"x\.gguf: cannot be converted"):
        open_base(tmp_path / "x.gguf")
    assert not (tmp_path / "cache").exists()


def test_an_unknown_name_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(BaseError) as caught:
        open_base("some-model")
    assert all(name in str(caught.value) for name in ("some-model", "folder", ".gguf", *BUILTIN, "ORG/NAME"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("./no/such", "there is no such folder"),
        ("mine/questions.ndjson", "is data, not a base: give the base first, then the data"),
        ("mine/model.safetensors", "is a file of weights, not a base: name the folder it is in"),
        ("builtin", "is data, not a base: give the base first, then the data"),
        ("no.gguf", "there is no such file"),
    ],
)
def test_a_name_that_is_no_base_is_told_what_it_may_have_meant(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for file in ("questions.ndjson", "model.safetensors"):
        (tmp_path / "mine" / file).touch()
    with pytest.raises(BaseError, match=said):
        open_base(name)
