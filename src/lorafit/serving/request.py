"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.errors import LorafitError, RequestError

Finish = Literal["stop", "length", "cancelled"]
MOST_LOGPROBS = 20
HOTTEST, MOST_SCALE = 10, 8  # temperature; how often an adapter may be added, or taken off
MOST_STOPS, LONGEST_STOP = 16, 256  # each token's text is compared with all of them
MOST_PENALTY, MOST_BIAS, MOST_BIASES = 2, 100, 1024  # as at OpenAI; of one token; tokens


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    prompt: token ids, as a Renderer makes them. adapter: a name (its live version), `name@3`, or None for the bare
    base. adapter_scale: times what the adapter adds. max_tokens: of the answer. temperature 0: the likeliest token
    every time; else the logits are divided by it, and of the likeliest `top_k` tokens (0: all) those that make up
    `top_p` of the probability are drawn from, by `seed` (None: another one each time), and of these none that is less
    than `min_p` times as likely as the likeliest. presence_penalty, frequency_penalty: taken off the logit of a token
    that the answer holds, once, and for each time it does. repetition_penalty: what the logits of tokens that prompt or
    answer hold are divided by (multiplied, below 0). logit_bias: what is added to the logits of tokens, by id, before
    all of these. stop: texts at which the answer
    ends, not part of it. ignore_end: go on after the token that ends a turn. logprobs: for each token its natural
    log-probability before temperature, and those of so many likeliest; None: none. schema: a JSON schema the answer
    keeps to; grammar: in its place, one in llguidance's dialect of Lark. special: special tokens that are told in the
    text; all others are left out of it.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    adapter_scale: float = 1.0
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    special: frozenset[int] = frozenset()

    def problems(self, vocabulary: int) -> list[str]:
        """What cannot be about this request, each with what to do."""
        whole = {"max_tokens": self.max_tokens, "top_k": self.top_k, "seed": self.seed, "logprobs": self.logprobs}
        wrong = [
            f"{name}: {value!r} is no whole number: give one"
            for name, value in whole.items()
            if type(value) is not int and not (value is None and name in {"seed", "logprobs"})
        ]
        if not all(type(token) is int for token in self.prompt):
            wrong.append("prompt: it holds what is no token id: give whole numbers")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            wrong.append("stop: it is no tuple of texts: give them as (text, text)")
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            if not _is_number(value := getattr(self, name)):
                wrong.append(f"{name}: {value!r} is no number: give one")
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or not all(type(one) is int and _is_number(bias[one]) for one in bias):
            wrong.append("logit_bias: it is no mapping of token ids to numbers: give it as {token: bias}")
        if self.grammar is not None and (not isinstance(self.grammar, str) or self.schema is not None):
            wrong.append("grammar: no text, or beside a schema: give one of the two")
        if wrong:
            return wrong
        checks = {
            "prompt: it is empty: give at least one token": not self.prompt,
            f"prompt: a token that is not in the base's vocabulary of {vocabulary}: take it out": any(
                not 0 <= token < vocabulary for token in self.prompt
            ),
            f"max_tokens: {self.max_tokens} cannot be: ask for at least 1": self.max_tokens < 1,
            f"temperature: {self.temperature} cannot be: choose 0 to {HOTTEST}": not (
                math.isfinite(self.temperature) and 0 <= self.temperature <= HOTTEST
            ),
            f"top_k: {self.top_k} cannot be: choose 0 (all) or more": self.top_k < 0,
            f"top_p: {self.top_p} cannot be: choose above 0, up to 1": not 0 < self.top_p <= 1,
            f"min_p: {self.min_p} cannot be: choose 0 (off) to 1": not 0 <= self.min_p <= 1,
            f"presence_penalty: {self.presence_penalty} cannot be: choose -{MOST_PENALTY} to {MOST_PENALTY}": not abs(
                self.presence_penalty
            )
            <= MOST_PENALTY,
            f"frequency_penalty: {self.frequency_penalty} cannot be: choose -{MOST_PENALTY} to {MOST_PENALTY}": not abs(
                self.frequency_penalty
            )
            <= MOST_PENALTY,
            f"repetition_penalty: {self.repetition_penalty} cannot be: choose above 0, up to {MOST_PENALTY}": not 0
            < self.repetition_penalty
            <= MOST_PENALTY,
            f"logit_bias: a bias cannot be: choose -{MOST_BIAS} to {MOST_BIAS}, for at most {MOST_BIASES} tokens": len(
                bias
            )
            > MOST_BIASES
            or not all(abs(one) <= MOST_BIAS for one in bias.values()),
            f"seed: {self.seed} cannot be: choose 0 to 2**63 - 1": self.seed is not None and not 0 <= self.seed < 2**63,
            f"adapter_scale: {self.adapter_scale} cannot be: choose -{MOST_SCALE} to {MOST_SCALE}": not (
                math.isfinite(self.adapter_scale) and abs(self.adapter_scale) <= MOST_SCALE
            ),
            "stop: an empty text stops nothing: leave it out": any(not text for text in self.stop),
            f"stop: a text of more than {LONGEST_STOP} characters, or more than {MOST_STOPS} texts: shorten them": len(
                self.stop
            )
            > MOST_STOPS
            or any(len(text) > LONGEST_STOP for text in self.stop),
            f"logprobs: {self.logprobs} cannot be: choose 0 to {MOST_LOGPROBS}": self.logprobs is not None
            and not 0 <= self.logprobs <= MOST_LOGPROBS,
        }
        strange = [
            f"logit_bias: token {token} is not in the base's vocabulary of {vocabulary}: take it out"
            for token in bias
            if not 0 <= token < vocabulary
        ]
        return [problem for problem, wrong in checks.items() if wrong] + strange[:1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Token:
    """One token of an answer. logprob: natural, before temperature; top: the likeliest tokens with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Part of an answer: new text (maybe none yet), the tokens that came, and in the last one why it ended."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer. adapter: the version that gave it, as `name@3`; None: the bare base. known: tokens of the prompt
    whose keys and values were there already. waited, first, seconds: from submitting to its place in the batch, to
    the first token, to the end."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish
    adapter: str | None
    prompt_tokens: int
    known: int
    waited: float
    first: float
    seconds: float


@dataclass(eq=False)
class Answer:
    """An answer on its way: iterate over its pieces as they come, or wait for `result()`. `cancel()` ends it after the
    step in progress. Iterating raises what broke it off.

    listener: called instead with each part, in the engine's thread, and so must not wait; a Result or an error is the
    last. Then there is nothing to iterate over.
    """

    request: Request
    adapter: str | None
    listener: Callable[[Piece | Result | LorafitError], None] | None = None
    _pieces: queue.SimpleQueue[Piece | Result | LorafitError] = field(default_factory=queue.SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _result: Result | LorafitError | None = None

    def __iter__(self) -> Iterator[Piece]:
        while self._result is None:
            match self._pieces.get():
                case Piece() as piece:
                    yield piece
                case ended:
                    self._result = ended
                    self._pieces.put(ended)  # whoever else listens hears it too
        if isinstance(self._result, LorafitError):
            raise self._result

    def result(self) -> Result:
        """The whole answer, once it is there. Raises CancelledError where it was cancelled before its first token."""
        for _ in self:
            pass
        assert isinstance(self._result, Result)
        return self._result

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, part: Piece | Result | LorafitError) -> None:
        """The engine's side: what comes next; a Result or an error is the last."""
        if self.listener is None:
            self._pieces.put(part)
            return
        try:
            self.listener(part)
        except Exception:  # nobody listens any more; the others must not hear of it
            self.cancel()


def require_valid(request: Request, vocabulary: int, room: int) -> None:
    """Raise RequestError naming everything that cannot be about a request. room: tokens, prompt and answer together."""
    problems = request.problems(vocabulary)
    if len(request.prompt) >= room:
        problems.append(f"prompt: {len(request.prompt)} tokens leave no room for an answer within {room}: shorten it")
    if problems:
        raise RequestError("\n".join(problems))
