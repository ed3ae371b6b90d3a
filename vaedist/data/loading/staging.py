"""Staging: shards are copied once to a node's own disk, and all processes of the node read the copies.

Where: `$VAEDIST_NODE_LOCAL/vaedist-UID/KEY/` (`vaedist.data.loading.local_disk`), one folder per selection of
shards. KEY is a hash of their sha256, which are the files' names, so jobs that read the same shards share a folder,
whatever the packed folder is called and whenever they run. Without that variable nothing is staged. `$VAEDIST_GROUP`
names a group that may read it.

| file | what it is |
|---|---|
| `<sha256>.tar`, `<sha256>.cols` | a copy; it has this name only once all its bytes had that sha256 |
| `.work` | its flock: one process at a time copies; its time shows others that the copying goes on |
| `verified.json` | inode, size and times of each sound copy, and the boot of the machine they were noted in |

A copy is trusted as long as it is the file that was verified: a change moves its times. After a restart of the
machine, which may have lost what was never forced to the disk, it is read and hashed again. Damage that does not show
in the times fails the checks of `vaedist.data.format.shard_reader`, which then reads the shared folder.

Of the processes of a job on one node the first copies and the others wait for it; two jobs wait for each other, as
long as the one that copies makes progress. What was copied before a kill or a stop serves the next start. Any other
failure is logged in one line and costs speed only: the shared folder is read, the same bytes in the same order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vaedist.core.files import TEMPORARY
from vaedist.data.format.index import Index
from vaedist.data.format.split import Shard, Split
from vaedist.data.loading import local_disk, verified_copies
from vaedist.data.loading.local_disk import WORK, CannotStage, size
from vaedist.data.loading.verified_copies import StagedFile, VerifiedFiles

if TYPE_CHECKING:
    from vaedist.data.loading.cache import Collectives

NODE_LOCAL = "VAEDIST_NODE_LOCAL"
GROUP = "VAEDIST_GROUP"

_log = logging.getLogger("vaedist")
_AT_ONCE = 4  # files copied at once: a parallel file system is slow to one reader and fast to several
_LIMIT_S = 1200.0
"""For all of staging; the other ranks wait in a collective, which has a deadline of half an hour."""
_PATIENCE_S = 120.0
"""Without progress of another job that copies the same files."""
_REPORT_EVERY_S = 10.0
_POLL_S = 0.2


@contextlib.contextmanager
def stage_shards(
    index: Index,
    splits: Iterable[str],
    *,
    group: Collectives | None = None,
    report: Callable[[str], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Index]:
    """The same data on the node's own disk, for as long as the context is open; or `index` itself.

    Collective: with a `group` of several processes, all of them enter at the same point.

    Args:
        index: The packed folder.
        splits: Names of those that will be read.
        group: The process group; none: this process alone.
        report: Shows one line of progress.
        stopped: Whether the run is to stop, which ends the copying early; called from several threads.

    Yields:
        An index whose shards are sound copies, or `index` and a warning that says why not.

    Raises:
        UserError: there is no such split, or it is empty.
    """
    wanted, names = os.environ.get(NODE_LOCAL, ""), sorted(set(splits))
    shards = [shard for name in names for shard in index.split(name).shards]
    # Rank 0 decides whether anything is staged; the folder's name may differ from node to node.
    if not (wanted if group is None else group.from_leader(wanted.encode)):
        yield index
        return
    with contextlib.ExitStack() as held_open:
        staging = _Staging(
            shards, index.folder, wanted, os.environ.get(GROUP, ""), report, stopped, held_open
        )
        folder: Path | None = None
        if group is None or group.local_rank == 0:
            folder = staging.prepare()
        if group is not None:
            group.barrier()
            if group.local_rank != 0:
                folder = staging.adopt()
        yield index if folder is None else _reading_copies(index, names, folder)


def _reading_copies(index: Index, splits: Iterable[str], folder: Path) -> Index:
    """`index`, with these splits read from the copies in `folder`."""

    def copied(shard: Shard) -> Shard:
        tar, columns = folder / f"{shard.sha256}.tar", folder / f"{shard.columns_sha256}.cols"
        return replace(shard, tar=tar, columns_path=columns, original=shard)

    moved = {name: Split(name, [copied(shard) for shard in index.splits[name].shards]) for name in splits}
    return index.with_splits({**index.splits, **moved})


class _Paused(CannotStage):
    """Copying ended before it was done; what there is serves the next start."""


class _OtherFailed(_Paused):
    """Another thread has failed, and has the reason."""


@dataclass
class _Staging:
    """One process's attempt to get a selection of shards onto the node's own disk."""

    shards: Sequence[Shard]
    shared: Path
    wanted: str
    group: str
    report: Callable[[str], None]
    stopped: Callable[[], bool]
    held_open: contextlib.ExitStack
    deadline: float = field(default_factory=lambda: time.monotonic() + _LIMIT_S)
    _touched: float = 0.0

    def prepare(self) -> Path | None:
        """The folder of sound copies, in use until `held_open` closes; None, and a warning, if that cannot be."""
        before = time.monotonic()
        folder: Path | None = None
        try:
            files, folder = self._use()
            with self._sole_copier(folder):
                copied = self._complete(folder, files)
        except (CannotStage, OSError) as error:
            self.held_open.close()
            if folder is not None:
                local_disk.remove_if_empty(folder)
            if not (isinstance(error, _Paused) and self.stopped()):
                reason = str(error)
                if isinstance(error, OSError) and error.strerror:
                    reason = f"{error.filename or self.wanted}: {error.strerror}"
                _log.warning("staging: %s; reading %s itself", reason, self.shared)
            return None
        took = time.monotonic() - before
        how = f"{size(copied)} copied in {took:.1f} s" if copied else "copied before"
        self.report(f"staging: reading from {folder} ({how})")
        return folder

    def adopt(self) -> Path | None:
        """The same folder, once another process of this node has prepared it; None if that failed."""
        with contextlib.suppress(CannotStage, OSError):
            files, folder = self._use()
            verified = VerifiedFiles(folder)
            if all(verified.is_verified(file) for file in files):
                return folder
        self.held_open.close()
        return None

    def _use(self) -> tuple[list[StagedFile], Path]:
        """The files and their folder, in use until `held_open` closes."""
        files = verified_copies.files_to_stage(self.shards)
        place, gid = Path(os.path.expandvars(self.wanted)), local_disk.group_id(self.group)
        if "$" in str(place) or not place.is_absolute():
            raise CannotStage(
                f"{NODE_LOCAL} is {self.wanted!r}, which is no path from the root with variables that are set here"
            )
        folder = local_disk.own_root(place, gid) / verified_copies.folder_name(files)
        self.held_open.enter_context(local_disk.in_use(folder, gid, self.deadline))
        return files, folder

    # Copying ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _sole_copier(self, folder: Path) -> Iterator[None]:
        """Be the one process that copies to this folder; wait for another one as long as it makes progress."""
        work = os.open(folder / WORK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            last_touched, since, reported = 0, time.monotonic(), False
            while not local_disk.locked(work, fcntl.LOCK_EX):
                now, newest = time.monotonic(), os.fstat(work).st_mtime_ns
                if newest != last_touched:
                    last_touched, since = newest, now
                if now > min(self.deadline, since + _PATIENCE_S):
                    raise CannotStage(f"another process of this node copies to {folder} and does not get on")
                if self.stopped():
                    raise _Paused("asked to stop")
                if not reported:
                    self.report(f"staging: another process of this node copies to {folder}: waiting for it")
                    reported = True
                time.sleep(_POLL_S)
            os.utime(work)
            yield
        finally:
            os.close(work)

    def _complete(self, folder: Path, files: Sequence[StagedFile]) -> int:
        """Make the folder whole; how many bytes had to be copied.

        Raises:
            CannotStage, OSError: it cannot be made whole.
        """
        for left in folder.glob(f"{TEMPORARY}*"):
            left.unlink()  # of a process that was killed, for we hold the lock
        verified = VerifiedFiles(folder)
        try:
            missing = [file for file in files if not self._is_sound(folder, file, verified)]
            needed = sum(file.size for file in missing)
            if missing:
                local_disk.make_room(folder, needed)
                self.report(f"staging: copying {size(needed)} from {self.shared} to {folder}")
                self._copy(folder, missing, verified)
        except _Paused:
            verified.write(self.shared, files)
            raise
        if verified.changed:
            verified.write(self.shared, files)
        return needed

    def _is_sound(self, folder: Path, file: StagedFile, verified: VerifiedFiles) -> bool:
        """Whether a copy has the right bytes; one that was not verified since the machine started is read again.

        A wrong copy is removed.
        """
        if verified.is_verified(file):
            return True
        path = folder / file.name
        state = verified_copies.FileState.of(path)
        if state is not None and state.size == file.size:
            digest = hashlib.sha256()
            for block in verified_copies.read_blocks(path):
                digest.update(block)
                self.keep_alive(folder)
            if digest.hexdigest() == file.sha256:
                verified.add(file)
                return True
        path.unlink(missing_ok=True)
        return False

    def _copy(self, folder: Path, files: Sequence[StagedFile], verified: VerifiedFiles) -> None:
        progress = _Progress(self, folder, sum(file.size for file in files))
        mode = 0o440 if self.group else 0o400
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="vaedist-staging") as pool:
            copy_file = partial(verified_copies.copy_file, folder=folder, mode=mode, add=progress.add)
            copies = [pool.submit(copy_file, file) for file in files]
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
                verified.add(file)
        # Raise a real failure before a stop or the deadline, and these before what only followed from them.
        failures.sort(key=lambda error: (isinstance(error, _Paused), isinstance(error, _OtherFailed)))
        if failures and not isinstance(failures[0], _Paused):
            for file in files:  # incomplete, they would only fill the disk
                (folder / file.name).unlink(missing_ok=True)
        if failures:
            raise failures[0]

    def keep_alive(self, folder: Path) -> None:
        """Show other jobs that this one makes progress; called from several threads.

        Raises:
            _Paused: copying has to end here.
        """
        now = time.monotonic()
        if self.stopped():
            raise _Paused("asked to stop")
        if now > self.deadline:
            minutes = _LIMIT_S / 60
            raise _Paused(f"copying takes more than {minutes:.0f} minutes (the next start goes on with it)")
        if now - self._touched > 1:
            self._touched = now
            os.utime(folder / WORK)


class _Progress:
    """Bytes copied by all threads."""

    def __init__(self, staging: _Staging, folder: Path, total: int) -> None:
        self.staging, self.folder, self.total = staging, folder, total
        self.done, self.over = 0, False
        self._reported = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that were read.

        Raises:
            _Paused: copying has to end here.
            _OtherFailed: another thread has failed.
        """
        if self.over:
            raise _OtherFailed("another file could not be copied")
        self.staging.keep_alive(self.folder)
        with self._lock:
            self.done += count
            if time.monotonic() - self._reported > _REPORT_EVERY_S:
                self._reported = time.monotonic()
                self.staging.report(f"staging: {size(self.done)} of {size(self.total)}")
