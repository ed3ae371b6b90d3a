"""Where checkpoints lie: the names of their folders, the best one, and the one that a path from the user means."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.runs.checkpoint_manifest import MANIFEST

BEST = "best.json"
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")

log = logging.getLogger("vaedist")


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or of a run folder the best, else the newest.

    Raises:
        UserError: there is none.
    """
    given = Path(path).expanduser()
    given = given.parent if given.name == "checkpoints" and list_checkpoints(given) else given
    if (given / MANIFEST).is_file() or (given.is_dir() and _NAME.fullmatch(given.name)):
        return given
    if not given.is_dir():
        raise UserError(f"no run at {given}: give a run folder (made by vaedist-train) or a checkpoint in it")
    best = best_checkpoint(given)
    if best is not None:
        return best
    checkpoints = list_checkpoints(given / "checkpoints")
    if not checkpoints:
        raise UserError(f"no checkpoint in {given}: train it first, or give another run folder")
    return checkpoints[-1]


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint folder lies in; None for one that was moved out of its run."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == "checkpoints" else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_and_serial)


def step_and_serial(path: Path) -> tuple[int, int]:
    """Of a checkpoint folder, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def best_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint that the run's `best.json` points at, if it is there."""
    try:
        name = json.loads((run_folder / BEST).read_bytes())["checkpoint"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s cannot be read: the newest checkpoint stands for the best", run_folder / BEST)
        return None
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # a name, never a path
        return None
    path = run_folder / "checkpoints" / name
    return path if path.is_dir() else None
