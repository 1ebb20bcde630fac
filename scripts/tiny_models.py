"""Tiny models of every class that transformers maps for text, images, speech and both: random weights, and an input.

A class is built from its default configuration with the widths, depths and vocabularies made small. Where the small
numbers do not go together, only the depth and the vocabulary are; where that is too large, the class is not built.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

# By family, the tables of transformers that name its classes. A class is listed where it stands first.
FAMILIES: dict[str, tuple[str, ...]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM",),
    "encoders": ("MODEL_FOR_MASKED_LM", "MODEL_FOR_TEXT_ENCODING"),
    "encoder-decoders": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": (
        "MODEL_FOR_IMAGE_CLASSIFICATION",
        "MODEL_FOR_SEMANTIC_SEGMENTATION",
        "MODEL_FOR_UNIVERSAL_SEGMENTATION",
        "MODEL_FOR_OBJECT_DETECTION",
        "MODEL_FOR_DEPTH_ESTIMATION",
        "MODEL_FOR_VIDEO_CLASSIFICATION",
        "MODEL_FOR_MASKED_IMAGE_MODELING",
    ),
    "speech": (
        "MODEL_FOR_CTC",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ",
        "MODEL_FOR_AUDIO_CLASSIFICATION",
        "MODEL_FOR_TEXT_TO_SPECTROGRAM",
        "MODEL_FOR_TEXT_TO_WAVEFORM",
    ),
    "multimodal": (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
        "MODEL_FOR_MULTIMODAL_LM",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
        "MODEL_FOR_VISUAL_QUESTION_ANSWERING",
    ),
}
WIDTH, HEADS, VOCABULARY, FIRST_SPECIAL = 64, 4, 192, 128
LARGEST = 70_000_000  # parameters of a model that is built
DEEPEST = 40  # layers of a model whose configuration names some of them, as those do whose features are taken within
# By the end of a setting's name, what it becomes. The first that fits counts; None leaves it as it is.
Rules = tuple[tuple[str, int | None], ...]
SMALL: Rules = (
    (r"(num_)?(kv|key_value)_(heads|groups)|num_kv_heads|num_key_value_heads|multi_query_group_num", 2),
    (r"num_attention_heads_per_layer|mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads", None),
    (r"(num_|n_|encoder_|decoder_)*(attention_)?heads?|n_head|num_attention_heads", HEADS),
    (r"qk_head_dim", 32),
    (r"(.*_)?head_dim|rotary_dim|kv_channels|d_kv|d_head", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"n_group|topk_group|n_groups", 1),
    (r"num_experts_per_tok(ken)?|top_?k|moe_topk|moe_top_k|moe_k|num_experts_per_token", 2),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"vocab_size|text_vocab_size|vocabulary_size|audio_vocab_size", VOCABULARY),
    (r"num_mel_bins|feature_size|type_vocab_size|vocab_size_per_layer_input", None),
    (r"hidden_size_per_layer_input|embedding_dim_per_layer", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|d_inner|inner_dim|feedforward_dim|mlp_dim)|n_inner", 96),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|projection_dim|proj_dim|model_dim)",
        WIDTH,
    ),
    (r"dim|emb_dim|width|d_embed|n_embed|d_embedding|lru_width|output_dim|out_hidden_size|mm_hidden_size", WIDTH),
    (r"max_source_positions", 32),
    (r"max_(.*_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length", 128),
    (r"image_size|img_size|crop_size", 32),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|decoder_sparse_step", 1),
)
EQUAL: Rules = ((SMALL[0][0], HEADS), *SMALL[1:])  # as many heads of keys and values as of queries
SHALLOW: Rules = (
    (r"type_vocab_size|vocab_size_per_layer_input", None),
    (r"(.*_)?vocab_size", VOCABULARY),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"n_group|topk_group", 1),
    (r"num_experts_per_tok|top_?k|moe_topk", 2),
)
DEEP = r"(num_|n_|encoder_|decoder_|(.*)_)?(hidden_)?layers?(_num)?|depth|num_hidden_layers|num_blocks"
# What a family needs besides, by model type.
BESIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True, eq=False)
class Tiny:
    """A model, and what it is run on: arguments, by the name of the method that takes them.
    default() makes the configuration that its own was made small from."""

    family: str
    model: PreTrainedModel
    default: Callable[[], Any]
    given: Mapping[str, Mapping[str, Any]]

    def forward(self) -> Tensor:
        """All that the model gives, as one tensor (N,)."""
        return self.of(self.model)

    def of(self, model: nn.Module) -> Tensor:
        """The same of a copy."""
        return torch.cat([_flat(_call(getattr(model, name), given)) for name, given in self.given.items()])


def classes() -> dict[str, tuple[str, str]]:
    """By the name of a class, its family and the type of its configuration, in the order of the tables."""
    found: dict[str, tuple[str, str]] = {}
    for family, tables in FAMILIES.items():
        for table in tables:
            for model_type, names in getattr(modeling_auto, f"{table}_MAPPING_NAMES").items():
                for name in (names,) if isinstance(names, str) else names:
                    if name not in found:
                        found[name] = (family, model_type)
    return found


def built(name: str) -> Tiny:
    """A tiny model of the class with this name. Raises whatever keeps it from being built or run."""
    family, model_type = classes()[name]
    cls = getattr(transformers, name)
    problems = []
    for rules, depth in ((SMALL, 2), (EQUAL, 2), (SMALL, DEEPEST), (SHALLOW, 2)):
        try:
            model = _model(cls, config_of(model_type, rules, depth, cls.config_class))
            given = _given(model)
        except Exception as error:  # a configuration whose numbers do not go together may raise anything
            problems.append(f"{type(error).__name__}: {error}")
            continue
        return Tiny(family, model, type(model.config), given)
    raise ValueError(problems[0])


def config_of(model_type: str, rules: Rules, depth: int, wanted: Any = None) -> Any:
    """The default configuration of a type with its numbers made small, and at most so many layers."""
    of = CONFIG_MAPPING[model_type]
    if wanted is not None and not issubclass(of, wanted) and not issubclass(wanted, of):
        of = wanted
    settings = of().to_dict()
    _shrink(settings, rules, depth)
    settings |= BESIDES.get(model_type, {})
    for key in ("transformers_version", "architectures"):
        settings.pop(key, None)
    return of(**settings)


def _shrink(settings: dict[str, Any], rules: Rules, most: int) -> None:
    depth = _depth(settings) if most == 2 else most
    special = iter(range(FIRST_SPECIAL, VOCABULARY))
    layers = next((settings[key] for key in ("num_hidden_layers", "num_layers", "n_layer") if key in settings), None)
    for key, value in settings.items():
        if key in ("id2label", "label2id", "num_feat_extract_layers") or not isinstance(key, str):
            continue
        if key == "per_layer_config" and value:
            settings[key] = {layer: dict(own) for layer, own in value.items() if int(layer) < depth}
            for own in settings[key].values():
                _shrink(own, rules, most)
        elif isinstance(value, dict):
            _shrink(value, rules, most)
        elif key.endswith(("_token_id", "_token_index", "_id")) and isinstance(value, int):
            settings[key] = value if 0 <= value < 3 or value < 0 else next(special)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            if re.fullmatch(DEEP, key):
                settings[key] = min(value, depth)
                continue
            settings[key] = _shrunk(key, value, rules)
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            settings[key] = value[:depth]
            if all(type(one) is int for one in value):
                settings[key] = [_shrunk(key, one, rules) for one in settings[key]]
        elif isinstance(value, list) and rules is SMALL:
            settings[key] = _small_list(key, value)
    if isinstance(rope := settings.get("rope_parameters"), dict) and "mrope_section" in rope:
        rope["mrope_section"] = [2, 3, 3]


def _shrunk(key: str, value: int, rules: Rules) -> int:
    new = next((new for pattern, new in rules if re.fullmatch(pattern, key)), None)
    return value if new is None or value == 0 else min(value, new) if new > 16 else new


def _depth(settings: Mapping[str, Any]) -> int:
    """Two layers, or as many as it takes to have one of each type, but at most six."""
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types: list[str] | None = settings.get(key)
        if types:
            return max(2, *(types.index(one) + 1 for one in set(types) if types.index(one) < 6))
    return 2


def _small_list(key: str, value: list[Any]) -> list[Any]:
    if not value or not all(type(one) is int for one in value):
        return value
    if key in ("depths", "layers", "num_blocks", "depth"):
        return [1] * len(value)
    if re.fullmatch(r"(.*_)?(hidden_sizes|embed_dims?|embedding_dims|conv_dim|tdnn_dim|dims|neck_hidden_sizes)", key):
        by = max(1, 1 << int(math.log2(max(1, min(value) / 16))))
        return [one // by for one in value] if all(one % by == 0 for one in value) else value
    return value


def _model(cls: Any, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest model has {size:,} parameters, more than {LARGEST:,}")
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config).eval()
    _randomise(model)
    return model.requires_grad_(False)


def _randomise(model: nn.Module) -> None:
    """Weights that let a signal through: fresh ones may be so small, or zero, that nothing an adapter does is seen."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            plain = name in ("weight", "in_proj_weight", "gate_up_proj", "up_proj", "down_proj")
            if parameter.ndim > 1 and (plain or not parameter.any()):
                inputs = parameter.shape[-1] if parameter.ndim != 4 else parameter[0].numel()
                std = 0.5 if isinstance(module, nn.Embedding) else max(1, inputs) ** -0.5
                parameter.data.normal_(0, std, generator=generator)


def _given(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The first input that the model takes, and of its towers where they can be run on their own."""
    found, problems = {}, ["no input is known for it"]
    tries = {"forward": _inputs(model), "get_image_features": _images(model), "get_audio_features": _audio(model)}
    for name, inputs in tries.items():
        function = getattr(model, name, None)
        if function is None:
            continue
        for given in inputs:
            try:
                if _flat(_call(function, given)).numel():
                    found[name] = given
                    break
            except Exception as error:  # a class that does not take this input may raise anything
                problems.append(f"{type(error).__name__}: {error}")
        if name not in found and name == "forward":
            raise ValueError(problems[-1])
    return found


def _call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    return function(**given)


def _flat(value: Any) -> Tensor:
    """Every number that depends on the weights, as one tensor."""
    parts = [one.float().flatten() for one in _tensors(value)]
    flat = torch.cat(parts) if parts else torch.zeros(0)
    return torch.nan_to_num(flat, 0.0, 0.0, 0.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            if "past_key_values" not in name and "cache" not in name:
                yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _ids(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, FIRST_SPECIAL - 1, (rows, length), generator=torch.Generator().manual_seed(3))


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try, as the arguments of the forward say what they may be."""
    named = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in named else {}
    if "decoder_input_ids" in named:
        more["decoder_input_ids"] = _ids(2 * _setting(model.config, "num_codebooks", default=1), 8)
    text = {"input_ids": _ids()} | ({"bbox": torch.ones(2, 16, 4, dtype=torch.int64)} if "bbox" in named else {})
    main = model.main_input_name
    if "input_ids" in named and main != "pixel_values":
        for images in _images(model) if "pixel_values" in named and main == "input_ids" else ():
            yield {**text, **more, **images}
        yield {**text, **more}
        if books := _setting(model.config, "num_codebooks", default=0):
            yield {**more, "input_ids": _ids(2 * books)}
        yield text
    if "pixel_values" in named:
        for images in _images(model):
            yield {**images, **more}
            yield {**images, **more, **text}
    for name in ("input_values", "input_features"):
        for sounds in _sounds(model, name) if name in named else ():
            yield {name: sounds, **more}
            yield {name: sounds, **more, **text}


def _setting(config: Any, *names: str, default: int) -> int:
    for one in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for name in names:
            value = getattr(one, name, None)
            value = max(value) if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value:
                return value
    return default


def _images(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    config = model.config
    channels = _setting(config, "num_channels", "in_channels", default=3)
    side = _setting(config, "image_size", "img_size", default=64)
    frames = _setting(config, "num_frames", default=4)
    for size in dict.fromkeys((side, 64, 224)):
        yield {"pixel_values": _numbers(2, channels, size, size)}
        yield {"pixel_values": _numbers(1, frames, channels, size, size)}


def _sounds(model: PreTrainedModel, name: str) -> Iterator[Tensor]:
    config = model.config
    bins = _setting(config, "num_mel_bins", "feature_size", "input_dim", default=80)
    frames = _setting(config, "max_length", default=64)
    positions = _setting(config, "max_source_positions", default=32)
    if name == "input_values":
        yield _numbers(2, 2000)
        yield _numbers(2, frames, bins)
        yield _numbers(2, 1, 2000)
    yield _numbers(2, bins, 2 * positions)
    yield _numbers(2, 64, bins)


def _audio(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    for name in ("input_features", "input_values"):
        for sounds in _sounds(model, name):
            yield {name: sounds}
