"""The parser of each command by its name, for what must understand another command's options."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from vaedist.cli.parser import Parser

_REQUIRED = {"train": ["JOB"], "tune": ["--space", "NAME"], "evaluate": ["RUN"], "sample": ["RUN"]}
"""Stand-ins for the arguments that a command cannot do without."""


def parse_options(command: str, words: Sequence[str]) -> argparse.Namespace:
    """Further options of a command.

    Raises:
        CommandLineError: what is wrong with them, in one sentence.
    """
    parser: Parser = importlib.import_module(f"vaedist.cli.{command}_options").build_parser()
    parser.raise_errors = True
    # The settings of these two may stand among their options.
    parse = parser.parse_intermixed_args if command in ("train", "tune") else parser.parse_args
    options: argparse.Namespace = parse([*_REQUIRED.get(command, []), *words])
    return options
