"""The command line parser that all commands use: mistakes in one sentence, no abbreviations.

It loads nothing but argparse, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

import vaedist
from vaedist.cli.completion import PrintCompletion
from vaedist.core.terminal import error_line


class Parser(argparse.ArgumentParser):
    """argparse, with every mistake in one line, no abbreviations, and the options that all commands have.

    An abbreviation that works today is another option, or two, tomorrow; job scripts live longer than that.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        version = f"%(prog)s {vaedist.__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version, and exit")
        self.add_argument("--print-completion", action=PrintCompletion)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which takes the positional arguments away for a while, but not for `--print-completion`."""
        words = sys.argv[1:] if args is None else list(args)
        if "--print-completion" in words:
            self.parse_known_args(words[words.index("--print-completion") :])
        return super().parse_intermixed_args(words, namespace)

    raise_errors = False
    """Whether a mistake is raised as `CommandLineError`, and does not exit."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2, one sentence, and no usage text above it."""
        if self.raise_errors:
            raise CommandLineError(self._sentence(message))
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


class CommandLineError(Exception):
    """What is wrong with a command line, in one sentence."""
