"""The parser of each command by its name, for what must understand another command's options."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vaedist.cli.parser import CommandLineError, Parser

_PARSERS = {"shard": "vaedist.shard"} | {
    name: f"vaedist.cli.{name}_options" for name in ("evaluate", "sample", "train", "tune")
}
_REQUIRED = {"train": ["JOB"], "tune": ["--space", "NAME"], "evaluate": ["RUN"], "sample": ["RUN"]}
"""Stand-ins for the arguments that a command cannot do without."""


def check_options(command: str, words: Sequence[str]) -> str:
    """What is wrong with further options of a command, in one sentence; empty: nothing."""
    parser: Parser = importlib.import_module(_PARSERS[command]).build_parser()
    parser.raise_errors = True
    arguments = [*_REQUIRED.get(command, []), *words]
    try:
        if command in ("train", "tune"):  # whose settings may stand among their options
            parser.parse_intermixed_args(arguments)
        else:
            parser.parse_args(arguments)
    except CommandLineError as error:
        return str(error)
    return ""
