"""The engine's input and output: a Request goes in, and an Answer gives its Pieces and its Result."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.errors import LorafitError, RequestError

Finish = Literal["stop", "length", "cancelled"]
MOST_LOGPROBS = 20
HOTTEST, MOST_SCALE = 10, 8  # limits of temperature and adapter_scale
MOST_STOPS, LONGEST_STOP = 16, 256  # the text of each token is compared with all stop texts
MOST_PENALTY, MOST_BIAS, MOST_BIASES = 2, 100, 1024  # of these OpenAI has the first two


@dataclass(frozen=True)
class Request:
    """A request for one answer.

    Args:
        prompt: token ids, as a Renderer makes them.
        adapter: a name (its live version), a version such as `name@3`, or None for the bare base.
        adapter_scale: factor of what the adapter adds.
        max_tokens: of the answer.
        temperature: that logits are divided by; 0: always the most probable token.
        top_k: draw only from this number of the most probable tokens; 0: from all.
        top_p: draw only from the most probable tokens that together have this probability.
        min_p: draw only from tokens at least this many times as probable as the most probable one.
        presence_penalty: subtracted from the logits of tokens that the answer holds.
        frequency_penalty: subtracted from them once for each time that the answer holds the token.
        repetition_penalty: divides the logits of tokens in prompt and answer (multiplies negative ones).
        logit_bias: added to the logits of tokens, by id, before the penalties.
        seed: of the draws; None: a new one each time.
        stop: texts before which the answer ends.
        ignore_end: whether to continue after the token that ends a turn.
        logprobs: the number of most probable tokens whose natural log-probabilities, before temperature, are returned
            for each token, in addition to its own; None: none at all.
        schema: a JSON schema that the answer follows.
        grammar: instead of a schema, a grammar in llguidance's dialect of Lark.
        special: special tokens that become part of the text; all others are left out.
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
        """The problems of this request, each with what to do. vocabulary: size of the base's."""
        integers = {"max_tokens": self.max_tokens, "top_k": self.top_k, "seed": self.seed, "logprobs": self.logprobs}
        wrong = [
            f"{name}: {value!r} is not a whole number: give one"
            for name, value in integers.items()
            if type(value) is not int and not (value is None and name in {"seed", "logprobs"})
        ]
        if not all(type(token) is int for token in self.prompt):
            wrong.append("prompt: not all of it are token ids: give whole numbers")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            wrong.append("stop: not a tuple of texts: give them as (text, text)")
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            if not _is_number(value := getattr(self, name)):
                wrong.append(f"{name}: {value!r} is not a number: give one")
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or not all(type(token) is int and _is_number(bias[token]) for token in bias):
            wrong.append("logit_bias: not a mapping of token ids to numbers: give it as {token: bias}")
        if self.grammar is not None and (not isinstance(self.grammar, str) or self.schema is not None):
            wrong.append("grammar: not a text, or given together with a schema: give one of the two")
        if wrong:
            return wrong
        above_zero = f"choose above 0, up to {MOST_PENALTY}"
        ranges = (  # the setting, whether its value is valid, what to do
            ("max_tokens", self.max_tokens >= 1, "ask for at least 1"),
            ("temperature", 0 <= self.temperature <= HOTTEST, f"choose 0 to {HOTTEST}"),
            ("top_k", self.top_k >= 0, "choose 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "choose above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "choose 0 (off) to 1"),
            ("presence_penalty", abs(self.presence_penalty) <= MOST_PENALTY, _up_to(MOST_PENALTY)),
            ("frequency_penalty", abs(self.frequency_penalty) <= MOST_PENALTY, _up_to(MOST_PENALTY)),
            ("repetition_penalty", 0 < self.repetition_penalty <= MOST_PENALTY, above_zero),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "choose 0 to 2**63 - 1"),
            ("adapter_scale", abs(self.adapter_scale) <= MOST_SCALE, _up_to(MOST_SCALE)),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"choose 0 to {MOST_LOGPROBS}"),
        )
        biases = len(bias) <= MOST_BIASES and all(abs(value) <= MOST_BIAS for value in bias.values())
        stops = len(self.stop) <= MOST_STOPS and all(len(text) <= LONGEST_STOP for text in self.stop)
        known = all(0 <= token < vocabulary for token in self.prompt)
        checks = {
            "prompt: it is empty: give at least one token": bool(self.prompt),
            f"prompt: a token that is not in the base's vocabulary of {vocabulary}: take it out": known,
            **{f"{name}: {getattr(self, name)} is out of range: {fix}": valid for name, valid, fix in ranges},
            f"logit_bias: out of range: {_up_to(MOST_BIAS)}, for at most {MOST_BIASES} tokens": biases,
            "stop: an empty text stops nothing: leave it out": all(self.stop),
            f"stop: more than {MOST_STOPS} texts, or one of more than {LONGEST_STOP} characters: shorten them": stops,
        }
        unknown = [
            f"logit_bias: token {token} is not in the base's vocabulary of {vocabulary}: take it out"
            for token in bias
            if not 0 <= token < vocabulary
        ]
        return [problem for problem, valid in checks.items() if not valid] + unknown[:1]


def _up_to(most: int) -> str:
    return f"choose -{most} to {most}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Token:
    """One token of an answer. logprob: natural, before temperature; top: the most probable tokens with theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Part of an answer: its new text, which may be empty, its new tokens, and in the last piece why it ended."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer.

    Args:
        text: without the stop text.
        tokens: of the answer.
        finish: why it ended.
        adapter: the version that gave it, as `name@3`; None: the bare base.
        prompt_tokens: number of tokens of the prompt.
        known: of these, those whose keys and values were there already.
        waited: seconds from submitting to its place in the batch.
        first: seconds from submitting to the first token.
        seconds: from submitting to the end.
    """

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
    """An answer in progress: iterate over its pieces as they come, or wait for `result()`. Iterating raises the error
    that ended it. `cancel()` ends it after the present step.

    Args:
        request: that is answered.
        adapter: the version that answers, as `name@3`; None: the bare base.
        listener: called with each part instead, and last with a Result or an error; then there is nothing to iterate
            over. It is called in the engine's thread, and must not wait.
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
                    self._pieces.put(ended)  # for other threads that iterate
        if isinstance(self._result, LorafitError):
            raise self._result

    def result(self) -> Result:
        """Wait for the whole answer. Raises CancelledError where it was cancelled before its first token."""
        for _ in self:
            pass
        assert isinstance(self._result, Result)
        return self._result

    def cancel(self) -> None:
        """End the answer after the present step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, part: Piece | Result | LorafitError) -> None:
        """Called by the engine with the next part; a Result or an error is the last."""
        if self.listener is None:
            self._pieces.put(part)
            return
        try:
            self.listener(part)
        except Exception:  # the listener is broken, which must not affect other requests
            self.cancel()


def require_valid(request: Request, vocabulary: int, room: int) -> None:
    """Raise RequestError with all problems of a request. room: tokens of prompt and answer together."""
    problems = request.problems(vocabulary)
    if len(request.prompt) >= room:
        problems.append(f"prompt: {len(request.prompt)} tokens leave no room for an answer within {room}: shorten it")
    if problems:
        raise RequestError("\n".join(problems))
