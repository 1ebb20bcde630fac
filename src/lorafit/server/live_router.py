"""The router of a server: trained again whenever its adapters change; features of a question in, an adapter out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lorafit import routing
from lorafit.adapters.formats import peft
from lorafit.errors import LorafitError, UnknownAdapterError
from lorafit.files import whole_file
from lorafit.routing import Routed, Router
from lorafit.serving import Engine

FILE = "router.safetensors"


class LiveRouter:
    """Keeps a router trained for the adapters that are live. folder: where it is stored; None: it is trained at every
    start."""

    def __init__(self, engine: Engine, folder: Path | None, say: Callable[[str], None]):
        self._engine, self._file, self._say = engine, folder / FILE if folder else None, say
        self._trained_for: dict[str, str] = {}
        self._others: torch.Tensor | None = None
        self.router: Router | None = None

    def look(self) -> None:
        """Train the router again where other adapters are live than before."""
        live = {version.name: version for version, is_live in self._engine.adapters.listed() if is_live}
        ids = {name: version.id for name, version in live.items()}
        if ids == self._trained_for:
            return
        contents = {}
        for name, version in live.items():
            if version.folder and (content := peft.routing_of(version.folder)):
                contents[name] = content
        key = routing.key_of(contents, self._engine.base.identity)
        try:
            if not (self.router and self.router.key == key):
                self.router = self._stored(key) or self._trained(contents, key)
        except LorafitError:
            self._trained_for = ids  # another try with the same adapters would fail in the same way
            raise
        self._trained_for = ids

    def _stored(self, key: str) -> Router | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            router = Router.from_bytes(self._file.read_bytes(), str(self._file))
        except LorafitError as error:
            self._say(str(error))
            return None
        return router if router.key == key else None

    def _trained(self, contents: dict[str, bytes], key: str) -> Router | None:
        if not contents:
            return None
        if self._others is None:
            self._others = self._engine.features(routing.elsewhere()).result()
        adapters, left_out = routing.learnable(contents, self._engine.base, self._others.shape[1])
        for name, why in left_out.items():
            self._say(f"the router leaves '{name}' out: {why}")
        if not adapters:
            return None
        router = self._engine.between_steps(routing.fitting(adapters, self._others, key)).result()
        try:
            if self._file is not None:
                with whole_file(self._file) as building:
                    building.write_bytes(router.to_bytes())
        except OSError as error:
            self._say(f"{self._file}: cannot be written ({error.strerror}): it is trained again at the next start")
        self._say(
            f"the router knows {', '.join(router.names)}: on validation {router.right:.1%} of their questions go "
            f"to them, and {router.kept_out:.1%} of others to the base"
        )
        return router

    def names(self, may_use: Callable[[str], bool]) -> set[str]:
        """The adapters that may be chosen now."""
        live = {version.name for version, is_live in self._engine.adapters.listed() if is_live}
        return {name for name in self.router.names if name in live and may_use(name)} if self.router else set()

    def route(self, features: torch.Tensor, may_use: Callable[[str], bool], base: str) -> Routed:
        """Choose among the live adapters that may be used, and the base, for the features (D,) of a question. Raises
        UnknownAdapterError where there is nothing to choose from."""
        router, names = self.router, self.names(may_use)
        if router is None or not names:
            why = "no adapter that you may use keeps questions that the router could learn from"
            raise UnknownAdapterError(f"'auto': {why}: name one of /v1/models")
        routed = router.route(features, names)
        if routed.adapter is None and not may_use(base):
            why = "the question belongs to no adapter that you may use"
            raise UnknownAdapterError(f"'auto': {why}: name one of /v1/models")
        return routed
