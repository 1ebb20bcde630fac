"""Features of questions for the router: hidden states of the base at three depths, averaged over the tokens.

They come from the lower third of the blocks, cost a third of a forward pass, and need no training: lower blocks show
what a text is about, and higher ones which token comes next. An adapter's folder keeps the features of its training
questions, so that a router can be trained for any set of adapters without their data.
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

LONGEST = 128  # tokens of a question that are read, half from its beginning and half from its end
BATCH = 32  # questions of similar length that are read together
PARTS = ("train", "valid", "train_declined", "valid_declined")


def question_of(messages: Sequence[Message]) -> str:
    """The messages of the user in a conversation, as one text."""
    return "\n".join(message.content for message in messages if message.role == "user")


def depths(base: Base) -> tuple[int, ...]:
    """The blocks whose inputs are read. Raises BaseError for a model that is not a stack of blocks."""
    count = len(blocks_of(base))
    if count < 2 or base.tokenizer is None:
        raise BaseError(
            f"'{base.name}' cannot tell questions apart for a router, since it is not a language model made of "
            "blocks: name the adapter in each request"
        )
    return tuple(sorted({1, max(1, round(count / 8)), max(1, round(count / 3))}))


def token_ids(base: Base, text: str) -> list[int]:
    """Token ids of a question, after one token that is not averaged, since the first token of a text gets the attention
    that the others do not need."""
    ids: list[int] = base.tokenizer(text or " ", add_special_tokens=False)["input_ids"]
    if len(ids) > LONGEST:
        ids = ids[: LONGEST // 2] + ids[-LONGEST // 2 :]
    first = base.tokenizer.bos_token_id
    return [base.tokenizer.eos_token_id or 0 if first is None else first, *ids]


def pooled(streams: Sequence[Tensor]) -> Tensor:
    """Average the hidden states (N, d) of one question at each depth → (depths · d,), fp32."""
    return torch.cat([F.rms_norm(states[1:].float(), states.shape[-1:]).mean(0) for states in streams]).cpu()


def features_of(base: Base, texts: Sequence[str], watch: Watch = unwatched) -> Tensor:
    """Features of questions, by the bare base: (texts, depths · d), fp32. Raises BaseError as `depths` does, and where
    the blocks have more than one hidden state for each token."""
    read = depths(base)
    prompts = [token_ids(base, text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
    features: dict[int, Tensor] = {}
    for start in range(0, len(texts), BATCH):
        batch = order[start : start + BATCH]
        width = len(prompts[batch[-1]])  # padding comes after a question, where causal attention does not see it
        ids = torch.tensor([prompts[i] + prompts[i][:1] * (width - len(prompts[i])) for i in batch], device=base.device)
        with torch.inference_mode(), inputs_of_blocks(base, read) as streams:
            base.model(input_ids=ids, use_cache=False)
        if any(stream.shape[:-1] != ids.shape for stream in streams):
            raise BaseError(
                f"'{base.name}' cannot tell questions apart for a router, since its blocks have more than "
                "one hidden state for each token: name the adapter in each request"
            )
        for row, i in enumerate(batch):
            features[i] = pooled([stream[row, : len(prompts[i])] for stream in streams])
        watch("questions for the router", len(features), len(texts), "questions")
    return torch.stack([features[i] for i in range(len(texts))]) if texts else torch.empty(0, 0)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one adapter's questions, tensors of (n, depths · d), fp16. base: the identity of the base. declined:
    of questions that the adapter's data declines, which do not belong to it."""

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
        """The features of examples, or None where they hold fewer than two questions.

        Args:
            base: that reads the questions.
            train: examples for training the router.
            valid: examples for its threshold.
            most: questions of `train`, and a quarter of it of `valid`; of more, evenly spaced ones are taken.
            watch: called with the progress.

        Raises:
            BaseError: as `features_of`.
        """
        read = depths(base)
        texts: dict[bool, list[list[str]]] = {False: [], True: []}
        for split, room in ((train, most), (valid, -(-most // 4))):
            asking = [example for example in split if not example.is_text and question_of(example.messages).strip()]
            for declines, parts in texts.items():
                chosen = [example for example in asking if bool(example.check and example.check.declines) == declines]
                parts.append([question_of(example.messages) for example in chosen[:: -(-len(chosen) // room) or 1]])
        parts = texts[False] + texts[True]  # in the order of PARTS
        if len(parts[0]) < 2:
            return None
        features = features_of(base, [text for part in parts for text in part], watch)
        return Features(base.identity, read, *features.half().split([len(part) for part in parts]))

    def to_bytes(self) -> bytes:
        """The content of a safetensors file."""
        about = {"format": 1, "base": self.base, "depths": self.depths}
        return packed({part: getattr(self, part).contiguous() for part in PARTS}, about)

    @staticmethod
    def from_bytes(content: bytes, where: str) -> Features:
        """Read a file that `to_bytes` has made. Raises FormatError, which names the file by `where`."""
        try:
            tensors, about = unpacked(content)
            read = tuple(int(block) for block in about["depths"])
            parts = [tensors[part] for part in PARTS]
            if any(part.ndim != 2 or not part.isfinite().all() for part in parts):
                raise ValueError("not finite matrices")
            if any(len(part) and part.shape[1] != parts[0].shape[1] for part in parts):
                raise ValueError("of different widths")
            return Features(about["base"], read, *parts)
        except Exception as error:  # a damaged file may raise anything
            raise FormatError(
                f"{where}: not a file of questions for a router ({error}): make it again with lorafit route --learn"
            ) from error


def packed(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Write a safetensors file. Its metadata is a single entry, since the order of several changes from run to run."""
    return save(dict(tensors), metadata={"lorafit": json.dumps(about)})


def unpacked(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of such a file."""
    length = int.from_bytes(content[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["lorafit"])
    return load(content), about
