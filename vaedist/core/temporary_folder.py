"""A temporary folder for Ray with a short path, and the removal of those whose owner has died.

The owner holds a `flock` on its folder, which the kernel releases however the owner ends: a folder whose lock is free
was left behind. Ray puts its sockets into the folder, so its path is short (a unix socket's may have 107 bytes). Ray's
processes may outlive their driver, so they are ended before the folder is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vaedist.core.errors import UserError


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder with a short path; those that killed processes left behind are removed first."""
    remove_stale_folders()
    # It gets its final name once it is locked: another job that starts at this moment removes unlocked ones.
    parent = _parent_folder()
    fresh = Path(tempfile.mkdtemp(prefix=f".{_prefix()}", dir=parent))
    folder = fresh.with_name(fresh.name.removeprefix("."))
    if len(str(folder)) > 41:
        fresh.rmdir()
        raise UserError(f"{parent} is too long a path for Ray's sockets: set TMPDIR to a short local folder")
    try:
        with _locked(fresh):
            fresh.rename(folder)
            yield folder
    finally:
        _remove(folder)


def remove_stale_folders() -> list[Path]:
    """Remove the folders that killed processes left behind, and end Ray's processes in them.

    Returns:
        The folders.
    """
    removed = []
    for old in _parent_folder().glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError), _locked(old):
            _remove(old)
            removed.append(old)
    return removed


def _parent_folder() -> Path:
    parents = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108 - the folder in it is fresh and 0700
    # Ray adds up to 64 bytes to the name, and 107 is the limit.
    return Path(next((path for path in parents if len(path) <= 20 and os.access(path, os.W_OK)), parents[0]))


def _prefix() -> str:
    return f"vd-{os.getuid()}-"


def _remove(folder: Path) -> None:
    """Kill the Ray processes that were started in `folder` and still live, and remove it.

    They name it on their command line, or, where they have changed their title (which overwrites their environment
    too), have their logs open in it. A killed driver or a failed start leaves some, and Ray's agents take some seconds
    to notice that their raylet has ended.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid() and int(process.name) != os.getpid():
                named = str(folder).encode() in (process / "cmdline").read_bytes()
                if named or _writes_into(process, folder):
                    os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _writes_into(process: Path, folder: Path) -> bool:
    """Whether one of Ray's processes, by its title, has a file below `folder` open."""
    if not (process / "cmdline").read_bytes().startswith(b"ray::"):
        return False
    return any(os.readlink(link).startswith(f"{folder}/") for link in (process / "fd").iterdir())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
