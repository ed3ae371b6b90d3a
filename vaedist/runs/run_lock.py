"""One process at a time may train a run: the lock, and the proofs that take it over.

The lock is the file `lock` in the run folder. It is made by `link()` of a complete file under another name: the
one operation that is atomic on local disks and on every NFS, and that never shows half a file. It names its
holder: a random token, host, kernel boot, namespaces, pid with start time, Slurm job and restart count.

The holder is the process that launched the run, for its whole life; workers get the token and `check()` before each
commit that the file still carries it. So a holder that was suspended, and lost its lock meanwhile, cannot write.

A lock is taken over only with proof that its holder has gone:

| situation | proof |
|---|---|
| same kernel boot and same namespaces | that pid does not exist, is a zombie, or started at another time |
| same host and machine id, other kernel boot | the machine was restarted |
| same Slurm cluster and job, lower restart count | Slurm requeued the job: we are its successor |
| Slurm answers for that cluster and user | the job is unknown to it, or is not on any node |

Everything else is no proof, for example a pid that only looks free from inside another container: the run is refused,
and the message names the holder and the file to remove by hand. A pid seen alive in our own namespace is final.

When several processes take over the same stale lock, one wins: the first to link `lock.<token of the stale lock>` may
rename the stale lock away, after reading again that it still has that token.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.slurm.batch_job import job_start, why_job_is_gone

NAME = "lock"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. Empty text: not known, or not there."""

    token: str
    host: str
    machine: str
    boot: str
    namespaces: str
    pid: int
    started: int
    """Clock ticks from boot to the start of the process."""
    user: int
    since: str
    slurm_cluster: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0

    @classmethod
    def this_process(cls) -> Owner:
        """The calling process, with a fresh token."""
        cluster, job, restarts = job_start()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespaces=_namespaces(),
            pid=os.getpid(),
            started=process_start_ticks(os.getpid()) or 0,
            user=os.getuid(),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            slurm_cluster=cluster,
            slurm_job=job,
            slurm_restarts=restarts,
        )

    def __str__(self) -> str:
        job = f"Slurm job {self.slurm_job}, " if self.slurm_job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"


class RunLocked(UserError):
    """Another process holds the lock and cannot be shown to have gone."""

    def __init__(self, sentence: str, owner: Owner) -> None:
        super().__init__(sentence)
        self.owner = owner


class RunLock:
    """The lock of one run folder, held or (by a worker) only checked. Also a context manager."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    @classmethod
    def acquire(cls, run_folder: Path) -> RunLock:
        """Take the run's lock.

        Raises:
            RunLocked: another process holds it and cannot be shown to have gone.
            UserError: the folder takes no files.
        """
        me = Owner.this_process()
        try:
            _acquire(Path(run_folder) / NAME, me)
        except OSError as error:
            raise UserError(f"cannot make the lock of the run {run_folder}: {error.strerror}") from None
        return cls(Path(run_folder) / NAME, me.token)

    @classmethod
    def holding(cls, run_folder: Path, token: str) -> RunLock:
        """A worker's view of the lock that its launcher holds under `token`: for `check`, never for `release`."""
        return cls(Path(run_folder) / NAME, token)

    def check(self) -> None:
        """Read the lock again.

        Raises:
            UserError: it is no longer ours. Nothing more may be written to the run.
        """
        owner = _read(self.path)
        if owner is None or owner.token != self.token:
            now = "it was removed" if owner is None else f"{owner} holds it now"
            raise UserError(
                f"the lock {self.path} is no longer ours ({now}): this process stops without writing anything more"
            )

    def release(self) -> None:
        """Give the lock back; nothing happens if it is no longer ours.

        In a folder that has become read-only the file stays. The next process can prove that its holder has ended, and
        the error that the user is about to see must not be hidden by another one.
        """
        with contextlib.suppress(OSError):
            _remove(self.path, self.token)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def proof_of_exit(owner: Owner, me: Owner) -> str | None:
    """The proof that `owner` no longer runs, in words; None if there is none."""
    if owner.boot and owner.boot == me.boot and owner.namespaces and owner.namespaces == me.namespaces:
        # Final either way: a process seen alive counts more than what Slurm says.
        return _proof_of_process_exit(owner)
    same_host = owner.machine and (owner.host, owner.machine) == (me.host, me.machine)
    if same_host and owner.boot and me.boot and owner.boot != me.boot:
        return f"{owner.host} was restarted"
    if owner.slurm_job:
        here = (me.slurm_cluster, me.slurm_job)
        if here == (owner.slurm_cluster, owner.slurm_job) and me.slurm_restarts > owner.slurm_restarts:
            return f"Slurm restarted job {owner.slurm_job}"
        if owner.user == me.user:  # a site may hide other users' jobs
            return why_job_is_gone(owner.slurm_cluster, owner.slurm_job)
    return None


# The file ---------------------------------------------------------------------------------------------------


def _acquire(path: Path, me: Owner) -> None:
    """Make `me` the owner of the lock file `path`; a lock whose holder is proven gone is replaced."""
    while not _link(path, me):
        owner = _read(path)
        if owner is None:
            continue  # released this very moment
        proof = proof_of_exit(owner, me)
        if proof is None:
            raise _refusal(path, owner)
        claim = path.with_name(f"{path.name}.{owner.token}")
        _acquire(claim, me)
        try:
            _remove(path, owner.token)
        finally:
            claim.unlink(missing_ok=True)


def _link(path: Path, owner: Owner) -> bool:
    """Create `path` with all its content; False if it exists."""
    scratch = path.with_name(f".lock-{uuid.uuid4().hex}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(owner), file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost: the link may be ours all the same.
            return os.stat(scratch).st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            raise UserError(
                f"the filesystem of {path.parent} has no hard links ({error.strerror}), which the run's lock "
                "needs: put the run folder on another one"
            ) from None
        return True
    finally:
        scratch.unlink(missing_ok=True)


def _remove(path: Path, token: str) -> None:
    """Remove the lock file if it carries `token`; a file of someone else is left, or put back."""
    owner = _read(path)
    if owner is None or owner.token != token:
        return
    aside = path.with_name(f".lock-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        moved = _read(aside)
        if moved is not None and moved.token != token:
            # Between our read and our rename the lock was removed by hand, and another process took it.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> Owner | None:
    """The owner written in a lock file; None if there is no file.

    Raises:
        UserError: it is not a lock of ours.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return Owner(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(
            f"{path} is not a lock that this vaedist wrote: if no process trains this run, remove it"
        ) from None


def _refusal(path: Path, owner: Owner) -> RunLocked:
    stop = f"scancel {owner.slurm_job}" if owner.slurm_job else f"kill {owner.pid} on {owner.host}"
    return RunLocked(
        f"the run {path.parent} is being trained by {owner}: wait for it or stop it ({stop}); if you are sure "
        f"that it has gone, remove {path}",
        owner,
    )


# The machine ------------------------------------------------------------------------------------------------


def _proof_of_process_exit(owner: Owner) -> str | None:
    start = process_start_ticks(owner.pid)
    if start is not None:
        return None if start == owner.started else f"process {owner.pid} is another one now"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return f"process {owner.pid} has ended"
    except PermissionError:
        return None  # /proc hides other users' processes here
    # It appeared between the two checks, or it is our own zombie, dead but not yet waited for.
    return f"process {owner.pid} has ended" if process_start_ticks(owner.pid) is None else None


def process_start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it has ended or is hidden from us."""
    try:
        # The command's name stands in brackets and may hold spaces and brackets itself.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], int(fields[19])
    return None if state in "ZXx" else start


def _namespaces() -> str:
    """Which process table and which clock our pids and start times belong to; empty if unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""  # /proc shows another namespace's processes, as after a bare `unshare --pid`
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    try:
        return f"{table} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # a kernel before 5.6 has but one clock
        return table


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
