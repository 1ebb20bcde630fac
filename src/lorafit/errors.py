"""Every error lorafit raises on purpose. Each is also the standard library's type for its kind.

    LorafitError
    ├── InputError (ValueError)              what was given cannot be used: exit status 2
    │   ├── DataError                        examples; holds every problem found, each with file:line
    │   ├── SettingsError                    a flag or setting
    │   ├── TargetError (LookupError)        a target that matches no site, or one that never fires
    │   ├── PlanError                        a rank, scale or variant that cannot be
    │   ├── BaseError                        a base that cannot be opened
    │   ├── AdapterError                     an adapter that does not fit its plan or its base
    │   ├── FormatError                      a file that is not what its name says
    │   ├── RunError (FileExistsError)       a run folder that cannot be used
    │   └── DivergedError (ArithmeticError)  a learning rate at which training left the numbers
    ├── AttachError (RuntimeError)           a model that cannot be adapted in its present state
    ├── BaseChangedError (RuntimeError)      the base is not what it was: our fault, exit status 1
    └── Interrupted                          stopped by the user, state saved: exit status 130

A message says what is wrong, where, all of it at once, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LorafitError(Exception):
    """Root of the tree."""


class InputError(LorafitError, ValueError):
    """What was given cannot be used as it is."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one place: `where` is `file:line` (and a field), `fix` says what to do."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.fix}"


class DataError(InputError):
    """Examples that cannot be used. `problems` lists all of them, the message the first `SHOWN`."""

    SHOWN = 20

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        more = len(self.problems) - self.SHOWN
        lines = [str(problem) for problem in self.problems[: self.SHOWN]]
        if more > 0:
            lines.append(f"... and {more} more")
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in the data\n  " + "\n  ".join(lines))


class SettingsError(InputError):
    """A setting that cannot be."""


class TargetError(InputError, LookupError):
    """A target that matches no site, or a named site that never takes part in a forward."""


class PlanError(InputError):
    """A rank, scale or variant that cannot be, or two slots on one site."""


class BaseError(InputError):
    """A base that cannot be opened, or lacks what is asked of it."""


class AdapterError(InputError):
    """An adapter that does not fit its plan or its base."""


class FormatError(InputError):
    """A file or folder that is not what it should be."""


class RunError(InputError, FileExistsError):
    """A run folder that cannot be written, or that holds another run."""


class DivergedError(InputError, ArithmeticError):
    """The loss is no longer a number, or far above where it began."""


class AttachError(LorafitError, RuntimeError):
    """A model that cannot be adapted in its present state."""


class BaseChangedError(LorafitError, RuntimeError):
    """The bytes of the base differ from those that were opened."""


class Interrupted(LorafitError):
    """Stopped by the user after a whole step; the state is saved."""
