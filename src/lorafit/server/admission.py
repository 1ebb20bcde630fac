"""What every route settles before it answers: whose request it is, whether anyone can answer, and who."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import HTTPException
from fastapi import Request as HttpRequest

from lorafit.errors import RequestError, UnknownAdapterError
from lorafit.server.guard import SOON
from lorafit.server.keys import Key
from lorafit.server.service import Service
from lorafit.serving import Version


def key_of(request: HttpRequest) -> Key:
    key: Key = request.state.key
    return key


def chosen(service: Service, key: Key, model: str) -> Version | None:
    """The version that a key may ask by this name; None: the bare base. Raises UnknownAdapterError, in the same words
    whether there is none, or none for this key."""
    try:
        if model == service.base or key.may_use(model.partition("@")[0]):
            version = service.chosen(model)
            if version is not None or key.may_use(service.base):
                return version
    except UnknownAdapterError:
        pass
    raise unknown(model)


def unknown(model: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"'{model[:80]}': no model is served by this name: see /v1/models")


def require_tokens(service: Service, tokens: Sequence[int]) -> None:
    """Raises RequestError for what is no token of the base."""
    most = service.engine.vocabulary
    if wrong := [token for token in tokens if not 0 <= token < most]:
        raise RequestError(f"tokens: {wrong[0]} is not in the base's vocabulary of {most}: take it out")


def require_ready(service: Service) -> None:
    """Raises HTTPException while nothing can be answered."""
    if service.phase != "ready":
        why = {
            "loading": "the base is being opened",
            "draining": "the server is ending",
            "dead": "the server has failed",
        }
        raise HTTPException(503, f"{why[service.phase]}: ask again later", {"retry-after": SOON})
