"""A conversation with a server that speaks OpenAI's API: a question in, pieces of its answer out."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import chain
from typing import Any

from lorafit.errors import BusyError, CancelledError, LorafitError, SettingsError

PATIENCE = 120.0  # seconds to wait for the server's next bytes
ALONE = "{} {} trained on single questions: each is asked on its own; /remember includes the conversation before it"


@dataclass
class Remote:
    """A conversation with one model of a server.

    Args:
        url: of the API, with or without /v1.
        model: that answers; None: the first of the server's list.
        system: the system prompt; "": none at all; None: the adapter's own.
        remembers: whether an adapter trained on single questions gets the conversation before a question too.

    Raises:
        SettingsError: an invalid address or key, or a server that does not answer or serves no model.
    """

    url: str
    model: str | None = None
    key: str | None = None
    system: str | None = None
    max_tokens: int = 256
    history: list[dict[str, str]] = field(default_factory=list)
    remembers: bool = False

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SettingsError(f"--url {self.url}: not an address of a server: give http://HOST:PORT")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise SettingsError("LORAFIT_KEY: not a key, since a key is printable ASCII: set it to one key only")
        self.url = self.url.rstrip("/").removesuffix("/v1")
        with self._open("/v1/models", None) as answer:
            cards = json.load(answer)["data"]
        self.models = [str(card["id"]) for card in cards]
        self._ours = any("single" in card for card in cards)  # a field of lorafit's servers only
        self._single = {str(card["id"]) for card in cards if card.get("single")}
        if not self.models:
            raise SettingsError(f"--url {self.url}: the server serves no model: ask its operator")
        self.model = self.model or self.models[0]

    def remark(self) -> str:
        """A remark about the model that answers; "" without one."""
        return ALONE.format(self.model, "was") if self._asks_alone() else ""

    def _asks_alone(self) -> bool:
        """Whether each question is sent without the conversation before it."""
        return self.model in self._single and not self.remembers

    def ask(self, text: str, emit: Callable[[str], None]) -> None:
        """Ask a question. emit: called with each piece of the answer, those of its reasoning first. Reasoning, and an
        answer that fails, do not become part of the conversation. Raises BusyError, CancelledError for an answer that
        broke off, and SettingsError for a request that the server refuses."""
        turn = {"role": "user", "content": text}
        # To a server of lorafit, an empty system message is one that was not written.
        none = self.system == "" and self._ours
        system = [] if self.system is None or none else [{"role": "system", "content": self.system}]
        before = [] if self._asks_alone() else self.history
        body = {
            "model": self.model,
            "messages": [*system, *before, turn],
            "max_tokens": self.max_tokens,
            "stream": True,
            **({"no_system": True} if none else {}),
        }
        pieces: list[str] = []
        reasoned = False
        try:
            with self._open("/v1/chat/completions", body) as answer:
                for event in _events(answer):
                    if "error" in event:
                        raise CancelledError(f"{self.url}: {event['error']['message']}: ask again")
                    for choice in event.get("choices") or ():
                        delta = choice.get("delta") or {}
                        if piece := delta.get("reasoning_content"):
                            reasoned = True
                            emit(piece)
                        if piece := delta.get("content"):
                            emit(f"\n\n{piece}" if reasoned and not pieces else piece)
                            pieces.append(piece)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, LorafitError):
                raise
            raise CancelledError(f"{self.url}: the answer broke off ({error!r}): ask again") from error
        self.history += [turn, {"role": "assistant", "content": "".join(pieces)}]

    def _open(self, path: str, body: Any) -> Any:
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=PATIENCE)
        except urllib.error.HTTPError as refusal:
            message = _message(refusal.read())
            if refusal.code == 401:
                raise SettingsError(f"{self.url}: {message}: set LORAFIT_KEY to a key of the server") from refusal
            raise (BusyError if refusal.code in {429, 503} else SettingsError)(f"{self.url}: {message}") from refusal
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise SettingsError(
                f"--url {self.url}: no server answers at this address ({reason}): start one with lorafit serve"
            ) from error


def _events(answer: Iterable[bytes]) -> Iterator[Any]:
    """The data of server-sent events until [DONE], parsed from JSON. The data of an event may be several lines, with or
    without a space after the colon. Raises ConnectionError where the stream ends before [DONE]."""
    data: list[str] = []
    for line in chain(answer, (b"",)):
        field, _, value = line.decode().rstrip("\r\n").partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        if data == ["[DONE]"]:
            return
        if not (field or value) and data:  # an empty line ends an event; one that begins with a colon is a comment
            yield json.loads("\n".join(data))
            data = []
    raise ConnectionError("it ended in the middle")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "it refused without a reason"
