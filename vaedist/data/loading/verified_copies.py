"""Copies of shards in a folder on the node's own disk, and the record of which were verified (`verified.json`)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vaedist.core.files import replace_file, temporary
from vaedist.data.format.split import Shard
from vaedist.data.loading.local_disk import CannotStage

_RECORD = "verified.json"
_BLOCK = 4 << 20


class StagedFile(NamedTuple):
    """A file to be copied, and the name of its copy."""

    name: str
    source: Path
    size: int
    sha256: str


def files_to_stage(shards: Sequence[Shard]) -> list[StagedFile]:
    files: dict[str, StagedFile] = {}
    for shard in shards:
        columns = os.stat(shard.columns_path).st_size
        tar = StagedFile(f"{shard.sha256}.tar", shard.tar, shard.bytes, shard.sha256)
        name, sha256 = f"{shard.columns_sha256}.cols", shard.columns_sha256
        files |= {tar.name: tar, name: StagedFile(name, shard.columns_path, columns, sha256)}
    return list(files.values())


def folder_name(files: Sequence[StagedFile]) -> str:
    return hashlib.sha256("\n".join(sorted(file.name for file in files)).encode()).hexdigest()[:24]


def copy_file(file: StagedFile, folder: Path, mode: int, add: Callable[[int], None]) -> None:
    """Copy one file; it gets its name only when its bytes are those that the index says.

    Args:
        file: Which.
        folder: Where to.
        mode: Permissions of the copy.
        add: Called with the number of bytes of each block that was read; may raise to end the copying.

    Raises:
        CannotStage, OSError: it could not be copied; nothing is left of it.
    """
    scratch = temporary(folder / file.name)
    digest = hashlib.sha256()
    try:
        with scratch.open("xb") as copy:
            for block in read_blocks(file.source):
                add(len(block))
                digest.update(block)
                copy.write(block)
            os.fchmod(copy.fileno(), mode)
        if digest.hexdigest() != file.sha256:
            raise CannotStage(f"{file.source} is not what its index says (SHA-256 differs)")
        os.replace(scratch, folder / file.name)
    finally:
        scratch.unlink(missing_ok=True)


def read_blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise CannotStage(f"{path} cannot be read ({error.strerror})") from None


class FileState(NamedTuple):
    """Numbers that change whenever the file does."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        try:
            info = os.lstat(path)
        except OSError:
            return None
        regular = stat.S_ISREG(info.st_mode)
        return cls(info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns) if regular else None


class VerifiedFiles:
    """`verified.json`: which copies had the right bytes, in this boot of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.changed = folder, False
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._states: dict[str, FileState] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            record = json.loads((folder / _RECORD).read_bytes())
            if record["boot"] == self._boot:
                self._states = {name: FileState(*state) for name, state in record["files"].items()}

    def is_verified(self, file: StagedFile) -> bool:
        """Whether this copy has been verified and not changed since."""
        state = FileState.of(self.folder / file.name)
        return state is not None and state.size == file.size and state == self._states.get(file.name)

    def add(self, file: StagedFile) -> None:
        """Note that the copy has the right bytes."""
        if (state := FileState.of(self.folder / file.name)) is not None:
            self._states[file.name], self.changed = state, True

    def write(self, shared: Path, files: Sequence[StagedFile]) -> None:
        states = {file.name: self._states[file.name] for file in files if file.name in self._states}
        record = {"boot": self._boot, "copied_from": str(shared), "files": states}
        replace_file(self.folder / _RECORD, json.dumps(record).encode())
