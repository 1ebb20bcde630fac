"""What the base makes of a question: its hidden states at three depths in the lower third, averaged over the tokens.

They cost a third of a forward pass and no training. The lower blocks tell what a text is about; further up they tell
which token comes next. An adapter's folder keeps those of the questions it was trained on, so that a router can be
trained for any set of adapters, without the data they were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from lorafit.attachment.blocks import blocks_of, inputs_of_blocks
from lorafit.bases.base import Base
from lorafit.bases.progress import Watch, unwatched
from lorafit.data.examples import Example, Message
from lorafit.errors import BaseError, FormatError

LONGEST = 128  # tokens of a question that are read: half from its beginning, half from its end
TOGETHER = 32  # questions of like lengths that are read at once
PARTS = ("train", "valid", "train_declined", "valid_declined")


def question_of(messages: Sequence[Message]) -> str:
    """What the user has said in a conversation, without a system prompt and without answers."""
    return "\n".join(message.content for message in messages if message.role == "user")


def depths(base: Base) -> tuple[int, ...]:
    """Before which blocks the hidden states are read. Raises BaseError for a model that is no stack of blocks."""
    count = len(blocks_of(base))
    if count < 2 or base.tokenizer is None:
        raise BaseError(
            f"'{base.name}' cannot tell questions apart for a router, for it is no language model made of "
            "blocks: name the adapter in each request"
        )
    return tuple(sorted({1, max(1, round(count / 8)), max(1, round(count / 3))}))


def token_ids(base: Base, text: str) -> list[int]:
    """Of a question, after one token that is not averaged: the first of a text takes what attention has to spare."""
    ids: list[int] = base.tokenizer(text or " ", add_special_tokens=False)["input_ids"]
    if len(ids) > LONGEST:
        ids = ids[: LONGEST // 2] + ids[-LONGEST // 2 :]
    first = base.tokenizer.bos_token_id
    return [base.tokenizer.eos_token_id or 0 if first is None else first, *ids]


def pooled(streams: Sequence[Tensor]) -> Tensor:
    """Hidden states (N, d) of one question, at each depth → (depths · d,), fp32."""
    return torch.cat([F.rms_norm(one[1:].float(), one.shape[-1:]).mean(0) for one in streams]).cpu()


def features_of(base: Base, texts: Sequence[str], watch: Watch = unwatched) -> Tensor:
    """(texts, depths · d), fp32, of the bare base. Raises BaseError as `depths` does, and where the blocks hand on more
    than one hidden state of each token."""
    read = depths(base)
    asked = [token_ids(base, text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(asked[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(texts), TOGETHER):
        chosen = order[start : start + TOGETHER]
        width = len(asked[chosen[-1]])  # what is filled up stands behind a question, where none of its tokens looks
        ids = torch.tensor([asked[i] + asked[i][:1] * (width - len(asked[i])) for i in chosen], device=base.device)
        with torch.inference_mode(), inputs_of_blocks(base, read) as streams:
            base.model(input_ids=ids, use_cache=False)
        if any(stream.shape[:-1] != ids.shape for stream in streams):
            raise BaseError(
                f"'{base.name}' cannot tell questions apart for a router, for its blocks hand on more than "
                "one hidden state of each token: name the adapter in each request"
            )
        for row, i in enumerate(chosen):
            found[i] = pooled([stream[row, : len(asked[i])] for stream in streams])
        watch("questions for the router", len(found), len(texts), "questions")
    return torch.stack([found[i] for i in range(len(texts))]) if texts else torch.empty(0, 0)


@dataclass(frozen=True, eq=False)
class Features:
    """Of one adapter's questions. base: its identity. Tensors (n, depths · d), fp16; declined: of questions that its
    data has turned away, which are not for it."""

    base: str
    depths: tuple[int, ...]
    train: Tensor
    valid: Tensor
    train_declined: Tensor
    valid_declined: Tensor

    @staticmethod
    def of(
        base: Base, train: Sequence[Example], valid: Sequence[Example], most: int = 512, watch: Watch = unwatched
    ) -> Features | None:
        """Of examples; of more than `most`, and a quarter of it for validation, evenly chosen ones. None where they ask
        nothing. Raises BaseError where the base cannot tell."""
        read = depths(base)
        texts = []
        for split, room in ((train, most), (valid, -(-most // 4))):
            asked = [example for example in split if not example.is_text and question_of(example.messages).strip()]
            for declines in (False, True):
                chosen = [one for one in asked if bool(one.check and one.check.declines) == declines]
                texts.append([question_of(one.messages) for one in chosen[:: -(-len(chosen) // room) or 1]])
        train_texts, train_declined, valid_texts, valid_declined = texts
        if len(train_texts) < 2:
            return None
        every = [*train_texts, *valid_texts, *train_declined, *valid_declined]
        sizes = [len(part) for part in (train_texts, valid_texts, train_declined, valid_declined)]
        return Features(base.identity, read, *features_of(base, every, watch).half().split(sizes))

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        about = {"format": 1, "base": self.base, "depths": self.depths}
        return packed({part: getattr(self, part).contiguous() for part in PARTS}, about)

    @staticmethod
    def from_bytes(content: bytes, where: str) -> Features:
        """Raises FormatError."""
        try:
            tensors, about = unpacked(content)
            read = tuple(int(block) for block in about["depths"])
            found = Features(about["base"], read, *(tensors[part] for part in PARTS))
            width = found.train.shape[1]
            if any(getattr(found, part).ndim != 2 or not getattr(found, part).isfinite().all() for part in PARTS):
                raise ValueError("no finite matrices")
            if any(len(getattr(found, part)) and getattr(found, part).shape[1] != width for part in PARTS):
                raise ValueError("of different widths")
        except Exception as error:  # a damaged file may raise anything
            raise FormatError(
                f"{where}: no questions for a router ({error}): make them again with lorafit route --learn"
            ) from error
        return found


def packed(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A safetensors file. Its metadata is one entry: of several, the order would change from run to run."""
    return save(dict(tensors), metadata={"lorafit": json.dumps(about)})


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of such a file."""
    length = int.from_bytes(content[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["lorafit"])
    return load(content), about
