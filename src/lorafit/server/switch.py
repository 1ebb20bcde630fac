"""The router of a server, kept up to the adapters it serves, and the version that a question goes to."""

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


class Switch:
    """folder: where the router is kept, beside the registry; None: it is trained at every start."""

    def __init__(self, engine: Engine, folder: Path | None, say: Callable[[str], None]):
        self._engine, self._file, self._say = engine, folder / FILE if folder else None, say
        self._seen: dict[str, str] = {}
        self._others: torch.Tensor | None = None
        self.router: Router | None = None

    def look(self) -> None:
        """Train the router anew where other adapters are live than before."""
        live = {version.name: version for version, is_live in self._engine.adapters.listed() if is_live}
        seen = {name: version.id for name, version in live.items()}
        if seen == self._seen:
            return
        contents = {}
        for name, version in live.items():
            if version.folder and (content := peft.routing_of(version.folder)):
                contents[name] = content
        key = routing.key_of(contents, self._engine.base.identity)
        try:
            if not (self.router and self.router.key == key):
                self.router = self._kept(key) or self._trained(contents, key)
        except LorafitError:
            self._seen = seen  # what cannot be learnt from now cannot be the next time
            raise
        self._seen = seen

    def _kept(self, key: str) -> Router | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            kept = Router.from_bytes(self._file.read_bytes(), str(self._file))
        except LorafitError as error:
            self._say(str(error))
            return None
        return kept if kept.key == key else None

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
        router = self._engine.aside(routing.fitting(adapters, self._others, key)).result()
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
        """Of adapters that may be chosen now."""
        live = {version.name for version, is_live in self._engine.adapters.listed() if is_live}
        return {name for name in self.router.names if name in live and may_use(name)} if self.router else set()

    def route(self, features: torch.Tensor, may_use: Callable[[str], bool], base: str) -> Routed:
        """Where a question of these features goes, of the adapters that are live and allowed. Raises
        UnknownAdapterError where there is nothing to choose from."""
        router, names = self.router, self.names(may_use)
        if router is None or not names:
            raise UnknownAdapterError(
                "'auto': no adapter that you may use keeps questions that the router could learn "
                "from: name one of /v1/models"
            )
        routed = router.route(features, names)
        if routed.adapter is None and not may_use(base):
            raise UnknownAdapterError(
                "'auto': this is a question for no adapter that you may use: name one of /v1/models"
            )
        return routed
