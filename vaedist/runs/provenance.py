"""Where a run's numbers come from: versions, git commit, libraries, command line, machine, and changed settings.

`provenance.json` of a run folder holds one entry for each start. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import vaedist
from vaedist.core.errors import UserError
from vaedist.core.files import as_json, replace_file

log = logging.getLogger("vaedist")

FILE = "provenance.json"
_LIBRARIES = "torch numpy ray optuna webdataset pydantic pillow scikit-image tensorboard".split()


class Absent:
    def __repr__(self) -> str:
        return "not set"


ABSENT = Absent()


class Change(NamedTuple):
    """One setting that differs between the saved and the asked job."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.old)} and is now {_shown(self.new)}"

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        old, new = (None if value is ABSENT else value for value in (self.old, self.new))
        return {"key": self.key, "old": old, "new": new}


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Where numbers come from: version, git commit, libraries, command line, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "vaedist": vaedist.__version__,
        "git_commit": git_commit(),
        "libraries": _libraries(),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": shlex.join(sys.argv if command is None else command),
    }


@functools.cache
def git_commit() -> str | None:
    """Commit of the source tree that runs, with `-dirty` for changed files; None for an installed package."""
    tree = Path(vaedist.__file__).resolve().parents[1]
    if not (tree / ".git").exists():
        return None
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def library_versions() -> str:
    """One line: vaedist, its commit, Python and the libraries that numbers depend on."""
    versions = {"vaedist": vaedist.__version__, "commit": git_commit(), "Python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in (versions | _libraries()).items() if version)


@functools.cache
def _libraries() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def read_starts(run_folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's provenance.json, oldest first.

    Raises:
        UserError: it is damaged.
    """
    path = run_folder / FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError:
        content = None
    if not isinstance(content, list):
        raise UserError(f"{path} is damaged: remove it (its record is lost) and go on")
    return content


def append_start(run_folder: Path, entry: dict[str, Any]) -> None:
    """Add an entry to a run's provenance.json; a file that cannot be read is renamed, and a new one begins."""
    path = run_folder / FILE
    try:
        starts = read_starts(run_folder)
    except UserError:
        names = (path.with_name(f"damaged-{number}-{FILE}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        log.warning("%s cannot be read: put aside as %s, and a new record of starts begins", path, aside.name)
        starts = []
    replace_file(path, as_json([*starts, entry]))
