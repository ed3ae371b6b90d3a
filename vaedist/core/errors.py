"""Errors that a user can mend, and the exit code of each.

Every mistake a person can make (a wrong path, an unknown key, a damaged shard) is a `UserError`: one
sentence that says what is wrong, where, and what to do. A command prints it after its own name and exits
with the error's code; a traceback therefore always means a bug of vaedist.

| code | meaning |
|---|---|
| 0 | finished, or there was nothing left to do |
| 1 | a bug of vaedist (a traceback is printed) |
| 2 | the command, a file or a setting is wrong |
| 3 | the data are damaged: sample, shard and offset are named |
| 4 | training diverged: the loss stayed non-finite |
| 5 | a worker process died (killed, out of memory); the same command continues from the last checkpoint |
| 6 | the run folder takes no more files (disk or quota full, read-only); once mended, the same command continues |
| 75 | stopped on request after saving a checkpoint; the same command continues (`EX_TEMPFAIL`) |
| 130 | interrupted by Ctrl-C where there was no checkpoint to save |
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Iterable
from typing import ClassVar, Protocol

from vaedist.core.terminal import error_line

EXIT_FINISHED = 0
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake the user can mend. `str(error)` is the one sentence to print."""

    exit_code: ClassVar[int] = 2


class DataError(UserError):
    """Data on disk are not what their index says; the message names sample, shard and byte offset."""

    exit_code = 3


class Diverged(UserError):
    """The loss or its gradient was non-finite for too many steps in a row."""

    exit_code = 4


class WorkerLost(UserError):
    """A process of the run was killed or vanished; everything up to the last checkpoint is safe."""

    exit_code = 5


class OutOfMemory(UserError):
    """A process could not get the memory it asked for; everything up to the last checkpoint is safe."""

    exit_code = 5


class CannotWrite(UserError):
    """The run folder takes no more files: no room, or read-only. Checkpoints written before are intact."""

    exit_code = 6


class NotDefined(UserError):
    """The model has no such operation; the message is `not defined, because ...`."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'? Valid: a, b, x"`: the tail of every message about an unknown name."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Valid: {', '.join(names) or '(none)'}"


class CliCommand(Protocol):
    """`main(argv)` of a command; without arguments it reads the command line."""

    def __call__(self, argv: list[str] | None = None) -> int: ...


def cli_command(main: CliCommand) -> CliCommand:
    """Decorate a command's `main(argv) -> exit code`: a `UserError` becomes one line on stderr."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        name = f"vaedist-{main.__module__.rpartition('.')[2]}"
        if main.__module__ == "__main__":
            name = f"vaedist-{sys.modules['__main__'].__spec__.name.rpartition('.')[2]}"  # type: ignore[union-attr]
        try:
            return main(argv)
        except UserError as error:
            print(error_line(name, error), file=sys.stderr)
            return error.exit_code
        except BrokenPipeError:
            # The reader (`| head`) has gone.
            sys.stderr.close()
            return EXIT_FINISHED
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return wrapped
