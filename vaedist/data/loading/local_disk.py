"""A node's own disk, as a place for copies that may be removed at any time.

Every user has one folder in it, `vaedist-UID`, and in that lie sets: folders that are written once and then only
read. Each user of a set holds a shared flock on its folder, which the kernel releases when the process ends; a set
without such a lock is removed where space is short, the least recently wanted first. It is renamed before it is
removed, so no process sees half a set, and a process that has just opened it sees the rename and makes the set again.

Medical images are private: a folder is 0700, or 2750 where a group may read it. One that is a symbolic link, belongs to
another user, or could be changed by others is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from vaedist.core.files import TEMPORARY, temporary

WORK = ".work"
"""In a set: the holder of its flock may write into the set; its time is when the set was last wanted."""

_SPARE, _MOST_SPARE = 0.05, 1 << 30  # of the disk, and in bytes: left free for others
_POLL_S = 0.2


class CannotStage(Exception):
    """Nothing can be staged; the message says why."""


def group_id(name: str) -> int | None:
    """Number of a group; None for an empty name.

    Raises:
        CannotStage: there is no such group.
    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise CannotStage(f"the group {name!r} does not exist on this node") from None


def own_root(place: Path, gid: int | None) -> Path:
    """The folder of this user's sets in `place`, made if missing.

    Raises:
        CannotStage, OSError: it cannot be there, or others could change it.
    """
    place.mkdir(parents=True, exist_ok=True)
    mode = os.stat(place).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise CannotStage(f"anybody may replace what lies in {place} (it has no sticky bit)")
    root = place / f"vaedist-{os.getuid()}"
    os.close(_own(root, gid))
    for left in root.glob(f"{TEMPORARY}*"):
        with _if_unused(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    return root


@contextlib.contextmanager
def in_use(folder: Path, gid: int | None, deadline: float) -> Iterator[None]:
    """Lock a set, made if missing, so that no process removes it.

    Args:
        folder: In `own_root`.
        gid: The group that may read it.
        deadline: On the monotonic clock.

    Raises:
        CannotStage, OSError: it cannot be locked.
    """
    while True:
        descriptor = _own(folder, gid)
        try:
            if locked(descriptor, fcntl.LOCK_SH) and _is_at(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            raise CannotStage(f"another process keeps on removing {folder}")
        time.sleep(_POLL_S)  # it is being removed; then it is made again


def remove_if_empty(folder: Path) -> None:
    """Remove a set that holds no files, unless a process uses it."""
    with _if_unused(folder) as free, contextlib.suppress(OSError):
        if free and not {file.name for file in folder.iterdir()} - {WORK}:
            _remove(folder)


def make_room(folder: Path, needed: int) -> None:
    """Remove other sets until so many bytes are free; none if all of them would not be enough.

    Args:
        folder: The set that is to grow.
        needed: Bytes.

    Raises:
        CannotStage: there is too little space.
    """
    disk = shutil.disk_usage(folder)
    wanted, free = needed + min(int(disk.total * _SPARE), _MOST_SPARE), disk.free
    others = [other for other in folder.parent.iterdir() if other != folder]
    with contextlib.ExitStack() as taken:
        removed = []
        for other in sorted(others, key=_last_wanted):
            if free >= wanted:
                break
            if taken.enter_context(_if_unused(other)):
                removed.append(other)
                free += sum(file.lstat().st_blocks * 512 for file in other.iterdir())
        if free < wanted:
            room = f"{folder.parent}, where {size(disk.free)} are free"
            raise CannotStage(f"{size(needed)} do not fit into {room}")
        for other in removed:
            _remove(other)


def locked(descriptor: int, kind: int) -> bool:
    """Take the flock of that kind unless another process prevents it; closing the descriptor releases it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _own(folder: Path, gid: int | None) -> int:
    """A descriptor of a folder that only this user may write, and a group may read; made if missing.

    Raises:
        CannotStage, OSError: it belongs to another user, or is no folder.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink():
        raise CannotStage(f"{folder} is a symbolic link")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid():
            raise CannotStage(f"{folder} belongs to somebody else (user {found.st_uid})")
        if found.st_mode & 0o022:
            raise CannotStage(f"others may write into {folder}")
        if gid is None:
            os.fchmod(descriptor, 0o700)
        else:
            _give(folder, descriptor, gid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _give(folder: Path, descriptor: int, gid: int) -> None:
    try:
        os.fchown(descriptor, -1, gid)
    except PermissionError:
        raise CannotStage(f"{folder} cannot be given to the group {gid}: you are not in it") from None
    os.fchmod(descriptor, 0o2750)  # files made in it get the group by themselves


@contextlib.contextmanager
def _if_unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses a set; if so, none can until the context ends."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False  # no folder, or removed
        return
    try:
        yield locked(descriptor, fcntl.LOCK_EX) and _is_at(folder, descriptor)
    finally:
        os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder still has this path."""
    try:
        return os.path.samestat(os.lstat(folder), os.fstat(descriptor))
    except OSError:
        return False


def _remove(folder: Path) -> None:
    doomed = temporary(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _last_wanted(folder: Path) -> float:
    try:
        return (folder / WORK).stat().st_mtime
    except OSError:
        return 0.0
