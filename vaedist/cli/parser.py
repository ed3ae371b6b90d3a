"""The command line that all doors share: one parser, one name for each option, mistakes in one sentence.

It loads nothing but argparse, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vaedist.core.terminal import error_line

SHELLS = ("bash", "zsh", "tcsh")
FILES = frozenset({"FILE", "JOB", "INPUT", "PNG", "NPZ", "JOB|key=value", ("A", "B")})
"""Metavars of what a shell completes with the names of files."""
FOLDERS = frozenset({"DIR", "RUN", "RUNS", "FOLDER"})
"""Metavars of what it completes with the names of folders."""


class Parser(argparse.ArgumentParser):
    """argparse, with every mistake told in one line, no abbreviations, and the options that all doors have.

    An abbreviation that works today is another option, or two, tomorrow; job scripts live longer than that.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--version", action=_Version, help="print the version, and exit")
        self.add_argument(
            "--print-completion",
            action=_Completion,
            choices=SHELLS,
            help="print a script that completes this command's options in that shell, and exit",
        )

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which takes the positional arguments away for a while: not while completions are made."""
        words = sys.argv[1:] if args is None else list(args)
        if "--print-completion" in words:
            self.parse_known_args(words[words.index("--print-completion") :])
        return super().parse_intermixed_args(words, namespace)

    refuses = False
    """Whether a mistake is raised as `Refused`, for who only wants to know, in place of leaving."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2, one sentence, and no usage text above it."""
        if self.refuses:
            raise Refused(self._sentence(message))
        print(error_line(self.prog, f"{self._sentence(message)}; see {self.prog} --help"), file=sys.stderr)
        raise SystemExit(2)

    def _sentence(self, message: str) -> str:
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            words = unknown[1].split()
            option = next((word for word in words if word.startswith("-")), None)
            if option is None:
                return f"there is no place for {words[0]!r}"
            return f"there is no option {option.partition('=')[0]}{self._nearest(option)}"
        message = re.sub(r"invalid int value: (.*)$", r"\1 is not a whole number", message)
        return re.sub(r"invalid float value: (.*)$", r"\1 is not a number", message)

    def _nearest(self, option: str) -> str:
        names = [name for name in self._option_string_actions if name[:2] == "--"]
        given = option.partition("=")[0]
        close = difflib.get_close_matches(given, names, n=1, cutoff=0.7)
        close = close or [name for name in names if name.startswith(f"{given}-")]
        if close:
            return f"; did you mean {close[0]}?"
        if any(action.metavar == "key=value" for action in self._actions):
            return " (settings of the job are written without dashes, as in train.steps=100)"
        return ""


class Refused(Exception):
    """What is wrong with a command line, in one sentence."""


class _Version(argparse.Action):
    """`--version`, which reads it only when asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import vaedist

        print(f"{parser.prog} {vaedist.__version__}")
        parser.exit()


class _Completion(argparse.Action):
    """`--print-completion SHELL`, which loads shtab only when asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(default=argparse.SUPPRESS, **settings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        import shtab

        for action in parser._actions:
            if action.metavar in FILES | FOLDERS:
                action.complete = shtab.FILE if action.metavar in FILES else shtab.DIR  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def add_loudness(parser: Any, quiet: str = "print nothing but errors", verbose: str | None = None) -> None:
    """Add `-q`, and `-v` where there is more to say.

    Args:
        parser: Or a group of it.
        quiet: Help of `-q`.
        verbose: Help of `-v`; None: no such option.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help=quiet)
    if verbose is not None:
        group.add_argument("-v", "--verbose", action="store_true", help=verbose)


def count(text: str) -> int:
    """The type of an option that is a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def count_or_none(text: str) -> int:
    """The type of an option that is a number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def share(text: str) -> float:
    """The type of an option that is a share, from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return value
