"""From logits to a token, for each request by its own settings."""

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

MANY = (
    1024  # of the likeliest tokens that are sorted first: nearly always top_p lies within, and a sort of all takes ms
)
COLD = 1e-5  # a temperature below is 0: logits divided by less are no numbers


class Sampler:
    """Draws the tokens of one answer. grammar: what its schema allows, None without one."""

    def __init__(self, request: Request, grammar: Grammar | None = None):
        self.request, self.grammar = request, grammar
        bias = request.logit_bias or {}
        self._bias = torch.tensor([*bias], dtype=torch.long), torch.tensor([*bias.values()], dtype=torch.float32)
        penalties = request.presence_penalty, request.frequency_penalty, request.repetition_penalty
        self._changes = bool(bias) or penalties != (0, 0, 1)
        self._said: Counter[int] = Counter()  # tokens of the answer
        self._generator: torch.Generator | None = None
        if request.temperature >= COLD:
            seed = secrets.randbits(63) if request.seed is None else request.seed
            self._generator = torch.Generator().manual_seed(seed)

    def draw(self, logits: Tensor, likeliest: int) -> Token:
        """logits (vocabulary,): of the next token. likeliest: the largest one's place, found for all rows at once."""
        allowed = self._changed(logits.float().cpu()) if self._changes else logits
        if self.grammar is not None:
            allowed = self.grammar.masked(allowed)
        if self._generator is not None:
            chosen = self._drawn(allowed.float().cpu())
        else:
            chosen = likeliest if allowed is logits else int(allowed.argmax())
        if self._changes:
            self._said[chosen] += 1
        if self.grammar is not None:
            self.grammar.take(chosen)
        if self.request.logprobs is None:
            return Token(chosen)
        known = logits.float().log_softmax(-1)
        values, ids = known.topk(min(self.request.logprobs, len(known)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(known[chosen]), top)

    def _changed(self, logits: Tensor) -> Tensor:
        """A copy of logits (vocabulary,) with the request's bias and penalties, in the order that vLLM has them."""
        request, logits = self.request, logits.clone()
        tokens, bias = self._bias
        logits[tokens] += bias
        if request.repetition_penalty != 1:
            held = torch.tensor([*{*request.prompt, *self._said}])
            values = logits[held]
            logits[held] = values * torch.where(values > 0, 1 / request.repetition_penalty, request.repetition_penalty)
        if self._said:
            counts = torch.tensor([*self._said.values()])
            logits[torch.tensor([*self._said])] -= request.presence_penalty + request.frequency_penalty * counts
        return logits

    def _drawn(self, logits: Tensor) -> int:
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
        if request.top_p < 1:  # as many as it takes to reach top_p, at least one
            shares = shares.masked_fill(before >= request.top_p, 0)
        return int(ids[torch.multinomial(shares, 1, generator=self._generator)])


class Grammar:
    """Which tokens a JSON schema, or a grammar, allows next, by llguidance."""

    def __init__(self, tokenizer: Any, schema: Mapping[str, Any] | str):
        """tokenizer: as `grammar_tokenizer` makes it. schema: or a grammar in llguidance's dialect of Lark. Raises
        RequestError for what is no schema that can be kept to."""
        from llguidance import LLMatcher

        self._kind = "grammar" if isinstance(schema, str) else "schema"
        try:
            # Where any space may stand between two parts, a small model writes spaces until its room is full.
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
        """A copy of logits (vocabulary,) with −∞ where the schema allows no token."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool))
        whole = torch.zeros(len(logits), dtype=torch.bool)
        whole[: len(allowed)] = allowed
        return logits.masked_fill(~whole.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the answer is whole and nothing may follow. Raises RequestError where it cannot go on."""
        if problem := self._matcher.get_error():
            raise RequestError(f"{self._kind}: {problem}: make it simpler")
        return bool(self._matcher.is_stopped())


def grammar_tokenizer(tokenizer: Any, vocabulary: int, stops: Sequence[int]) -> Any:
    """What llguidance reads of a tokenizer; made once, for it takes a while. Raises RequestError where it lacks."""
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise RequestError("schema: answers by a schema need llguidance: pip install llguidance") from error
    every = max(tokenizer.get_vocab().values(), default=0) + 1  # it takes no fewer; `masked` leaves out what is beyond
    return from_tokenizer(tokenizer, max(vocabulary, every), list(stops))
