"""Staging: shards are copied once to a node's own disk, and all processes of the node read them there.

Where: `$VAEDIST_NODE_LOCAL/vaedist-UID/KEY/` (`vaedist.data.loading.local_disk`), one folder per selection of
shards. KEY is a hash of their sha256, which are the files' names: jobs that read the same shards share a folder,
whatever the shared one is called and whenever they run. Without that variable nothing is staged. `$VAEDIST_GROUP`
names a group that may read it.

| file | what it is |
|---|---|
| `<sha256>.tar`, `<sha256>.cols` | a copy; it has this name only once all its bytes had that sha256 |
| `.work` | its flock: one process at a time copies; its time shows others that this one lives |
| `verified.json` | inode, size and times of each sound copy, and the boot of the machine they were noted in |

A copy is trusted as long as it is the very file that was verified: a change moves its times. After a restart of the
machine, which may have lost what was never forced to the disk, it is read and hashed anew. What goes bad on the disk
without a trace fails the checks of `vaedist.data.format.decoding`, which then read the shared folder.

Of the processes of a job on one node the first copies and the others wait for it; two jobs wait for each other, as
long as the one that copies gets on. What was copied before a kill or a stop serves the next start. Whatever else goes
wrong is told in one line and costs no more than speed: the shared folder is read, the same bytes in the same order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaedist.core.files import TEMPORARY, replace_file, temporary
from vaedist.data.format.index import Index, Shard, Split
from vaedist.data.loading.local_disk import (
    WORK,
    CannotStage,
    group_id,
    in_use,
    locked,
    make_room,
    own_root,
    remove_if_empty,
    size,
)

if TYPE_CHECKING:
    from vaedist.data.loading.cache import Node

NODE_LOCAL = "VAEDIST_NODE_LOCAL"
GROUP = "VAEDIST_GROUP"

_log = logging.getLogger("vaedist")
_RECORD = "verified.json"
_BLOCK = 4 << 20
_AT_ONCE = 4  # files copied at once: a parallel file system is slow to one reader and fast to several
_LIMIT_S = 1200.0
"""For all of staging; the other ranks wait in a collective, which has a deadline of half an hour."""
_PATIENCE_S = 120.0
"""Without a sign of life of another job that copies the same files."""
_TELL_S = 10.0
_POLL_S = 0.2


@contextlib.contextmanager
def staged(
    index: Index,
    splits: Iterable[str],
    *,
    node: Node | None = None,
    tell: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Index]:
    """The same data on the node's own disk, for as long as the context is open; or `index` itself.

    Collective: with a `node` of several processes, all of them enter at the same point.

    Args:
        index: The packed folder.
        splits: Names of those that will be read.
        node: The process group; none: this process alone.
        tell: Shows one line of progress.
        stopped: Whether the run is to stop, which ends the copying early; called from several threads.

    Yields:
        An index whose shards are sound copies. What prevents that is told through the log.

    Raises:
        UserError: there is no such split, or it is empty.
    """
    wanted, names = os.environ.get(NODE_LOCAL, ""), sorted(set(splits))
    shards = [shard for name in names for shard in index.split(name).shards]
    # Rank 0 decides whether there is anything to wait for; the folder's name is each node's own.
    if not (wanted if node is None else node.from_leader(wanted.encode)):
        yield index
        return
    with contextlib.ExitStack() as held:
        staging = _Staging(shards, index.folder, wanted, os.environ.get(GROUP, ""), tell, stopped)
        folder: Path | None = None
        if node is None or node.local_rank == 0:
            folder = staging.prepare(held)
        if node is not None:
            node.barrier()
            if node.local_rank != 0:
                folder = staging.adopt(held)
        yield index if folder is None else _moved(index, names, folder)


def _moved(index: Index, splits: Iterable[str], folder: Path) -> Index:
    """`index`, with these splits read from the copies in `folder`."""
    moved = dict(index.splits)
    for name in splits:
        copies = (
            replace(
                shard,
                tar=folder / f"{shard.sha256}.tar",
                columns_path=folder / f"{shard.columns_sha256}.cols",
                original=shard,
            )
            for shard in index.splits[name].shards
        )
        moved[name] = Split(name, tuple(copies))
    return index.reading(moved)


class _Paused(CannotStage):
    """Copying ended before it was done; what there is serves the next start."""


class _Left(_Paused):
    """Another thread has failed, and has the reason."""


class _Staging:
    """One process's attempt to have a selection of shards on the node's own disk."""

    def __init__(
        self,
        shards: Sequence[Shard],
        shared: Path,
        wanted: str,
        group: str,
        tell: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.shards, self.shared, self.wanted, self.group = shards, shared, wanted, group
        self.tell, self.stopped = tell, stopped
        self.deadline = time.monotonic() + _LIMIT_S
        self._alive = 0.0

    def prepare(self, held: contextlib.ExitStack) -> Path | None:
        """The folder of sound copies, in use until `held` closes; None, and a line on the log, if that cannot be."""
        before = time.monotonic()
        folder: Path | None = None
        try:
            files = _files(self.shards)
            folder = self._use(files, held)
            with self._working(folder):
                copied = self._complete(folder, files)
        except (CannotStage, OSError) as error:
            held.close()
            if folder is not None:
                remove_if_empty(folder)
            if not (isinstance(error, _Paused) and self.stopped()):
                _log.warning("staging: %s; reading %s itself", self._why(error), self.shared)
            return None
        took = time.monotonic() - before
        told = f"{size(copied)} copied in {took:.1f} s" if copied else "copied before"
        self.tell(f"staging: reading from {folder} ({told})")
        return folder

    def adopt(self, held: contextlib.ExitStack) -> Path | None:
        """The same folder, once another process of this node has prepared it; None if it has told why not."""
        with contextlib.suppress(CannotStage, OSError):
            files = _files(self.shards)
            folder = self._use(files, held)
            record = _Record(folder)
            if all(record.sound(file) for file in files):
                return folder
        held.close()
        return None

    def _use(self, files: Sequence[_File], held: contextlib.ExitStack) -> Path:
        place, gid = Path(os.path.expandvars(self.wanted)), group_id(self.group)
        if "$" in str(place) or not place.is_absolute():
            raise CannotStage(
                f"{NODE_LOCAL} is {self.wanted!r}, which is no path from the root with variables that are set here"
            )
        folder = own_root(place, gid) / _key(files)
        held.enter_context(in_use(folder, gid, self.deadline))
        return folder

    def _why(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.strerror:
            return f"{error.filename or self.wanted}: {error.strerror}"
        return str(error)

    # Copying ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _working(self, folder: Path) -> Iterator[None]:
        """Be the one process that copies to this folder; another one that does is waited for while it gets on."""
        work = os.open(folder / WORK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            sign, since, told = 0, time.monotonic(), False
            while not locked(work, fcntl.LOCK_EX):
                now, newest = time.monotonic(), os.fstat(work).st_mtime_ns
                if newest != sign:
                    sign, since = newest, now
                if now > min(self.deadline, since + _PATIENCE_S):
                    raise CannotStage(f"another process of this node copies to {folder} and does not get on")
                if self.stopped():
                    raise _Paused("asked to stop")
                if not told:
                    self.tell(f"staging: another process of this node copies to {folder}: waiting for it")
                    told = True
                time.sleep(_POLL_S)
            os.utime(work)
            yield
        finally:
            os.close(work)

    def _complete(self, folder: Path, files: Sequence[_File]) -> int:
        """Make the folder whole; how many bytes had to be copied.

        Raises:
            CannotStage, OSError: it cannot be made whole.
        """
        for left in folder.glob(f"{TEMPORARY}*"):
            left.unlink()  # of a process that was killed, for we hold the lock
        record = _Record(folder)
        try:
            missing = [
                file
                for file in files
                if not record.sound(file) and not self._reads_back(folder, file, record)
            ]
            needed = sum(file.size for file in missing)
            if missing:
                make_room(folder, needed)
                self.tell(f"staging: copying {size(needed)} from {self.shared} to {folder}")
                self._copy(folder, missing, record)
        except _Paused:
            record.write(self.shared, files)
            raise
        if record.changed:
            record.write(self.shared, files)
        return needed

    def _reads_back(self, folder: Path, file: _File, record: _Record) -> bool:
        """Whether a copy that nothing vouches for in this boot has the right bytes; removed if not."""
        path = folder / file.name
        mark = _Mark.of(path)
        if mark is not None and mark.size == file.size:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as copy:
                while block := copy.read(_BLOCK):
                    digest.update(block)
                    self.go_on(folder)
            if digest.hexdigest() == file.sha256:
                record.vouch(file)
                return True
        path.unlink(missing_ok=True)
        return False

    def _copy(self, folder: Path, files: Sequence[_File], record: _Record) -> None:
        progress = _Progress(self, folder, sum(file.size for file in files))
        mode = 0o440 if self.group else 0o400
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="vaedist-staging") as pool:
            copies = [pool.submit(_copy_one, file, folder, mode, progress) for file in files]
            try:
                wait(copies, return_when=FIRST_EXCEPTION)
            finally:
                progress.over = True
                pool.shutdown(cancel_futures=True)
        failures = []
        for file, copy in zip(files, copies, strict=True):
            error = None if copy.cancelled() else copy.exception()
            if error is not None:
                failures.append(error)
            elif not copy.cancelled():
                record.vouch(file)
        # The one to tell: a real failure before a stop or the deadline, and both before a mere leaving.
        failures.sort(key=lambda error: (isinstance(error, _Paused), isinstance(error, _Left)))
        if failures and not isinstance(failures[0], _Paused):
            for file in files:  # they would fill the disk and serve nobody
                (folder / file.name).unlink(missing_ok=True)
        if failures:
            raise failures[0]

    def go_on(self, folder: Path) -> None:
        """Show other jobs that this process gets on; called from several threads.

        Raises:
            _Paused: it is time to leave.
        """
        now = time.monotonic()
        if self.stopped():
            raise _Paused("asked to stop")
        if now > self.deadline:
            raise _Paused(
                f"copying takes more than {_LIMIT_S / 60:.0f} minutes (the next start goes on with it)"
            )
        if now - self._alive > 1:
            self._alive = now
            os.utime(folder / WORK)


class _Progress:
    """Bytes copied by all threads."""

    def __init__(self, staging: _Staging, folder: Path, total: int) -> None:
        self.staging, self.folder, self.total = staging, folder, total
        self.done, self.over = 0, False
        self._told = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Take in that so many bytes were read.

        Raises:
            _Paused: it is time to leave.
            _Left: another thread has failed.
        """
        if self.over:
            raise _Left("another file could not be copied")
        self.staging.go_on(self.folder)
        with self._lock:
            self.done += count
            if time.monotonic() - self._told > _TELL_S:
                self._told = time.monotonic()
                self.staging.tell(f"staging: {size(self.done)} of {size(self.total)}")


# Files ------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A file to be copied, and the name that its copy gets."""

    name: str
    source: Path
    size: int
    sha256: str


def _files(shards: Sequence[Shard]) -> list[_File]:
    found: dict[str, _File] = {}
    for shard in shards:
        columns = os.stat(shard.columns_path).st_size
        for file in (
            _File(f"{shard.sha256}.tar", shard.tar, shard.bytes, shard.sha256),
            _File(f"{shard.columns_sha256}.cols", shard.columns_path, columns, shard.columns_sha256),
        ):
            found[file.name] = file
    return list(found.values())


def _key(files: Sequence[_File]) -> str:
    return hashlib.sha256("\n".join(sorted(file.name for file in files)).encode()).hexdigest()[:24]


def _copy_one(file: _File, folder: Path, mode: int, progress: _Progress) -> None:
    """Copy one file; it gets its name when its bytes are those that the index says.

    Raises:
        CannotStage, OSError: it could not be copied; nothing is left of it.
    """
    scratch = temporary(folder / file.name)
    digest = hashlib.sha256()
    try:
        with scratch.open("xb") as copy:
            for block in _blocks(file.source):
                progress.add(len(block))
                digest.update(block)
                copy.write(block)
            os.fchmod(copy.fileno(), mode)
        if digest.hexdigest() != file.sha256:
            raise CannotStage(f"{file.source} is not what its index says (SHA-256 differs)")
        os.replace(scratch, folder / file.name)
    finally:
        scratch.unlink(missing_ok=True)


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise CannotStage(f"{path} cannot be read ({error.strerror})") from None


class _Mark(NamedTuple):
    """What of a file changes whenever the file does."""

    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> _Mark | None:
        try:
            found = os.lstat(path)
        except OSError:
            return None
        regular = stat.S_ISREG(found.st_mode)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if regular else None


class _Record:
    """`verified.json`: which copies had the right bytes, in this boot of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.changed = folder, False
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._marks: dict[str, _Mark] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            told = json.loads((folder / _RECORD).read_bytes())
            if told["boot"] == self._boot:
                self._marks = {name: _Mark(*mark) for name, mark in told["files"].items()}

    def sound(self, file: _File) -> bool:
        """Whether this very copy has been verified."""
        mark = _Mark.of(self.folder / file.name)
        return mark is not None and mark.size == file.size and mark == self._marks.get(file.name)

    def vouch(self, file: _File) -> None:
        """Say that the copy has the right bytes."""
        if (mark := _Mark.of(self.folder / file.name)) is not None:
            self._marks[file.name], self.changed = mark, True

    def write(self, shared: Path, files: Sequence[_File]) -> None:
        marks = {file.name: self._marks[file.name] for file in files if file.name in self._marks}
        told = {"boot": self._boot, "copied_from": str(shared), "files": marks}
        replace_file(self.folder / _RECORD, json.dumps(told).encode())
