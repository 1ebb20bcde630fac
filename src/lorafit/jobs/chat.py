"""Chat with a base and its adapters: lines that the user types go in, pieces of answers come out."""

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
from lorafit.server.client import ALONE as SINGLE_QUESTIONS
from lorafit.serving import Engine, Request

BASE = "base"
LONGEST = 8192  # tokens of a conversation, for which the keys and values of a large base take a gigabyte
HELP = """/base            only the bare base answers
/adapter [NAME]  only that adapter answers; NAME may be the folder of another adapter
/both            base and adapter answer, one after the other
/remember        send the whole conversation also to an adapter that was trained on single questions; again: stop that
/new             forget the conversation
/quit            leave (also Ctrl-D)
Ctrl-C           stop an answer, or drop the line; twice at an empty line: leave"""

Emit = Callable[[str], None]


@dataclass
class Chat:
    """The speakers (the base and the open adapters) and their conversations. Each speaker has its own history, which
    holds only its own answers.

    Args:
        base: The base.
        system: The system prompt; None for that of the adapter or the template.
        max_new_tokens: The longest answer, in tokens.
        accept_unknown_base: Attach adapters that do not say which base they belong to.
        template: Settings of the base's chat template, for speakers that were not trained with others.
        adapters: The open adapters, by name.
        folders: Their folders, by name.
        speaking: Names of the speakers that answer the next question.
        histories: Messages by speaker.
        remembers: Send the whole conversation also to adapters that were trained on single questions.
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
        """Open an adapter and let only it answer; returns its name. Raises what reading and attaching raise, and then
        changes nothing.

        Args:
            folder: An adapter folder, or a run.
        """
        peft.require_writes(folder)
        folder = peft.adapter_folder(folder)
        adapter = peft.read(folder)
        require_fits(self.base, adapter, accept_unknown_base=self.accept_unknown_base)
        self._renderer(adapter)  # raises if it was trained with another chat template
        folder = folder.resolve()
        folder = folder.parent if folder.name == "adapter" else folder
        name = self._name(folder)
        self.adapters[name], self.folders[name], self.speaking = adapter, folder, (name,)
        return name

    def _name(self, folder: Path) -> str:
        """The shortest end of the folder's path that is not the name of another speaker."""
        ends = (str(Path(*folder.parts[-n:])) for n in range(1, len(folder.parts) + 1))
        return next(name for name in ends if name != BASE and self.folders.get(name, folder) == folder)

    def _renderer(self, adapter: Adapter | None) -> Renderer:
        like = adapter.rendering if adapter else None
        settings = () if like else self.template
        return renderer_for(self.base, self.system, like, settings=settings, reasoning=True)

    def command(self, line: str) -> str:
        """Run a command, a line that begins with a slash; returns its message. Raises SettingsError for an unknown
        command."""
        word, _, name = line.strip().partition(" ")
        name = name.strip()
        if word == "/new":
            self.histories.clear()
            return "forgotten"
        if word == "/help":
            return HELP
        if word == "/remember":
            self.remembers = not self.remembers
            return (
                "the whole conversation is sent"
                if self.remembers
                else self.remark() or "each is asked as it was trained"
            )
        if word == "/base":
            self.speaking = (BASE,)
        elif word in {"/adapter", "/both"}:
            chosen = self._choose(name)
            self.speaking = (BASE, chosen) if word == "/both" else (chosen,)
            message = f"answering: {' and '.join(self.speaking)}{self._which(chosen)}"
            return "\n".join(filter(None, (message, self.remark())))
        else:
            raise SettingsError(f"{word}: no such command: type one of\n{HELP}")
        return f"answering: {' and '.join(self.speaking)}"

    def remark(self) -> str:
        """Names the speakers that get each question without the conversation before it; "" if there are none."""
        names = [name for name in self.speaking if self._takes_single_questions(name)]
        return SINGLE_QUESTIONS.format(" and ".join(names), "was" if len(names) == 1 else "were") if names else ""

    def _takes_single_questions(self, name: str) -> bool:
        """Whether the speaker gets each question without the conversation before it."""
        adapter = self.adapters.get(name)
        return not self.remembers and bool(adapter and adapter.rendering and adapter.rendering.single)

    def _choose(self, name: str) -> str:
        if name and name not in self.adapters:
            return self.add(Path(name))
        known = [name] if name else [*(speaker for speaker in self.speaking if speaker != BASE), *self.adapters][:1]
        if not known:
            raise SettingsError("no adapter is open: open one with /adapter FOLDER")
        return known[0]

    def _which(self, name: str) -> str:
        """Says which adapter a name means, if it could mean another."""
        folder = self.folders[name]
        if name != folder.name:
            return f" ({folder.name} is another)"
        alike = any(other.name == name for other in self.folders.values() if other != folder)
        return f" (from {folder})" if alike or Path(name).is_dir() else ""

    def ask(
        self, text: str, emit: Emit, begin: Emit = lambda name: None, end: Callable[[], None] = lambda: None
    ) -> None:
        """Let every speaker answer. A turn that is refused, or stopped before its first word, is not remembered.

        Args:
            text: The question.
            emit: Called with each piece of an answer.
            begin: Called with the name of the next speaker, before its answer.
            end: Called after each answer.

        Raises:
            SettingsError: The question cannot be asked, for example because it is too long.
        """
        _require_unicode(text)
        for name in self.speaking:
            begin(name)
            adapter = self.adapters.get(name)
            renderer = self._renderer(adapter)
            history = self.histories.setdefault(name, [])
            history.append(Message("user", text))
            pieces: list[str] = []
            ended = False

            def keep_and_emit(piece: str, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                emit(piece)

            try:
                prompt = self._fitting(renderer, history[-1:] if self._takes_single_questions(name) else history)
                self._speak(adapter, renderer, prompt, self._room(len(prompt)), keep_and_emit)
                ended = True
            finally:
                reasoning, answer = parted("".join(pieces), renderer.thought)
                if answer or reasoning or ended:  # a stopped answer is kept, too
                    history.append(Message("assistant", answer, reasoning=reasoning))
                else:
                    history.pop()
            end()

    def _speak(self, adapter: Adapter | None, renderer: Renderer, prompt: list[int], room: int, emit: Emit) -> None:
        """Answer with the engine, which caches the conversation, or without it if it does not serve the base or the
        adapter."""
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
        answer = self._engine.submit(Request(tuple(prompt), name, max_tokens=room, special=renderer.special))
        try:
            for piece in answer:
                if piece.text:
                    emit(piece.text)
        finally:
            answer.cancel()

    def close(self) -> None:
        """Close the engine, which holds the base."""
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
        """The conversation as a prompt. The oldest turns are removed from `history` until the answer has room for
        `max_new_tokens`, or half of the base's context; the last question always stays."""
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
    """Raise SettingsError for bytes that are not UTF-8, which Python keeps as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        fix = "type it again, or convert the file: iconv -f WINDOWS-1252 -t UTF-8"
        raise SettingsError(f"the line is not UTF-8 (byte 0x{byte:02x}): {fix}") from error
