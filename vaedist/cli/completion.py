"""`--print-completion SHELL`: a script that completes a command's options, made by shtab."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
FILES = frozenset({"FILE", "JOB", "INPUT", "PNG", "NPZ", "JOB|key=value", ("A", "B")})
"""Metavars that a shell completes with the names of files."""
FOLDERS = frozenset({"DIR", "RUN", "RUNS", "FOLDER"})
"""Metavars that it completes with the names of folders."""


class PrintCompletion(argparse.Action):
    """Print the completion script and exit. It loads shtab only when asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            default=argparse.SUPPRESS,
            choices=SHELLS,
            help="print a script that completes this command's options in that shell, and exit",
            **settings,
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, *_: object
    ) -> None:
        import shtab

        for action in parser._actions:
            if action.metavar in FILES | FOLDERS:
                action.complete = shtab.FILE if action.metavar in FILES else shtab.DIR  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()
