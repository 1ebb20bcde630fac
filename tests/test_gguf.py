"""GGUF files of several architectures, written here from tiny models, open as what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import SPECIAL, TEMPLATE
from tokenizers import pre_tokenizers
from torch import Tensor

from lorafit.bases import progress
from lorafit.bases.base import Base, open_base
from lorafit.bases.gguf import Header, llama3_factors, take_over
from lorafit.errors import BaseError

gguf = pytest.importorskip("gguf")

WIDTHS = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q and k as llama.cpp keeps them: the two halves that turn together stand side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def as_llama(name: str, tensor: Tensor, config: Any) -> Tensor:
    if "attn_q.weight" in name:
        return interleaved(tensor, config.num_attention_heads)
    return interleaved(tensor, config.num_key_value_heads) if "attn_k.weight" in name else tensor


def as_gemma(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Norms hold 1 + weight."""
    return tensor + 1 if "norm" in name else tensor


def as_gpt2(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Conv1D holds its weight as (in, out)."""
    return tensor.T if tensor.dim() == 2 and name.startswith("blk.") else tensor


def as_they_are(name: str, tensor: Tensor, config: Any) -> Tensor:
    return tensor


# architecture: configuration, what llama.cpp's converter does to the weights
KINDS: dict[str, tuple[str, dict[str, Any], Callable[[str, Tensor, Any], Tensor]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}, as_llama),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, as_they_are),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}, as_they_are),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 32}, as_gemma),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 32}, as_gemma),
    "phi3": (
        "Phi3",
        {
            "tie_word_embeddings": False,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        },
        as_they_are,
    ),
    "starcoder2": ("Starcoder2", {"use_bias": True, "sliding_window": 16}, as_they_are),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, as_gpt2),
    "qwen3moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "tie_word_embeddings": False}, as_they_are),
    "stablelm": ("StableLm", {"tie_word_embeddings": False, "partial_rotary_factor": 0.25}, as_they_are),
}


def tiny(architecture: str) -> Any:
    """A model of random weights, none of them where it began."""
    name, more, _ = KINDS[architecture]
    if architecture == "gpt2":
        more = {**more, "vocab_size": 262, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": 256}
    config = getattr(transformers, f"{name}Config")(**({} if architecture == "gpt2" else WIDTHS) | more)
    kind = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def written(
    model: Any,
    architecture: str,
    path: Path,
    kind: Any = None,
    extra: Mapping[str, Tensor] | None = None,
    without: str = "",
    says: Mapping[str, float] | None = None,
) -> Path:
    """A GGUF file of the model. kind: how matrices are quantised, F32 by default; extra: further tensors; without: one
    tensor left out; says: further numbers about the model."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    writer.add_context_length(128)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope.get("full_attention", rope).get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
    writer.add_layer_norm_eps(1e-5)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if "moe" in architecture:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*alphabet, *SPECIAL, "ab"])
    writer.add_token_types([1] * len(alphabet) + [3] * len(SPECIAL) + [1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(256)
    writer.add_chat_template(TEMPLATE)
    for key, value in (says or {}).items():
        writer.add_float32(f"{architecture}.{key}", value)
    for name, tensor in {**in_file(model, architecture), **(extra or {})}.items():
        if name == without:
            continue
        array = np.ascontiguousarray(tensor.detach().float().numpy())
        if kind is not None and array.ndim > 1:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_file(model: Any, architecture: str) -> dict[str, Tensor]:
    """The tensors under their names in the file, changed as llama.cpp's converter changes them."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for name, tensor in dict(model.named_parameters()).items():
        new = names.get_name(name, (".weight", ".bias"))
        if new is None and name.endswith("experts.gate_up_proj"):
            prefix = f"blk.{name.split('.')[2]}.ffn_"
            found[f"{prefix}gate_exps.weight"], found[f"{prefix}up_exps.weight"] = tensor.chunk(2, 1)
            continue
        if new is not None and name.endswith("experts.down_proj"):
            new += ".weight"
        assert new is not None, name
        found[new] = KINDS[architecture][2](new, tensor, model.config)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def converted(path: Path) -> Base:
    return open_base(path, torch.float32)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_file_opens_as_the_model_it_was_written_from(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    base = converted(written(model, architecture, tmp_path / "x.gguf"))
    have = dict(base.model.named_parameters())
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(have[name], tensor, rtol=0, atol=1e-6, msg=name)
    torch.testing.assert_close(logits(base.model), logits(model), rtol=1e-4, atol=1e-4)
    assert base.tokenizer.decode(base.tokenizer("abc")["input_ids"]) == "abc"
    assert base.tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_quantised_weights_are_those_of_the_file(architecture: str, kind: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    base = converted(written(model, architecture, tmp_path / "x.gguf", quantised))
    have = in_file(base.model, architecture)
    for name, tensor in in_file(model, architecture).items():
        array = np.ascontiguousarray(tensor.detach().numpy())
        stored = gguf.dequantize(gguf.quantize(array, quantised), quantised) if array.ndim > 1 else array
        torch.testing.assert_close(have[name], torch.from_numpy(stored), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("layers", "scale"), [(42, 256), (46, 144)])
def test_the_scale_of_attention_of_the_largest_gemma_is_its_own(layers: int, scale: int) -> None:
    """The sizes are those of gemma-2-9b and gemma-2-27b, as their configurations give them."""
    config = transformers.Gemma2Config(hidden_size=4608, num_attention_heads=32, head_dim=128)
    take_over(Header("gemma2", {}, {}, {"block_count": layers, "attention.key_length": 128}), config)
    assert config.query_pre_attn_scalar == scale


def test_positions_stretched_as_llama_3_does_are_taken_over(tmp_path: Path) -> None:
    """llama.cpp keeps a tensor of factors, which transformers passes over."""
    rule = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 500_000.0, **rule}
    model = type(model)(model.config).eval()
    factors = llama3_factors(500_000.0, 16, **rule)
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)  # of transformers
    base = converted(written(model, "llama", tmp_path / "x.gguf", extra={"rope_freqs.weight": factors}))
    assert base.model.model.rotary_emb.inv_freq.equal(model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(logits(base.model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": {"rope_freqs.weight": torch.full((8,), 3.0)}}, "positions are stretched by rope_freqs.weight"),
        ({"says": {"rope.scaling.factor": 8.0}}, "positions are stretched by rope.scaling.factor = 8.0"),
        ({"extra": {"blk.0.odd": torch.ones(7)}}, "numbers, and transformers makes of it a model"),
        ({"without": "blk.1.ffn_down.weight"}, "finds no values.*model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_file_that_would_open_as_something_else_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(BaseError, match=said):
        converted(written(tiny("llama"), "llama", tmp_path / "x.gguf", **change))
    assert not list((cache / "bases").iterdir())


def test_words_of_a_converted_file_have_rows_as_those_of_a_folder_do(tmp_path: Path) -> None:
    base = converted(written(tiny("llama"), "llama", tmp_path / "x.gguf"))
    beyond = [token for i, token in base.tokenizer.added_tokens_decoder.items() if i >= 262]
    assert beyond and all(token.special for token in beyond), "transformers adds what the file does not have"
    base.tokenizer.add_tokens(["gangway"])
    base.tokenizer.save_pretrained(base.folder)
    with pytest.raises(BaseError, match=r"1 tokens beyond the 262 rows of its model's embedding \('gangway' is 263\)"):
        converted(tmp_path / "x.gguf")


def test_an_architecture_that_transformers_does_not_read_is_named_with_those_it_does(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BaseError, match=r"architecture 'rwkv7'.*it reads .*gemma3.*llama.*qwen3"):
        converted(tmp_path / "x.gguf")


def test_what_does_not_fit_the_disk_is_not_begun(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "free_bytes", lambda folder: 1000)
    with pytest.raises(BaseError, match=r"0\.4 MB are needed and 0\.0 MB are free.*LORAFIT_CACHE"):
        converted(written(tiny("llama"), "llama", tmp_path / "x.gguf"))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(BaseError, match=r"file/x/bases: converted bases cannot be written there.*LORAFIT_CACHE"):
        converted(written(tiny("llama"), "llama", tmp_path / "x.gguf"))


def test_size_and_progress_of_a_conversion_are_told(tmp_path: Path, cache: Path) -> None:
    told: list[str] = []
    seen: list[tuple[Any, ...]] = []
    file = written(tiny("llama"), "llama", tmp_path / "x.gguf")
    base = open_base(file, torch.float32, told.append, lambda *moment: seen.append(moment))
    assert base.name == str(file)
    assert ["llama" in told[0], "0.4 MB" in told[0], str(cache) in told[0]] == [True] * 3
    assert {(what, unit) for what, _, _, unit in seen} == {
        ("converting weights", "tensors"),
        ("loading weights", "tensors"),
        ("writing safetensors", "files"),
    }
    assert seen[-1][1] == seen[-1][2]
    open_base(file, torch.float32, told.append)
    assert len(told) == 1  # converted once
