"""Input that cannot be packed: the first ends the run, or with `--skip-bad` all are listed in `rejected.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.core.files import replace_file
from vaedist.data.sources import Problem

REJECTED = "rejected.jsonl"


class Rejections:
    """The input that was left out, with reasons."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.problems: list[Problem] = []

    def add(self, origin: str, reason: str) -> None:
        """Leave one input out.

        Raises:
            UserError: unless `--skip-bad`.
        """
        if not self.skip_bad:
            raise UserError(
                f"{origin} {reason}; repair or remove it, or leave out all such files with --skip-bad"
            )
        self.problems.append(Problem(origin, reason))

    def write(self, folder: Path) -> None:
        """Write `rejected.jsonl`, if there is anything to list."""
        lines = [json.dumps({"file": problem.origin, "reason": problem.reason}) for problem in self.problems]
        if lines:
            replace_file(folder / REJECTED, "".join(f"{line}\n" for line in lines).encode())
