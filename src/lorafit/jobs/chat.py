"""A conversation with a base and its adapters, rendered as they were trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Scalar
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fits
from lorafit.bases.base import Base
from lorafit.data.examples import Message
from lorafit.data.render import Renderer, renderer_for
from lorafit.data.thoughts import parted
from lorafit.errors import NotServedError, SettingsError
from lorafit.generation.greedy import stream
from lorafit.server.client import ALONE
from lorafit.serving import Engine, Request

BASE = "base"
LONGEST = 8192  # tokens of a conversation: keys and values of a large base take a gigabyte for them
HELP = """/base            only the bare base answers
/adapter [NAME]  only that adapter answers; NAME may be the folder of another one
/both            base and adapter answer, one after the other
/remember        keep in mind what was said also for an adapter that was trained on single questions, or no more
/new             forget the conversation
/quit            leave (also Ctrl-D)
Ctrl-C           stop an answer, or drop the line; twice at an empty line: leave"""

Emit = Callable[[str], None]


@dataclass
class Chat:
    """Who answers, and what each has said. Every speaker keeps a history of its own: its answers, not another's.

    accept_unknown_base: attach adapters that do not say which base they belong to. template: settings of the base's
    chat template, for who was not trained with others. remembers: what was said before is asked along also of an
    adapter that was trained on single questions, which has never seen an answer of its own.
    """

    base: Base
    system: str | None = None
    max_new_tokens: int = 256
    accept_unknown_base: bool = False
    template: tuple[tuple[str, Scalar], ...] = ()
    adapters: dict[str, Adapter] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    speaking: tuple[str, ...] = (BASE,)
    histories: dict[str, list[Message]] = field(default_factory=dict)
    remembers: bool = False
    _engine: Engine | None = None
    _tried: bool = False

    def add(self, folder: str | Path) -> str:
        """Read an adapter, or a run's, and let it speak; returns the name it got. Raises what reading and attaching
        raise: an adapter that does not fit is never half there."""
        folder = peft.adapter_folder(folder)
        adapter = peft.read(folder)
        require_fits(self.base, adapter, accept_unknown_base=self.accept_unknown_base)
        self._renderer(adapter)  # which must be the one that it was trained with
        folder = folder.resolve()
        folder = folder.parent if folder.name == "adapter" else folder
        name = self._name(folder)
        self.adapters[name], self.folders[name], self.speaking = adapter, folder, (name,)
        return name

    def _name(self, folder: Path) -> str:
        """The end of the folder's path, as much of it as no other speaker is called by."""
        ends = (str(Path(*folder.parts[-n:])) for n in range(1, len(folder.parts) + 1))
        return next(name for name in ends if name != BASE and self.folders.get(name, folder) == folder)

    def _renderer(self, adapter: Adapter | None) -> Renderer:
        like = adapter.rendering if adapter else None
        settings = () if like else self.template
        return renderer_for(self.base, self.system, like, settings=settings, reasoning=True)

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; returns what there is to say. Raises SettingsError for others."""
        word, _, name = line.strip().partition(" ")
        name = name.strip()
        if word == "/new":
            self.histories.clear()
            return "forgotten"
        if word == "/help":
            return HELP
        if word == "/remember":
            self.remembers = not self.remembers
            return "what was said is asked along" if self.remembers else self.remark() or "each is asked as trained"
        if word == "/base":
            self.speaking = (BASE,)
        elif word in {"/adapter", "/both"}:
            chosen = self._choose(name)
            self.speaking = (BASE, chosen) if word == "/both" else (chosen,)
            said = f"answering: {' and '.join(self.speaking)}{self._told_apart(chosen)}"
            return "\n".join(filter(None, (said, self.remark())))
        else:
            raise SettingsError(f"{word}: no such command: type one of\n{HELP}")
        return f"answering: {' and '.join(self.speaking)}"

    def remark(self) -> str:
        """What is to be said of those who answer; "" where there is nothing."""
        alone = [name for name in self.speaking if self._asks_alone(name)]
        return ALONE.format(" and ".join(alone), "was" if len(alone) == 1 else "were") if alone else ""

    def _asks_alone(self, name: str) -> bool:
        """Whether each question is asked by itself."""
        adapter = self.adapters.get(name)
        return not self.remembers and bool(adapter and adapter.rendering and adapter.rendering.single)

    def _choose(self, name: str) -> str:
        if name and name not in self.adapters:
            return self.add(Path(name))
        known = [name] if name else [*(one for one in self.speaking if one != BASE), *self.adapters][:1]
        if not known:
            raise SettingsError("no adapter is open: open one with /adapter FOLDER")
        return known[0]

    def _told_apart(self, name: str) -> str:
        """Which one a name means, where it could mean another."""
        folder = self.folders[name]
        if name != folder.name:
            return f" ({folder.name} is another)"
        alike = any(other.name == name for other in self.folders.values() if other != folder)
        return f" (from {folder})" if alike or Path(name).is_dir() else ""

    def ask(
        self, text: str, emit: Emit, begin: Emit = lambda name: None, end: Callable[[], None] = lambda: None
    ) -> None:
        """Let everyone who speaks answer. emit: called with each piece of text; begin: with the name of who begins to
        speak; end: when it has spoken. Raises SettingsError for what cannot be asked. A turn that is refused, or
        stopped before its first word, is not remembered."""
        _require_unicode(text)
        for name in self.speaking:
            begin(name)
            adapter = self.adapters.get(name)
            renderer = self._renderer(adapter)
            history = self.histories.setdefault(name, [])
            history.append(Message("user", text))
            said: list[str] = []
            ended = False

            def told(piece: str, said: list[str] = said) -> None:
                said.append(piece)
                emit(piece)

            try:
                prompt = self._fitting(renderer, history[-1:] if self._asks_alone(name) else history)
                self._speak(adapter, renderer, prompt, self._room(len(prompt)), told)
                ended = True
            finally:
                reasoning, answer = parted("".join(said), renderer.thought)
                if answer or reasoning or ended:  # one that was stopped stays, as far as it came
                    history.append(Message("assistant", answer, reasoning=reasoning))
                else:
                    history.pop()
            end()

    def _speak(self, adapter: Adapter | None, renderer: Renderer, prompt: list[int], room: int, emit: Emit) -> None:
        """Answer by the engine, which keeps what it has read of a conversation; without, where it refuses the base, or
        does not serve the adapter."""
        served = adapter is None or adapter.plan.is_product
        if not served:  # the engine has the model to itself while it is open
            self.close()
            self._engine, self._tried = None, False
        if served and not self._tried:
            self._tried = True
            with suppress(NotServedError):
                self._engine = Engine(
                    self.base,
                    slots=2,
                    room=min(self.base.context or LONGEST, LONGEST),
                    accept_unknown_base=self.accept_unknown_base,
                )
        if not served or self._engine is None:
            on = attach(self.base, adapter, accept_unknown_base=self.accept_unknown_base) if adapter else nullcontext()
            with on:
                stream(self.base, renderer, prompt, room, emit)
            return
        name = None
        if adapter is not None:
            name = adapter.digest()
            if name not in {version.name for version, _ in self._engine.adapters.listed()}:
                self._engine.load(name, adapter)
        answer = self._engine.submit(Request(tuple(prompt), name, max_tokens=room, special=renderer.told))
        try:
            for piece in answer:
                if piece.text:
                    emit(piece.text)
        finally:
            answer.cancel()

    def close(self) -> None:
        """Let go of the base."""
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _room(self, taken: int) -> int:
        """The longest answer, in tokens, after a prompt of `taken` tokens."""
        return min(self.max_new_tokens, min(self.base.context or LONGEST, LONGEST) - taken)

    def _fitting(self, renderer: Renderer, history: list[Message]) -> list[int]:
        """The conversation as a prompt. Its oldest turns are forgotten where they would leave an answer less than it
        may have, or than half of the base's context; the last one may leave it less."""
        kept = list(history)
        while True:
            prompt = renderer.prompt_ids(kept)
            room, context = self._room(len(prompt)), min(self.base.context or LONGEST, LONGEST)
            if room >= min(self.max_new_tokens, context // 2) or (len(kept) < 3 and room > 0):
                history[:] = kept
                return prompt
            if len(kept) < 3:
                raise SettingsError(f"{len(prompt)} tokens do not fit the base's {context}: ask shorter")
            del kept[:2]


def _require_unicode(text: str) -> None:
    """Raise SettingsError for bytes that were no text, which Python keeps as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        fix = "type it again, or convert the file: iconv -f WINDOWS-1252 -t UTF-8"
        raise SettingsError(f"the line is not UTF-8 (byte 0x{byte:02x}): {fix}") from error
