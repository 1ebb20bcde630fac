"""Checks that routes share: a request's key, the adapter version that it names, and whether the server is ready."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastapi import HTTPException
from fastapi import Request as HttpRequest

from lorafit.errors import RequestError, UnknownAdapterError
from lorafit.server.hosted import Hosted
from lorafit.server.keys import Key
from lorafit.server.refusals import SOON
from lorafit.server.service import Service
from lorafit.serving import Version


def key_of(request: HttpRequest) -> Key:
    key: Key = request.state.key
    return key


def chosen(service: Service, key: Key, model: str) -> Version | None:
    """The version that `model` means; None: the bare base. Raises UnknownAdapterError, with the same message whether
    there is no such model or the key may not use it."""
    try:
        if model == service.base or key.may_use(model.partition("@")[0]):
            version = service.chosen(model)
            if version is not None or key.may_use(service.base):
                return version
    except UnknownAdapterError:
        pass
    raise unknown(model)


def unknown(model: str) -> UnknownAdapterError:
    return UnknownAdapterError(f"'{model[:80]}': no model has this name: see /v1/models")


def require_tokens(service: Service, tokens: Sequence[int]) -> None:
    """Raise RequestError for an id outside the vocabulary of the base."""
    size = service.engine.vocabulary
    if wrong := [token for token in tokens if not 0 <= token < size]:
        raise RequestError(f"tokens: {wrong[0]} is not in the base's vocabulary of {size}: take it out")


def require_quota(service: Hosted, key: Key, requests: int, tokens: int) -> None:
    """Charge the quota of a key. Raises HTTPException where it is used up."""
    if wait := service.quota.take(key, requests, tokens):
        raise HTTPException(
            429,
            f"the quota of the key '{key.name}' is used up: ask again in {math.ceil(wait)} s",
            {"retry-after": str(math.ceil(wait))},
        )


def require_ready(service: Hosted) -> None:
    """Raise HTTPException while nothing can be answered."""
    why = {"loading": "the base is being opened", "draining": "the server is stopping", "dead": "the server has failed"}
    if service.phase in why:
        raise HTTPException(503, f"{why[service.phase]}: ask again later", {"retry-after": SOON})
