"""A conversation with a server that speaks OpenAI's API, lorafit's or another's."""

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

PATIENCE = 120.0  # seconds without a word from the server
ALONE = "{} {} trained on single questions: each is asked by itself; /remember asks along what was said"


@dataclass
class Remote:
    """url: of the API, with or without /v1. model: who answers; None: the first the server names. remembers: what was
    said before is asked along also of an adapter that was trained on single questions."""

    url: str
    model: str | None = None
    key: str | None = None
    system: str | None = None
    max_tokens: int = 256
    history: list[dict[str, str]] = field(default_factory=list)
    remembers: bool = False

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise SettingsError(f"--url {self.url}: no address of a server: give http://HOST:PORT")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise SettingsError(
                "LORAFIT_KEY: no key, for it holds more than letters and signs: set it to one key alone"
            )
        self.url = self.url.rstrip("/").removesuffix("/v1")
        cards = self._asked("/v1/models", None)["data"]
        self.models = [str(card["id"]) for card in cards]
        self._single = {str(card["id"]) for card in cards if card.get("single")}  # which other servers do not say
        if not self.models:
            raise SettingsError(f"--url {self.url}: the server serves no model: ask its operator")
        self.model = self.model or self.models[0]

    def remark(self) -> str:
        """What is to be said of who answers; "" where there is nothing."""
        return ALONE.format(self.model, "was") if self._asks_alone() else ""

    def _asks_alone(self) -> bool:
        """Whether each question is asked by itself."""
        return self.model in self._single and not self.remembers

    def ask(self, text: str, emit: Callable[[str], None]) -> None:
        """Let the server answer. emit: called with each piece of text, of reasoning first where there is some, which is
        not remembered; nor is an answer that fails."""
        turn = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        before = [] if self._asks_alone() else self.history
        body = {
            "model": self.model,
            "messages": [*system, *before, turn],
            "max_tokens": self.max_tokens,
            "stream": True,
        }
        said: list[str] = []
        thought = False
        try:
            with self._open("/v1/chat/completions", body) as answer:
                for told in _events(answer):
                    if "error" in told:
                        raise CancelledError(f"{self.url}: {told['error']['message']}: ask again")
                    for choice in told.get("choices") or ():
                        delta = choice.get("delta") or {}
                        if piece := delta.get("reasoning_content"):
                            thought = True
                            emit(piece)
                        if piece := delta.get("content"):
                            emit(f"\n\n{piece}" if thought and not said else piece)
                            said.append(piece)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, LorafitError):
                raise
            raise CancelledError(f"{self.url}: the answer broke off ({error!r}): ask again") from error
        self.history += [turn, {"role": "assistant", "content": "".join(said)}]

    def _asked(self, path: str, body: Any) -> Any:
        with self._open(path, body) as answer:
            return json.load(answer)

    def _open(self, path: str, body: Any) -> Any:
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return urllib.request.urlopen(request, timeout=PATIENCE)
        except urllib.error.HTTPError as refused:
            told = _message(refused.read())
            if refused.code == 401:
                raise SettingsError(f"{self.url}: {told}: set LORAFIT_KEY to a key of the server") from refused
            if refused.code in {429, 503}:
                raise BusyError(f"{self.url}: {told}") from refused
            raise SettingsError(f"{self.url}: {told}") from refused
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise SettingsError(
                f"--url {self.url}: no server answers there ({reason}): start one with lorafit serve"
            ) from error


def _events(answer: Iterable[bytes]) -> Iterator[Any]:
    """What a stream of server-sent events tells until [DONE]: an event's data may be several lines, each with a space
    after the colon or without one. Raises ConnectionError where it ends before."""
    data: list[str] = []
    for line in chain(answer, (b"",)):
        field, _, value = line.decode().rstrip("\r\n").partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        if data == ["[DONE]"]:
            return
        if not (field or value) and data:  # an empty line ends an event, one that begins with a colon says nothing
            yield json.loads("\n".join(data))
            data = []
    raise ConnectionError("it ended in the middle")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "it refused, and did not say why"
