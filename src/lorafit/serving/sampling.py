"""Sampling: logits go in, and a token of the answer comes out, by the settings and the grammar of its request."""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import RequestError
from lorafit.serving.request import Request, Token

MANY = 1024  # most probable tokens that are sorted first: they nearly always reach top_p, and sorting all takes ms
COLD = 1e-5  # a temperature below counts as 0, since logits divided by it overflow


class Sampler:
    """Draws the tokens of one answer. grammar: that the answer follows; None without one."""

    def __init__(self, request: Request, grammar: Grammar | None = None):
        self.request, self.grammar = request, grammar
        bias = request.logit_bias or {}
        self._bias = torch.tensor([*bias], dtype=torch.long), torch.tensor([*bias.values()], dtype=torch.float32)
        penalties = request.presence_penalty, request.frequency_penalty, request.repetition_penalty
        self._changes = bool(bias) or penalties != (0, 0, 1)
        self._drawn: Counter[int] = Counter()  # tokens of the answer
        self._generator: torch.Generator | None = None
        if request.temperature >= COLD:
            seed = secrets.randbits(63) if request.seed is None else request.seed
            self._generator = torch.Generator().manual_seed(seed)

    def draw(self, logits: Tensor, likeliest: int) -> Token:
        """Draw the next token. logits: (vocabulary,). likeliest: the index of the largest, computed for all rows at
        once."""
        allowed = self._changed(logits.float().cpu()) if self._changes else logits
        if self.grammar is not None:
            allowed = self.grammar.masked(allowed)
        if self._generator is not None:
            chosen = self._sample(allowed.float().cpu())
        else:
            chosen = likeliest if allowed is logits else int(allowed.argmax())
        if self._changes:
            self._drawn[chosen] += 1
        if self.grammar is not None:
            self.grammar.take(chosen)
        if self.request.logprobs is None:
            return Token(chosen)
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.request.logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)

    def _changed(self, logits: Tensor) -> Tensor:
        """A copy of logits (vocabulary,) with the request's bias and penalties, in vLLM's order."""
        request, logits = self.request, logits.clone()
        tokens, bias = self._bias
        logits[tokens] += bias
        if request.repetition_penalty != 1:
            held = torch.tensor([*{*request.prompt, *self._drawn}])
            values = logits[held]
            logits[held] = values * torch.where(values > 0, 1 / request.repetition_penalty, request.repetition_penalty)
        if self._drawn:
            counts = torch.tensor([*self._drawn.values()])
            logits[torch.tensor([*self._drawn])] -= request.presence_penalty + request.frequency_penalty * counts
        return logits

    def _sample(self, logits: Tensor) -> int:
        request, logits = self.request, logits / self.request.temperature
        if request.min_p:
            logits = logits.masked_fill(logits < logits.max() + math.log(request.min_p), -torch.inf)
        if not request.top_k and request.top_p == 1:
            return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))
        most = min(request.top_k or len(logits), len(logits))
        for count in (most,) if request.top_k else (min(MANY, most), most):
            values, ids = logits.topk(count)
            shares = (values - (values if request.top_k else logits).logsumexp(-1)).exp()
            before = shares.cumsum(-1) - shares
            if count == most or before[-1] >= request.top_p:
                break
        if request.top_p < 1:  # the fewest tokens that reach top_p, at least one
            shares = shares.masked_fill(before >= request.top_p, 0)
        return int(ids[torch.multinomial(shares, 1, generator=self._generator)])


class Grammar:
    """The tokens that a JSON schema or a grammar allows next, by llguidance."""

    def __init__(self, tokenizer: Any, schema: Mapping[str, Any] | str):
        """tokenizer: from `grammar_tokenizer`. schema: a JSON schema, or a grammar in llguidance's dialect of Lark.
        Raises RequestError for one that llguidance does not take."""
        from llguidance import LLMatcher

        self._kind = "grammar" if isinstance(schema, str) else "schema"
        try:
            # If any white space were allowed between two parts, a small model would write it until its room is full.
            grammar = (
                schema
                if isinstance(schema, str)
                else LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})
            )
            self._matcher: Any = LLMatcher(tokenizer, grammar)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{self._kind}: {error}: correct it") from error
        if problem := self._matcher.get_error():
            raise RequestError(f"{self._kind}: {problem}: correct it")

    def masked(self, logits: Tensor) -> Tensor:
        """A copy of logits (vocabulary,) with −∞ for tokens that are not allowed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        whole = torch.zeros(len(logits), dtype=torch.bool)
        whole[: len(allowed)] = allowed
        return logits.masked_fill(~whole.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Continue after a token."""
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and no token may follow. Raises RequestError where it cannot continue."""
        if problem := self._matcher.get_error():
            raise RequestError(f"{self._kind}: {problem}: make it simpler")
        return bool(self._matcher.is_stopped())


def grammar_tokenizer(tokenizer: Any, vocabulary: int, stops: Sequence[int]) -> Any:
    """A tokenizer for llguidance; making it takes a while. Raises RequestError where llguidance is not installed."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise RequestError("schema: answers by a schema need llguidance: pip install llguidance") from error
    needed = max(tokenizer.get_vocab().values(), default=0) + 1  # llguidance takes no fewer; `masked` drops the rest
    return from_tokenizer(tokenizer, max(vocabulary, needed), list(stops))
