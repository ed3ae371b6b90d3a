"""The launch folder: a record of what was submitted, so that nothing depends on Slurm's accounting.

    launches/NAME/                   0700: what runs in jobs must not be changed by others
      jobs.jsonl                     one line per task: stage, job number, run folder, log, what it waits for
      site.yaml                      the site file as it was then; jobs read this copy
      jobs/NAME.yaml                 the job files as they were then
      STAGE.sbatch                   the very bytes that sbatch got (submitit keeps them as NUMBER_submission.sh too)
      STAGE-NUMBER.log               what the jobs print, appended to at every restart

A folder that others may write is refused: whoever can change a batch script before it runs can run code as its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vaedist.core.errors import UserError

RECORD = "jobs.jsonl"


@dataclass(frozen=True)
class LaunchedTask:
    """One task of one stage; a line of the record.

    Attributes:
        link, label: Name of the stage, and which of its tasks.
        job: Number in the queue (`12`, of an array `12_3`), or of the process with the local executor.
        executor: `slurm` or `local`.
        arguments: The command and what it was given.
        run: Its run folder, or None.
        log: The file that it prints to.
        after: Number of the job that it waits for, or None.
        mark: The comment of the job, by which its successors are found.
        sent: When it was submitted, in seconds since 1970.
    """

    link: str
    label: str
    job: str
    executor: str
    arguments: tuple[str, ...]
    run: str | None
    log: str
    after: str | None
    mark: str
    sent: float

    @property
    def array(self) -> str:
        """Number of the job without that of the task in an array."""
        return self.job.partition("_")[0]


def unused_folder(root: Path, name: str) -> Path:
    """The first of NAME, NAME-2, ... that is not there yet. Nothing is made."""
    number = 1
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder.absolute()


def create_folder(folder: Path, group: str | None = None) -> None:
    """Make a launch folder, readable by its owner alone, or by `group` too.

    Raises:
        UserError: it cannot be made, or others may write where it is to be.
    """
    try:
        with contextlib.suppress(FileExistsError):  # a file, of which mkdir below says so
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_writable(folder.parent)
        folder.mkdir(mode=0o700)
        if group is not None:
            _share(folder, group)
    except FileExistsError:
        raise UserError(
            f"{folder} has just been made by another launch: run the same command again"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot make the launch folder {folder}: {error.strerror}; choose another with --folder"
        ) from None


def job_copies(folder: Path, jobs: Sequence[str], prior: str | None) -> dict[str, Path]:
    """Where each job file is kept in a launch folder, so that editing it later changes nothing in the queue."""
    copies: dict[str, Path] = {}
    words = shlex.split(prior) if prior else []
    for number, path in enumerate(dict.fromkeys([*jobs, *words[:1]])):
        copy = folder / "jobs" / Path(path).name
        copies[path] = copy if copy not in copies.values() else copy.with_stem(f"{copy.stem}-{number}")
    return copies


def copy_inputs(folder: Path, site_file: Path, copies: Mapping[str, Path]) -> None:
    """Copy the site file and the job files into a launch folder."""
    (folder / "jobs").mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(site_file, folder / "site.yaml")
    for path, copy in copies.items():
        shutil.copyfile(path, copy)


def discard_folder(folder: Path) -> None:
    """Remove a launch folder of which nothing has come into the queue."""
    if not (folder / RECORD).exists():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other launches are in it
            folder.parent.rmdir()


def _share(folder: Path, group: str) -> None:
    """Let a Unix group read what is made in `folder`.

    Raises:
        UserError: there is no such group, or this user is not in it.
    """
    try:
        shutil.chown(folder, group=group)
        folder.chmod(0o2750)
    except (LookupError, PermissionError):
        raise UserError(
            f"group: {group} of the site file is no group of yours: see `id -Gn`, or leave group out"
        ) from None


def _refuse_writable(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise UserError(
            f"{folder} belongs to another user: launch folders must be your own; give another with --folder"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"others may write in {folder}, and so change what runs as you: chmod go-w {folder}, or give another "
            "with --folder"
        )


def append(folder: Path, tasks: Iterable[LaunchedTask]) -> None:
    """Add lines to the record."""
    text = "".join(json.dumps(asdict(task)) + "\n" for task in tasks)
    descriptor = os.open(folder / RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[LaunchedTask]:
    """All tasks of a launch.

    Raises:
        UserError: this is no launch folder, not ours alone, or its record is damaged.
    """
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{folder} is no launch folder (it has no {RECORD}): give the one that vaedist-launch named"
        )
    _refuse_writable(folder)
    tasks = []
    for number, line in enumerate((folder / RECORD).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            tasks.append(LaunchedTask(**content | {"arguments": tuple(content["arguments"])}))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{folder / RECORD}, line {number}, is not what vaedist-launch wrote") from None
    return tasks


def newest_folder(root: Path) -> Path:
    """The launch folder under `root` that was written to last.

    Raises:
        UserError: there is none.
    """
    records = sorted(root.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise UserError(f"nothing has been launched in {root.absolute()}: give the launch folder")
    return records[-1].parent
