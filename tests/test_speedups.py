"""Every speed-up computes what the plain way does: packing, sites together, the head in chunks, nothing below a site.

Bounds: fp32 1e-5 relative. bf16 keeps 8 bits of each number: its bounds are stated at each test.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import LowRank, Plan, uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment import packing as packs
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base
from lorafit.data.batches import PACK_STEP
from lorafit.data.render import Row
from lorafit.errors import Interrupted
from lorafit.planning.rules import all_linear
from lorafit.tasks import forward, probe
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import batch_of, token_nll
from lorafit.tasks.probe import mode_of
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.testing import random_adapter
from lorafit.training.loop import Moment, train
from lorafit.training.recipe import Recipe
from lorafit.variants import lora

APART = ForwardMode(separate_head=True, packed=False)
PACKED = ForwardMode(separate_head=True, packed=True)
FP32, BF16 = torch.float32, torch.bfloat16
BOTH = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


pytestmark = pytest.mark.usefixtures("one_thread")


def row_of(n: int, trained: int | None = None, seed: int = 0) -> Row:
    """n random tokens, of which the last `trained` carry loss (all but the first, where not given)."""
    ids = torch.randint(2, 200, (n,), generator=torch.Generator().manual_seed(1000 * seed + n)).tolist()
    first = 1 if trained is None else n - trained
    return Row(tuple(ids), tuple(i >= first for i in range(n)), seed)


def rows_of(*lengths: int) -> list[Row]:
    return [row_of(n, seed=i) for i, n in enumerate(lengths)]


def config(**settings: Any) -> dict[str, Any]:
    return settings


LLAMA = config(
    vocab_size=200,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
GPT2 = config(
    vocab_size=200,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=512,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=1,
)
MANY_HEADS = {**LLAMA, "num_key_value_heads": 4}
NO_GROUPS = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
WIDE = {**LLAMA, "head_dim": 16}
EXPERTS = config(num_local_experts=4, num_experts_per_tok=2)
SMALL_EXPERTS = config(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def base_of(family: str, settings: dict[str, Any], dtype: torch.dtype = FP32) -> Base:
    """A tiny model whose matrices are large enough for attention to look at some tokens more than at others."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=FP32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            elif parameter.ndim == 1 and not parameter.any():  # biases start at zero, and would hide
                parameter.normal_(0, 0.1)
    return Base.of(model.to(dtype), family)


def adapter_of(base: Base) -> Adapter:
    """Mixed ranks and scales on every site but the head, all of it acting."""
    sites = all_linear(base) or base.sites
    ranks = [min(1 + i % 4, site.d_in, site.d_out) for i, site in enumerate(sites)]
    slots = [LowRank(site, rank, 2.0 + i % 3) for i, (site, rank) in enumerate(zip(sites, ranks, strict=True))]
    return random_adapter(base, Plan(tuple(slots)))


def nll_of(base: Base, batches: Sequence[Sequence[Row]], way: ForwardMode) -> Tensor:
    with torch.no_grad(), packing(base, way.packed):
        return torch.cat([token_nll(base, batch_of(base, rows, way), way) for rows in batches])


def gradient_of(
    base: Base, adapter: Adapter, batches: Sequence[Sequence[Row]], way: ForwardMode, before: int = 1
) -> Tensor:
    """The gradient of a step after `before` forwards, in which sites that share their input have been found."""
    state = TrainState(adapter, base.device)
    parts = [batch_of(base, rows, way) for rows in batches]
    with attach(base, state), packing(base, way.packed):
        for _ in range(before):
            token_nll(base, parts[0], way)
        Runner(base, COMPLETION, way).gradient(parts)
    assert state.master.grad is not None
    return state.master.grad


def assert_near(found: Tensor, expected: Tensor, within: float) -> None:
    assert expected.float().norm() > 0
    assert (found - expected).float().norm() <= within * expected.float().norm()


# Packing

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shared heads": ("llama", LLAMA),
    "own heads": ("llama", MANY_HEADS),
    "window": ("mistral", {**LLAMA, "sliding_window": 16}),
    "some windows": (
        "gemma3_text",
        {**WIDE, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bias": ("qwen2", LLAMA),
    "learned positions": ("gpt2", GPT2),
    # Without experts: which of them answer would turn on rounding, and jump.
    "narrow values": (
        "deepseek_v3",
        {
            **MANY_HEADS,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    ),
}
ROWS = {
    "one trained token": [row_of(12, 1), row_of(30, 1, 1), row_of(2, 1, 2)],
    "equal lengths": rows_of(24, 24, 24),
    "around SHORT": rows_of(packs.SHORT - 1, packs.SHORT, packs.SHORT + 1, packs.SHORT + 2, packs.SHORT),
    "many lengths": rows_of(40, 38, 3, 2, 90, 100, 60, 200, 77),
    "one row": rows_of(45),
}
EVERY_BASE = pytest.mark.parametrize("name", BASES)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@EVERY_BASE
def test_packed_nll_is_that_of_each_row_alone_and_of_padded_rows(name: str, rows: list[Row]) -> None:
    base = base_of(*BASES[name])
    alone = nll_of(base, [[row] for row in rows], PLAIN)
    padded, packed = (nll_of(base, [rows], way) for way in (APART, PACKED))
    assert torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)
    assert torch.allclose(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@EVERY_BASE
def test_in_bf16_packed_rows_are_as_near_to_the_truth_as_padded_ones(name: str, rows: list[Row]) -> None:
    """Each errs by its own rounding; packing at most one and a half times as much, and 2^-8."""
    truth = nll_of(base_of(*BASES[name]), [[r] for r in rows], PLAIN)
    base = base_of(*BASES[name], BF16)
    padded, packed = ((nll_of(base, [rows], way) - truth).square().mean().sqrt() for way in (APART, PACKED))
    assert packed <= 1.5 * padded + 2**-8
    assert packed <= 0.1


def test_rows_of_several_groups_and_kernels_have_been_packed() -> None:
    """Of the row sets above: else those tests would prove little."""
    groups = {
        key: packs.Segments(tuple(len(r.ids) for r in rows), torch.device("cpu")).groups for key, rows in ROWS.items()
    }
    assert [g.count for g in groups["equal lengths"]] == [3]
    assert groups["equal lengths"][0].places is None
    assert [(g.count, g.width) for g in groups["around SHORT"]] == [(2, 128), (1, 129), (1, 130), (1, 128)]
    assert groups["around SHORT"][0].places is not None
    assert [g.count for g in groups["many lengths"]] == [2, 1, 1, 2, 1, 1, 1]


def test_in_bf16_on_a_processor_a_pack_is_filled_up_behind_its_rows() -> None:
    base = base_of("llama", LLAMA, BF16)
    batch = batch_of(base, rows_of(20, 25), PACKED)
    assert batch.ids.shape == (1, 2 * PACK_STEP)
    assert batch.segments is not None
    assert batch.segments.lengths == (20, 25, 19)
    assert batch.rows == 2
    assert batch.owner.unique().tolist() == [0, 1]


def test_the_first_token_of_a_row_is_not_predicted_from_the_row_before() -> None:
    base, rows = base_of("llama", LLAMA), [replace(row, trained=(True,) * len(row.ids)) for row in rows_of(20, 30)]
    packed, alone = nll_of(base, [rows], PACKED), nll_of(base, [[row] for row in rows], PLAIN)
    assert len(packed) == 19 + 29
    assert torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)


@BOTH
@EVERY_BASE
def test_a_token_of_one_row_changes_nothing_in_another_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    base, rows = base_of(*BASES[name], dtype), rows_of(40, 38, 150, 7)
    before = batch_of(base, rows, PACKED)
    for i, row in enumerate(rows):
        other = replace(row, ids=(*row.ids[:2], 199 - row.ids[2], *row.ids[3:]))
        after = batch_of(base, [*rows[:i], other, *rows[i + 1 :]], PACKED)
        with torch.no_grad(), packing(base):
            one, two = (token_nll(base, batch, PACKED) for batch in (before, after))
        assert torch.equal(one[before.owner != i], two[before.owner != i])
        assert not torch.equal(one[before.owner == i][2:], two[before.owner == i][2:])


@EVERY_BASE
def test_the_loss_of_one_row_has_no_gradient_at_the_tokens_of_another(name: str) -> None:
    base, rows = base_of(*BASES[name]), rows_of(40, 38, 150, 7)
    kept: list[Tensor] = []
    base.model.requires_grad_(False)
    assert isinstance(base.model, PreTrainedModel)
    base.model.get_input_embeddings().register_forward_hook(lambda m, x, y: kept.append(y.requires_grad_()))
    batch = batch_of(base, rows, PACKED)
    assert batch.segments is not None
    with packing(base):
        nll = token_nll(base, batch, PACKED)
    for i, length in enumerate(batch.segments.lengths):
        (gradient,) = torch.autograd.grad(nll[batch.owner == i].sum(), kept[0], retain_graph=True)
        per_row = gradient[0].split(batch.segments.lengths)
        assert all(not part.any() for j, part in enumerate(per_row) if j != i)
        assert per_row[i].any(-1).sum() == length - 1  # what follows the last token does not count


def test_evaluation_gives_each_example_the_mean_it_has_alone() -> None:
    base, rows = base_of("llama", LLAMA), rows_of(40, 38, 150, 7)
    found = Runner.of(base, rows).nll(rows)
    alone = [float(nll_of(base, [[row]], PLAIN).mean()) for row in rows]
    assert mode_of(base, rows).packed
    assert found == pytest.approx(alone, rel=1e-5)


CUTS: dict[str, Callable[[list[Row]], list[list[Row]]]] = {
    "one by one": lambda rows: [[row] for row in rows],
    "first alone": lambda rows: [rows[:1], rows[1:]],
    "halves": lambda rows: [rows[::2], rows[1::2]],
    "backwards": lambda rows: [rows[::-1]],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@EVERY_BASE
def test_any_split_of_a_packed_step_gives_the_gradient_of_the_whole_padded_batch(
    name: str, cut: Callable[[list[Row]], list[list[Row]]]
) -> None:
    base, rows = base_of(*BASES[name]), [row_of(40, 3), *rows_of(38, 150, 7), row_of(20, 1, 9)]
    adapter = adapter_of(base)
    assert_near(gradient_of(base, adapter, cut(rows), PACKED), gradient_of(base, adapter, [rows], PLAIN), 1e-5)


@EVERY_BASE
def test_in_bf16_the_packed_gradient_is_as_near_to_the_truth_as_the_padded_one(name: str) -> None:
    """Within one and a half times the padded gradient's distance from that in fp32."""
    base, low, rows = base_of(*BASES[name]), base_of(*BASES[name], BF16), rows_of(40, 38, 150, 7)
    adapter = adapter_of(base)
    truth, same = gradient_of(base, adapter, [rows], PLAIN), Adapter(adapter.plan, adapter.tensors, low.identity)
    padded, packed = ((gradient_of(low, same, [rows], way) - truth).norm() for way in (PLAIN, PACKED))
    assert packed <= 1.5 * padded
    assert packed <= 0.2 * truth.norm()


def test_the_configuration_is_as_before_after_packing_also_after_an_error() -> None:
    base = base_of("llama", LLAMA)
    before = base.model.config._attn_implementation
    with pytest.raises(KeyError), packing(base):
        assert base.model.config._attn_implementation == packs.NAME
        raise KeyError
    assert base.model.config._attn_implementation == before


def test_configurations_within_a_configuration_are_as_before_too() -> None:
    class Outer(LlamaConfig):
        sub_configs: ClassVar = {"text_config": LlamaConfig}

    base = base_of("llama", LLAMA)
    outer = base.model.config = Outer(**LLAMA)
    outer.text_config = LlamaConfig(**LLAMA)
    outer._attn_implementation = {"": "sdpa", "text_config": "eager"}
    with packing(base):
        assert outer._attn_implementation == outer.text_config._attn_implementation == packs.NAME
    assert (outer._attn_implementation, outer.text_config._attn_implementation) == ("sdpa", "eager")


# Families: what is packed, what is not, and that each computes what it does plainly

NOT_APART, PADDED, APART_AND_PACKED = ForwardMode(False, True), ForwardMode(True, False), ForwardMode(True, True)
FAMILIES: dict[str, tuple[dict[str, Any], ForwardMode]] = {
    "llama": (LLAMA, APART_AND_PACKED),
    "mistral": ({**LLAMA, "sliding_window": 16}, APART_AND_PACKED),
    "ministral": ({**WIDE, "sliding_window": 16}, APART_AND_PACKED),
    "mixtral": ({**LLAMA, **EXPERTS}, APART_AND_PACKED),
    "qwen2": (LLAMA, APART_AND_PACKED),
    "qwen3": (WIDE, APART_AND_PACKED),
    "qwen3_moe": ({**WIDE, **SMALL_EXPERTS}, APART_AND_PACKED),
    "gemma": (WIDE, APART_AND_PACKED),
    "gemma3_text": ({**WIDE, "sliding_window": 16}, APART_AND_PACKED),
    "phi": (NO_GROUPS, APART_AND_PACKED),
    "phi3": (LLAMA, APART_AND_PACKED),
    "gpt2": (GPT2, APART_AND_PACKED),
    "gpt_bigcode": (GPT2, APART_AND_PACKED),
    "gpt_neox": (NO_GROUPS, APART_AND_PACKED),
    "opt": (
        config(
            vocab_size=200,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            dropout=0.0,
            word_embed_proj_dim=32,
            max_position_embeddings=512,
            pad_token_id=0,
        ),
        APART_AND_PACKED,
    ),
    "olmo2": (LLAMA, APART_AND_PACKED),
    "olmo3": ({**LLAMA, "sliding_window": 16}, APART_AND_PACKED),
    "starcoder2": (LLAMA, APART_AND_PACKED),
    "smollm3": (LLAMA, APART_AND_PACKED),
    "glm4": (WIDE, APART_AND_PACKED),
    "exaone4": ({**LLAMA, "sliding_window": 16}, APART_AND_PACKED),
    "ernie4_5": (LLAMA, APART_AND_PACKED),
    "deepseek_v3": ({**BASES["narrow values"][1], "first_k_dense_replace": 1}, APART_AND_PACKED),
    # Logits scaled after the head: the head is not run apart.
    "granite": ({**LLAMA, "logits_scaling": 4.0}, NOT_APART),
    "cohere": (LLAMA, NOT_APART),
    "cohere2": ({**LLAMA, "sliding_window": 16}, NOT_APART),
    # Scores that are capped, or have a place to look at nothing.
    "gemma2": ({**WIDE, "sliding_window": 16}, PLAIN),
    "gpt_oss": ({**WIDE, **EXPERTS, "sliding_window": 16}, PADDED),
    # Limits that only the mask tells; no row of the probe is as long.
    "llama4_text": ({**WIDE, **EXPERTS, "attention_chunk_size": 100, "intermediate_size_mlp": 48}, PLAIN),
    "phimoe": ({**LLAMA, **EXPERTS, "sliding_window": 100}, PADDED),
    # Distances by a bias, or positions that the model counts itself.
    "bloom": (config(vocab_size=200, hidden_size=32, n_layer=2, n_head=4), PADDED),
    "mpt": (config(vocab_size=200, d_model=32, n_layers=2, n_heads=4, max_seq_len=512), PADDED),
    "falcon": (config(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True), PADDED),
    # Attention of their own that hands no segments on.
    "gpt_neo": (
        config(
            vocab_size=200,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=16,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512,
        ),
        PADDED,
    ),
    "gptj": ({**GPT2, "rotary_dim": 4}, PADDED),
    "stablelm": (LLAMA, PADDED),
    # A state that runs from token to token.
    "mamba": (config(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=8), PADDED),
    "rwkv": (config(vocab_size=200, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), PADDED),
    "lfm2": ({**LLAMA, "full_attn_idxs": [1]}, PADDED),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
FAMILY_ROWS = rows_of(20, 33, 150, 7)
SENTENCES = (
    "The workshop opens at eight on weekdays; ring twice, for the bell is old and the door is heavy.",
    "Which of the two ladders may I keep over the weekend, and what does the longer one cost?",
)


@BOTH
@EVERY_FAMILY
def test_how_a_family_may_be_run_is_known_in_every_dtype(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, way = FAMILIES[family]
    base = base_of(family, settings, dtype)
    before = base.integrity()
    assert mode_of(base, FAMILY_ROWS) == way
    monkeypatch.setattr(probe, "COPIED", 1)  # one block in fp32, as of a large base in bf16
    assert mode_of(base, FAMILY_ROWS) == way
    assert base.integrity() == before


def test_positions_that_a_pack_does_not_set_are_noticed_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows kept apart whose tokens are counted from the beginning of the pack."""
    positions = property(lambda segments: torch.arange(sum(segments.lengths))[None])
    monkeypatch.setattr(packs.Segments, "positions", positions)
    for dtype in (FP32, BF16):
        assert mode_of(base_of("gpt2", GPT2, dtype), FAMILY_ROWS) == PADDED
        assert mode_of(base_of("llama", LLAMA, dtype), FAMILY_ROWS) == APART_AND_PACKED  # only distances count


def test_rows_of_the_real_base_are_packed_in_bf16(real_base: Base) -> None:
    """As they were not while token by token NLLs were compared, which rounding sets up to 0.45 nats apart."""
    low = replace(real_base, model=copy.deepcopy(real_base.model).to(BF16))
    rows = [Row(tuple(real_base.tokenizer(text)["input_ids"]), (), 0) for text in SENTENCES]
    assert mode_of(low, rows) == APART_AND_PACKED


@EVERY_FAMILY
def test_what_is_run_fast_of_a_family_equals_the_plain_way(family: str) -> None:
    settings, way = FAMILIES[family]
    base = base_of(family, settings)
    alone = nll_of(base, [[row] for row in FAMILY_ROWS], PLAIN)
    assert_near(nll_of(base, [FAMILY_ROWS], way), alone, 1e-5)


@EVERY_FAMILY
def test_a_family_trains_in_its_way_and_by_the_plain_gradient(family: str) -> None:
    settings, way = FAMILIES[family]
    base = base_of(family, settings)
    adapter = adapter_of(base)
    parts = [FAMILY_ROWS[:1], FAMILY_ROWS[1:]]
    found, plain = gradient_of(base, adapter, parts, way), gradient_of(base, adapter, [FAMILY_ROWS], PLAIN, before=0)
    assert_near(found, plain, 1e-4 if family in ("mamba", "rwkv") else 1e-5)  # long chains of sums
    before = base.integrity()
    recipe = Recipe(learning_rate=1e-3, batch_size=2, steps=2, warmup=1, validate_every=2)
    start = fresh(base, uniform([slot.site for slot in adapter.plan.slots], 1, 4.0), 0)
    trained = train(base, start, FAMILY_ROWS[:3], FAMILY_ROWS[3:], recipe)
    assert all(math.isfinite(nll) for _, nll in trained.history)
    assert base.integrity() == before


def test_a_single_row_does_not_let_a_state_from_token_to_token_pass_as_packable() -> None:
    base = base_of("mamba", FAMILIES["mamba"][0])
    assert not mode_of(base, FAMILY_ROWS[:1]).packed


def test_a_model_that_looks_past_the_rows_of_a_pack_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    monkeypatch.setattr(packs, "attention", leaking)
    assert mode_of(base_of("llama", LLAMA), FAMILY_ROWS) == PADDED


def test_a_kernel_that_is_wrong_in_one_dtype_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared in fp32 takes another one."""
    right = packs._of_group

    def wrong(group: packs.Group, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        return right(group, q, k, v, scale * (1 if q.dtype == FP32 else 2), window)

    monkeypatch.setattr(packs, "_of_group", wrong)
    assert mode_of(base_of("llama", LLAMA), FAMILY_ROWS) == APART_AND_PACKED
    assert mode_of(base_of("llama", LLAMA, BF16), FAMILY_ROWS) == PADDED


# The kernel for rows of many lengths, which runs on a GPU alone: how it is called, by its contract


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Row by row, in fp32: (tokens, heads, depth) each."""
    assert query.shape[1] == key.shape[1], "as many keys as queries"
    assert max_q == max_k == max(cu_seq_q.diff().tolist())
    behind, ahead = window_size
    outs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        q, k, v = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        ago = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (ago < -ahead) | (ago > (behind if behind >= 0 else end))
        scores = (scale or 1) * q @ k.transpose(1, 2)
        outs.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


def kernel_that_shares(*given: Any, enable_gqa: bool = False, **named: Any) -> Tensor:
    """As of torch 2.12 on: keys and values may have fewer heads, if that is said."""
    q, k, v, *rest = given
    share = q.shape[1] // k.shape[1] if enable_gqa else 1
    return kernel(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), *rest, **named)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("torchs", [kernel, kernel_that_shares], ids=["torch 2.11", "torch 2.12"])
def test_the_kernel_for_rows_of_many_lengths_is_called_as_each_torch_has_it(
    torchs: Callable[..., Tensor], heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs)
    segments = packs.Segments((7, 30, 1, 12), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(50, n, 8, generator=generator) for n in (4, heads, heads))
    found = packs._varlen(q, k, v, segments, 0.3, window)
    given = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None if window is None else torch.tensor(window)
    expected, _ = packs.attention(nn.Module(), *given, mask, 0.3, segments=segments, sliding_window=window)
    assert torch.allclose(found, expected[0], atol=1e-5)


# Sites together


def one_by_one() -> AbstractContextManager[Any]:
    """LoRA by its plain `forward` alone."""
    return patch.object(lora, "VARIANT", replace(lora.VARIANT, together=None))


def counted(sizes: list[int]) -> AbstractContextManager[Any]:
    """Notes how many sites go together, call by call."""
    original = lora.VARIANT.together
    assert original is not None

    def together(x: Tensor, originals: Any, *rest: Any) -> Any:
        sizes.append(len(originals))
        return original(x, originals, *rest)

    return patch.object(lora, "VARIANT", replace(lora.VARIANT, together=together))


IDS = torch.randint(0, 199, (2, 12), generator=torch.Generator().manual_seed(1))


def logits_of(base: Base) -> Tensor:
    out: Tensor = base.model(input_ids=IDS, use_cache=False).logits
    return out


def test_sites_that_share_their_input_go_together_from_the_second_forward_on() -> None:
    base = base_of("llama", LLAMA)
    sizes: list[int] = []
    with counted(sizes), attach(base, adapter_of(base)), torch.no_grad():
        for expected in ([1] * 14, [3, 1, 2, 1] * 2, [3, 1, 2, 1] * 2):
            sizes.clear()
            logits_of(base)
            assert sizes == expected


def outputs_of(base: Base, adapter: Adapter, forwards: int) -> list[dict[str, Tensor]]:
    """What every site gave, in each of several forwards."""
    found: list[dict[str, Tensor]] = []
    hooks = [
        base.model.get_submodule(slot.site.path).register_forward_hook(
            lambda m, x, y, path=slot.site.path: found[-1].update({path: y.detach().clone()})
        )
        for slot in adapter.plan.slots
    ]
    with attach(base, TrainState(adapter)):
        for _ in range(forwards):
            found.append({})
            logits_of(base)
    for hook in hooks:
        hook.remove()
    return found


@BOTH
@pytest.mark.parametrize("name", ["shared heads", "bias", "learned positions"])
def test_every_site_gives_the_same_bits_together_as_by_itself(name: str, dtype: torch.dtype) -> None:
    base = base_of(*BASES[name], dtype)
    adapter = adapter_of(base)
    with one_by_one():
        (expected,) = outputs_of(base, adapter, 1)
    for found in outputs_of(base, adapter, 3):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[path], expected[path]) for path in expected)


@BOTH
@pytest.mark.parametrize("name", ["shared heads", "bias", "learned positions"])
def test_the_gradient_is_the_same_together_as_one_by_one(name: str, dtype: torch.dtype) -> None:
    """fp32 1e-5, also of each factor by itself; bf16 2 % of the whole: it rounds in another order."""
    base = base_of(*BASES[name], dtype)
    adapter = adapter_of(base)
    with one_by_one():
        expected = gradient_of(base, adapter, [FAMILY_ROWS], APART)
    found = gradient_of(base, adapter, [FAMILY_ROWS], APART)
    assert_near(found, expected, 1e-5 if dtype == FP32 else 0.02)
    if dtype == FP32:
        named = TrainState(adapter)
        for key, part in named._named(found).items():
            assert_near(part, named._named(expected)[key], 1e-5)


class Fan(nn.Module):
    """Three layers that may be given the same tensor, and one of them twice in the tree."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 8, bias=False), nn.Linear(16, 16)
        self.again = self.a


def plain(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(x), fan.c(x)]


def one_unused(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    fan.b(x)
    return [fan.a(x), fan.c(x)]


def one_not_called(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.c(x)] if i % 2 else plain(fan, x, i)


def another_order(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.c(x), fan.a(x), fan.b(x)] if i % 2 else plain(fan, x, i)


def called_twice(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(x), fan.a(x), fan.b(x), fan.c(x)]


def under_two_names(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.again(x), fan.b(x)]


def equal_but_not_the_same(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(x.clone()), fan.c(x * 2)]


def another_tensor_later(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(x * (1 + i)), fan.c(x)] if i else plain(fan, x, i)


def a_part_of_it(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(x[1:]), fan.c(x.transpose(0, 1))]


def no_rows(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [*plain(fan, x[:0], i), *plain(fan, x, i)]


def grad_off_for_one(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    with torch.no_grad():
        first = fan.a(x)
    return [first, fan.b(x), fan.c(x)]


def grad_on_for_one(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    first = fan.a(x)
    with torch.no_grad():
        second = fan.b(x)
    return [first, second, fan.c(x)]


def one_through_another(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x), fan.b(fan.c(x)), fan.c(x)]


def written_to_by_who_follows(fan: Fan, x: Tensor, i: int) -> list[Tensor]:
    return [fan.a(x).relu_(), fan.b(x).mul_(2), fan.c(x)]


WAYS_TO_CALL = [
    plain,
    one_unused,
    one_not_called,
    another_order,
    called_twice,
    under_two_names,
    equal_but_not_the_same,
    another_tensor_later,
    a_part_of_it,
    no_rows,
    grad_off_for_one,
    grad_on_for_one,
    one_through_another,
    written_to_by_who_follows,
]


def fan_of(dtype: torch.dtype = FP32) -> tuple[Fan, Base, Adapter]:
    fan = Fan().to(dtype)
    base = Base.of(fan, "fan")
    return fan, base, adapter_of(base)


def called(call: Callable[[Fan, Tensor, int], list[Tensor]], dtype: torch.dtype) -> list[tuple[list[Tensor], ...]]:
    """Outputs and gradients, at the factors and at the input, of each of four calls with one tensor."""
    fan, base, adapter = fan_of(dtype)
    state, x = TrainState(adapter), torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = []
    with attach(base, state):
        for i in range(4):
            leaf = x.clone().requires_grad_()
            outputs = call(fan, leaf, i)
            sum((y.float().square().mean() for y in outputs if y.numel()), torch.zeros(())).backward()
            assert state.master.grad is not None and leaf.grad is not None
            found.append(([y.detach() for y in outputs], [state.master.grad, leaf.grad]))
            state.master.grad = None
    return found


@BOTH
@pytest.mark.parametrize("call", WAYS_TO_CALL, ids=lambda call: call.__name__)
def test_however_layers_are_called_they_compute_what_each_does_by_itself(
    call: Callable[[Fan, Tensor, int], list[Tensor]], dtype: torch.dtype
) -> None:
    with one_by_one():
        expected = called(call, dtype)
    for (outputs, gradients), (own_outputs, own_gradients) in zip(called(call, dtype), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(outputs, own_outputs, strict=True))
        for one, other in zip(gradients, own_gradients, strict=True):
            assert_near(one, other, 1e-5 if dtype == FP32 else 0.02)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("learnt_in_place", [False, True])
def test_a_tensor_that_is_written_to_between_two_sites_is_another_tensor(mode: Any, learnt_in_place: bool) -> None:
    fan, base, adapter = fan_of()

    def run() -> list[Tensor]:
        found = []
        with attach(base, adapter), mode():
            for i in range(3):
                x = torch.ones(3, 16)
                found.append(fan.a(x))
                if i or learnt_in_place:
                    x.add_(1)
                found.append(fan.b(x))
        return found

    with one_by_one():
        expected = run()
    assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))
    assert torch.equal(expected[1], expected[3]) == learnt_in_place


def test_switched_off_between_two_sites_the_second_computes_as_the_base() -> None:
    fan, base, adapter = fan_of()
    x = torch.ones(3, 16)
    bare = fan.b(x)
    with attach(base, adapter) as attached, torch.no_grad():
        adapted = [plain(fan, x, i) for i in range(2)][1]
        fan.a(x)
        with attached.off():
            assert torch.equal(fan.b(x), bare)
        assert torch.equal(fan.c(x), adapted[2])
        assert all(torch.equal(one, other) for one, other in zip(plain(fan, x, 3), adapted, strict=True))


def test_a_step_between_two_forwards_on_one_tensor_reaches_every_site() -> None:
    fan, base, adapter = fan_of()
    state, x = TrainState(adapter), torch.ones(3, 16)
    optimizer = torch.optim.AdamW(state.parameters(), lr=0.1)
    with attach(base, state):
        for i in range(3):
            sum(y.square().mean() for y in plain(fan, x, i)).backward()  # type: ignore[union-attr]
            optimizer.step()
        found = plain(fan, x, 3)
    with one_by_one(), attach(base, state):
        assert all(torch.equal(one, other) for one, other in zip(found, plain(fan, x, 0), strict=True))


def test_with_dropout_every_site_goes_by_itself() -> None:
    base = base_of("llama", LLAMA)
    adapter = adapter_of(base)

    def gradient(sizes: list[int]) -> Tensor:
        state = TrainState(adapter, dropout=0.3)
        torch.manual_seed(5)
        with counted(sizes), attach(base, state):
            for _ in range(2):
                logits_of(base).square().mean().backward()
        assert state.master.grad is not None
        return state.master.grad

    sizes: list[int] = []
    found = gradient(sizes)
    assert not sizes
    assert torch.equal(found, gradient([]))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # transformers 5.23 renames it
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradient_from_the_first_forward_on(reentrant: bool) -> None:
    base = base_of("llama", LLAMA)
    adapter = adapter_of(base)
    assert isinstance(base.model, PreTrainedModel)

    def gradients() -> list[Tensor]:
        found, state = [], TrainState(adapter)
        with attach(base, state):
            for _ in range(3):
                logits_of(base).square().mean().backward()
                assert state.master.grad is not None
                found.append(state.master.grad)
                state.master.grad = None
        return found

    expected = gradients()[0]
    base.model.train()  # no dropout in this one
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.model.enable_input_require_grads()
    for found in gradients():
        assert_near(found, expected, 1e-5)


def test_torch_func_differentiates_through_an_attached_adapter() -> None:
    """Twice, too: what is written for one backward alone steps aside."""
    base = base_of("llama", {**LLAMA, "attn_implementation": "eager"})  # the fused kernel has no second derivative
    embedded = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor) -> Tensor:
        return base.model(inputs_embeds=x, use_cache=False).logits.square().mean()

    def steepness(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x).square().sum()

    with attach(base, adapter_of(base)):
        loss(embedded)
        found, twice = torch.func.grad(loss)(embedded), torch.func.grad(steepness)(embedded)
    with one_by_one(), attach(base, adapter_of(base)):
        leaf = embedded.clone().requires_grad_()
        (once,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        assert_near(found, once.detach(), 1e-5)
        assert_near(twice, torch.autograd.grad(once.square().sum(), leaf)[0], 1e-5)


def test_under_autocast_the_gradient_is_that_of_one_by_one() -> None:
    base = base_of("llama", LLAMA)
    adapter = adapter_of(base)

    def gradient() -> Tensor:
        state = TrainState(adapter)
        with attach(base, state), torch.autocast("cpu", BF16):
            for _ in range(2):
                logits_of(base).float().square().mean().backward()
        assert state.master.grad is not None
        return state.master.grad

    with one_by_one():
        expected = gradient()
    assert torch.equal(gradient(), expected)


def test_nothing_that_was_computed_is_kept_after_the_block() -> None:
    fan, base, adapter = fan_of()
    kept: list[weakref.ref[Tensor]] = []

    def noting(x: Tensor, originals: Any, *rest: Any) -> Any:
        outputs = original(x, originals, *rest)
        kept.extend(weakref.ref(y) for y in outputs)
        return outputs

    original = lora.VARIANT.together
    assert original is not None
    with patch.object(lora, "VARIANT", replace(lora.VARIANT, together=noting)):
        with attach(base, TrainState(adapter)):
            x = torch.ones(3, 16)
            plain(fan, x, 0)
            fan.a(x)  # leaves what it made for b and c
            assert sum(ref() is not None for ref in kept) == 2
        kept.append(weakref.ref(x))
        del x
    gc.collect()
    assert len(kept) == 7
    assert all(ref() is None for ref in kept)


# The head

HEADS = {"plain": False, "with bias": True}


@BOTH
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 7, 100])
@pytest.mark.parametrize("bias", HEADS.values(), ids=HEADS)
def test_the_head_in_chunks_gives_plain_cross_entropy(
    bias: bool, rows_at_a_time: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits, so the same values (1e-5 in both); in bf16 the gradient rounds once more, within 1 %."""
    g = torch.Generator().manual_seed(2)
    weight, hidden = (torch.randn(n, 16, generator=g).to(dtype) for n in (50, 23))
    shift = torch.randn(50, generator=g).to(dtype) if bias else None
    targets, upstream = torch.randint(0, 50, (23,), generator=g), torch.rand(23, generator=g)
    monkeypatch.setattr(forward, "CHUNK", rows_at_a_time * 50 + 49)
    found = []
    for nll in (
        lambda x: forward._HeadNll.apply(x, weight, shift, targets),
        lambda x: F.cross_entropy(F.linear(x, weight, shift).float(), targets, reduction="none"),
    ):
        leaf = hidden.clone().requires_grad_()
        values = nll(leaf)
        (values * upstream).sum().backward()
        assert leaf.grad is not None
        found.append((values.detach(), leaf.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert_near(found[0][1], found[1][1], 1e-5 if dtype == FP32 else 0.01)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("only", [False, True], ids=["with the others", "alone"])
def test_an_adapted_head_has_the_gradient_of_the_plain_way(tied: bool, only: bool) -> None:
    base = base_of("llama", {**LLAMA, "tie_word_embeddings": tied})
    sites = [site for site in base.sites if site.path == "lm_head"] if only else base.sites
    assert any(site.path == "lm_head" for site in sites)
    adapter = random_adapter(base, uniform(sites, 3, 6.0))
    way = mode_of(base, FAMILY_ROWS)
    assert way == PACKED
    plain_gradient = gradient_of(base, adapter, [FAMILY_ROWS], PLAIN)
    assert_near(gradient_of(base, adapter, [FAMILY_ROWS], way), plain_gradient, 1e-5)
    with attach(base, adapter):
        assert_near(nll_of(base, [FAMILY_ROWS], way), nll_of(base, [FAMILY_ROWS], PLAIN), 1e-5)


def test_an_adapted_head_makes_no_more_logits_than_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama", LLAMA)
    adapter = random_adapter(base, uniform(base.sites, 3, 6.0))
    whole = gradient_of(base, adapter, [FAMILY_ROWS], PACKED)
    head, made = base.model.get_submodule("lm_head"), []
    monkeypatch.setattr(forward, "CHUNK", 3 * len(head.weight))  # type: ignore[arg-type]
    handle = head.register_forward_hook(lambda _, given, output: made.append(len(output)))
    found = gradient_of(base, adapter, [FAMILY_ROWS], PACKED)
    handle.remove()
    assert made and max(made) == 3
    assert_near(found, whole, 1e-5)


# PEFT's gradients


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["shared heads", "bias", "learned positions"])
def test_peft_finds_the_same_gradient_of_every_factor_on_the_same_rows(name: str, tmp_path: Path) -> None:
    oracle = pytest.importorskip("peft")
    base = base_of(*BASES[name])
    adapter = adapter_of(base)
    assert mode_of(base, FAMILY_ROWS) == PACKED
    ours = TrainState(adapter)._named(gradient_of(base, adapter, [FAMILY_ROWS[:2], FAMILY_ROWS[2:]], PACKED))

    peft.write(adapter, tmp_path / "adapter")
    model = base_of(*BASES[name]).model
    theirs = oracle.PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True).eval()
    n = sum(row.n_trained for row in FAMILY_ROWS)
    for row in FAMILY_ROWS:
        ids = torch.tensor([row.ids])
        logits = theirs(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = ids[0, 1:].masked_fill(~torch.tensor(row.trained[1:]), -100)
        (F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / n).backward()
    gradients = {
        key.removeprefix("base_model.model."): p.grad for key, p in theirs.named_parameters() if "lora_" in key
    }
    assert len(gradients) == len(ours)
    for key, gradient in ours.items():
        path, _, factor = key.rpartition(".")
        assert_near(gradient, gradients[f"{path}.lora_{factor}.default.weight"], 1e-5)


# Nothing below the lowest adapted site


def upper_only(base: Base) -> Adapter:
    sites = [site for site in all_linear(base) if ".1." in site.path]
    assert 0 < len(sites) < len(all_linear(base))
    return random_adapter(base, uniform(sites, 2, 4.0))


@pytest.mark.parametrize("way", [APART, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["shared heads", "learned positions"])
def test_nothing_is_kept_for_a_backward_below_the_lowest_adapted_block(name: str, way: ForwardMode) -> None:
    base = base_of(*BASES[name])
    body = base.model.base_model
    blocks = body.layers if hasattr(body, "layers") else body.h
    at = ["below"]
    saved: list[str] = []
    entered: list[bool] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        at[0] = "adapted"
        entered.append(inputs[0].requires_grad)

    def keep(x: Tensor) -> Tensor:
        saved.append(at[0])
        return x

    blocks[1].register_forward_pre_hook(enter)
    batch = batch_of(base, FAMILY_ROWS, way)
    with attach(base, TrainState(upper_only(base))), packing(base, way.packed):
        for hooks in (nullcontext(), nullcontext(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)):
            at[0] = "below"
            with hooks:
                nll = token_nll(base, batch, way)
            assert nll.requires_grad
    assert entered == [False] * 3
    assert set(saved) == {"adapted"}


def test_the_gradient_of_the_upper_blocks_is_the_one_they_have_in_the_whole() -> None:
    base = base_of("llama", LLAMA)
    adapter = upper_only(base)
    found = gradient_of(base, adapter, [FAMILY_ROWS], PACKED)
    assert_near(found, gradient_of(base, adapter, [FAMILY_ROWS], PLAIN, before=0), 1e-5)


def test_no_gradient_is_computed_for_an_input_that_needs_none() -> None:
    fan, base, adapter = fan_of()
    shapes: list[tuple[int, ...]] = []
    real = torch.Tensor.addmm_

    def noting(self: Tensor, *rest: Any, **named: Any) -> Tensor:
        shapes.append(tuple(self.shape))
        return real(self, *rest, **named)

    with attach(base, TrainState(adapter)):
        for needed in (False, True):
            outputs = [plain(fan, torch.ones(3, 16, requires_grad=needed), i) for i in range(2)][1]
            with patch.object(torch.Tensor, "addmm_", noting):
                sum(y.square().mean() for y in outputs).backward()  # type: ignore[union-attr]
            assert bool(shapes) == needed


# On a GPU


def gpu(name: str, dtype: torch.dtype) -> Base:
    family, settings = BASES[name]
    base = base_of(family, {**settings, "hidden_size": 64} if family == "llama" else settings, dtype)
    base.model.to("cuda")
    return base


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@BOTH
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", ["shared heads", "own heads", "window", "bias", "learned positions"])
def test_on_a_gpu_packed_nll_is_that_of_padded_rows(name: str, rows: list[Row], dtype: torch.dtype) -> None:
    """fp32 1e-4: a GPU may add in another order, in blocks. bf16 by the kernel for rows of many lengths: 0.1 nat."""
    base = gpu(name, dtype)
    padded, packed = (nll_of(base, [rows], way) for way in (APART, PACKED))
    tolerance = 1e-4 if dtype == FP32 else 0.1
    assert torch.allclose(packed, padded, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@BOTH
def test_on_a_gpu_a_token_of_one_row_changes_nothing_in_another(dtype: torch.dtype) -> None:
    base, rows = gpu("shared heads", dtype), rows_of(40, 38, 150, 7)
    other = replace(rows[1], ids=(*rows[1].ids[:2], 199 - rows[1].ids[2], *rows[1].ids[3:]))
    one, two = (nll_of(base, [[rows[0], row, *rows[2:]]], PACKED) for row in (rows[1], other))
    owner = batch_of(base, rows, PACKED).owner
    assert torch.equal(one[owner != 1], two[owner != 1])
    assert not torch.equal(one[owner == 1], two[owner == 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@BOTH
def test_on_a_gpu_the_packed_gradient_is_the_plain_one(dtype: torch.dtype) -> None:
    """bf16 within a tenth."""
    base = gpu("shared heads", dtype)
    adapter = adapter_of(base)
    plain_gradient = gradient_of(base, adapter, [FAMILY_ROWS], PLAIN)
    found = gradient_of(base, adapter, [FAMILY_ROWS[:1], FAMILY_ROWS[1:]], PACKED)
    assert_near(found, plain_gradient, 1e-4 if dtype == FP32 else 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@BOTH
def test_on_a_gpu_training_runs_and_a_stopped_run_goes_on_to_the_same_end(dtype: torch.dtype, tmp_path: Path) -> None:
    base = gpu("shared heads", dtype)
    recipe = Recipe(learning_rate=1e-2, batch_size=2, steps=6, warmup=1, validate_every=3)
    start = fresh(base, uniform(all_linear(base), 4, 16.0), 0)
    rows, valid = rows_of(20, 33, 150, 7, 60), rows_of(25, 70)
    whole = train(base, start, rows, valid, recipe)
    assert mode_of(base, rows).packed
    assert whole.history[-1][1] < whole.history[0][1]

    def stop(moment: Moment) -> None:
        if moment.step == 4 and moment.valid_nll is None:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(base, start, rows, valid, recipe, folder=tmp_path, tell=stop)
    again = train(base, start, rows, valid, recipe, folder=tmp_path, resume=True)
    assert again.history == whole.history
    assert again.adapter.digest() == whole.adapter.digest()
