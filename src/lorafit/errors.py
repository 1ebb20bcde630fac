"""Every error lorafit raises on purpose. Each is also the standard library's type for its kind.

    LorafitError
    ├── InputError (ValueError)              what was given cannot be used: exit status 2
    │   ├── DataError                        examples; holds every problem found, each with file:line
    │   ├── SettingsError                    a flag or setting
    │   ├── TargetError (LookupError)        a target that matches no site, or one that never fires
    │   ├── PlanError                        a rank, scale or variant that cannot be
    │   ├── BaseError                        a base that cannot be opened
    │   │   ├── NotCausalError               a base that sees what it is to predict
    │   │   └── NotServedError               a base that the engine does not serve
    │   ├── AdapterError                     an adapter that does not fit its plan or its base
    │   ├── FormatError                      a file that is not what its name says
    │   ├── RunError (FileExistsError)       a run folder that cannot be used
    │   ├── DivergedError (ArithmeticError)  a learning rate at which training left the numbers
    │   ├── RequestError                     a request that cannot be served as it is
    │   └── UnknownAdapterError (LookupError)  a name by which no adapter is served
    ├── BusyError                            more requests are waiting than may
    ├── CancelledError                       an answer that was broken off
    ├── AttachError (RuntimeError)           a model that cannot be adapted in its present state
    ├── BaseChangedError (RuntimeError)      the base is not what it was: our fault, exit status 1
    └── Interrupted                          stopped, state saved: exit status 130

A message says what is wrong, where, all of it at once, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PLACE = re.compile(r"(.*?):((?:row )?\d+(?:, line \d+| part \d+)?)(?:: (.*))?", re.DOTALL)


class LorafitError(Exception):
    """Root of the tree. `status`: of a command that ends with it."""

    status = 1


class InputError(LorafitError, ValueError):
    """What was given cannot be used as it is."""

    status = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one place: `where` is `file:line` (and a field), `fix` says what to do.

    whole: it is wrong with a file, or with all that follows in it: there is no row that could be left out instead.
    """

    where: str
    what: str
    fix: str
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.fix}"

    @property
    def place(self) -> tuple[str, str, str]:
        """The file, the line in it, and the field; where no line is named, the file is what stands for the line."""
        if found := PLACE.fullmatch(self.where):  # a path may hold ": " as well
            return found[1], found[2], found[3] or ""
        whole, _, field = self.where.partition(": ")
        return "", whole, field


class DataError(InputError):
    """Examples that cannot be used. `problems` lists all of them; the message has a line for each of the first `SHOWN`
    kinds, with its places."""

    SHOWN = 20
    PLACES = 8

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        kinds: dict[tuple[str, ...], list[Problem]] = {}
        for problem in self.problems:
            file, _, field = problem.place
            kinds.setdefault((file, field, problem.what, problem.fix), []).append(problem)
        lines = [f"{one}{self._also(more)}" for one, *more in kinds.values()]
        if len(lines) > self.SHOWN:
            lines[self.SHOWN :] = [f"... and {len(lines) - self.SHOWN} other kinds"]
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in the data\n  " + "\n  ".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # what it is made of is not its message: pickle would make it of that

    def _also(self, more: Sequence[Problem]) -> str:
        """Where else the same is wrong."""
        if not more:
            return ""
        places = [problem.place[1] for problem in more[: self.PLACES]]
        rest = f" and {len(more) - self.PLACES:,} more" if len(more) > self.PLACES else ""
        return f" (also at {', '.join(places)}{rest})"


class SettingsError(InputError):
    """A setting that cannot be."""


class TargetError(InputError, LookupError):
    """A target that matches no site, or a named site that never takes part in a forward."""


class PlanError(InputError):
    """A rank, scale or variant that cannot be, or two slots on one site."""


class BaseError(InputError):
    """A base that cannot be opened, or lacks what is asked of it."""


class NotCausalError(BaseError):
    """A base whose predictions depend on later tokens: it cannot be trained or scored on completions."""


class NotServedError(BaseError):
    """A base that the engine does not serve: of a family that was not tried, or whose state is of another kind."""


class AdapterError(InputError):
    """An adapter that does not fit its plan or its base."""


class FormatError(InputError):
    """A file or folder that is not what it should be."""


class RunError(InputError, FileExistsError):
    """A run folder that cannot be written, or that holds another run."""


class DivergedError(InputError, ArithmeticError):
    """The loss is no longer a number, or far above where it began."""


class RequestError(InputError):
    """A request that cannot be served as it is."""


class UnknownAdapterError(InputError, LookupError):
    """A name by which no adapter is served."""


class BusyError(LorafitError):
    """More requests are waiting than may: ask again later."""


class CancelledError(LorafitError):
    """An answer that was broken off: by who asked, or because the engine was closed."""


class AttachError(LorafitError, RuntimeError):
    """A model that cannot be adapted in its present state."""


class BaseChangedError(LorafitError, RuntimeError):
    """The bytes of the base differ from those that were opened."""


class Interrupted(LorafitError):
    """Stopped after a whole step, by the user or with another process of the run; the state is saved."""

    status = 130
