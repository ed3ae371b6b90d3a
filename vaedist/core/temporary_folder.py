"""A short temporary folder with an owner, and the removal of those whose owner has died.

The owner holds a `flock` on its folder, which the kernel drops however the owner ends: a folder whose lock is free was
left behind. Ray puts its sockets into it, so its path is short (a unix socket's may have 107 bytes), and Ray's own
processes may outlive their driver, so they are ended before the folder goes.
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
    """A short private folder; those that killed processes left behind are swept first.

    Its owner holds a `flock` on it, which the kernel drops however the owner ends.
    """
    sweep_folders()
    # It gets its name when it is held: another job that starts in the same moment sweeps what nobody holds.
    place = _temporary_place()
    fresh = Path(tempfile.mkdtemp(prefix=f".{_prefix()}", dir=place))
    folder = fresh.with_name(fresh.name.removeprefix("."))
    if len(str(folder)) > 41:
        fresh.rmdir()
        raise UserError(f"{place} is too long a path for Ray's sockets: set TMPDIR to a short local folder")
    try:
        with _held(fresh):
            fresh.rename(folder)
            yield folder
    finally:
        _clear(folder)


def sweep_folders() -> list[Path]:
    """Remove what killed processes left of such folders, and end Ray's processes in them; the folders' names."""
    swept = []
    for old in _temporary_place().glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError), _held(old):
            _clear(old)
            swept.append(old)
    return swept


def _temporary_place() -> Path:
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]  # noqa: S108 - the folder in it is fresh and 0700
    # Ray adds up to 64 bytes to the name, and 107 is the limit.
    return Path(next((one for one in places if len(one) <= 20 and os.access(one, os.W_OK)), places[0]))


def _prefix() -> str:
    return f"vd-{os.getuid()}-"


def _clear(folder: Path) -> None:
    """Kill the Ray processes that were started in `folder` and still live, and remove it.

    They name it on their command line, or, where they have given themselves another title (which takes their
    environment's place, too), have their logs open in it. A driver that was killed leaves some, a start that failed
    does, and Ray's agents take some seconds to notice that their raylet has gone.
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
def _held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
