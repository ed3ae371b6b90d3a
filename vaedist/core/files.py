"""Files that are whole or absent, also after a power cut.

A file is written under a temporary name beside its place, forced to the disk, renamed over the place, and the
folder that holds the name is forced to the disk too. A reader sees the old content or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaedist.core.errors import CannotWrite, UserError

TEMPORARY = ".tmp-"
"""How every temporary name of vaedist begins; cleaning up removes nothing else."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""errno where the disk, the quota or the permitted file size is too small."""

_LOCKED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""errno where a folder is read-only; many systems make a disk read-only after errors."""


def temporary(path: Path) -> Path:
    """A fresh name beside `path`, on the same filesystem, that nobody else uses."""
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:12]}")


@contextlib.contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Report in one sentence that `what` could not be written: no space on the disk or in the quota, or read-only.

    Raises:
        CannotWrite: in place of such an OSError; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _LOCKED:
            raise CannotWrite(
                f"cannot write {what} in {folder} ({error.strerror}): checkpoints written before are intact; make the "
                "folder writable and run the same command again to continue"
            ) from None
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise CannotWrite(
            f"no room to write {what} in {folder} ({error.strerror}; {free:.1f} MiB free): checkpoints written "
            "before are intact; make room and run the same command again to continue"
        ) from None


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Report in one sentence that `path`, which the user chose, cannot be written.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; choose another place or free some space") from None


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot sync a folder; they order renames on the server.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and force it to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, all or nothing."""
    scratch = temporary(path)
    try:
        write_synced(scratch, content)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_private(path: Path, text: str) -> None:
    """Put a secret at `path`, all or nothing, which only this user can read (0600) at every moment."""
    scratch = temporary(path)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    scratch.replace(path)


def exists_uncached(path: Path) -> bool:
    """Whether a file is there that another machine may have written: NFS looks again when the folder is listed."""
    try:
        return path.name in os.listdir(path.parent)
    except FileNotFoundError:
        return False


def wait_for_file(path: Path, seconds: float) -> str | None:
    """The text of a file that another machine is about to write; None where it is not there after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if exists_uncached(path):
            with contextlib.suppress(FileNotFoundError):
                return path.read_text()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def as_json(content: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
