"""The local launcher: N processes on this machine, started, watched and cleaned up by this one.

With one worker the loop runs in this process. So it does where another launcher (torchrun, srun) made this process
one rank of a group.

With N workers this process trains nothing. It holds the run's lock and hands its token to the ranks. It opens the
port of the rendezvous itself and passes the listening socket to rank 0, so that no other program can take the port.
It starts `python -m vaedist.launchers.rank_process` N times and reads a pipe from each. The kernel closes the pipe
however a rank dies, so a death is noticed at once. The other ranks get a moment to report their errors, then they are
killed. If this process dies itself, the kernel kills the ranks (`PR_SET_PDEATHSIG`).

A rank that is stopped (SIGSTOP, a frozen cgroup) closes no pipe. It counts as lost, and is killed, when no heartbeat
has come for `hang_seconds`. A rank whose main thread stalls reports that itself and exits
(`vaedist.distributed.liveness`).

After a loss all ranks start again from the last checkpoint, at most `max_failures` times, and the time of the
recovery is printed. An error that a rank could name is not tried again.

A signal to this process is written to the run's stop file; a signal to a rank is agreed on by all. Either way every
rank saves the same step and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from vaedist.config.job import Job
from vaedist.core import errors
from vaedist.core.errors import UserError, WorkerLost
from vaedist.distributed.liveness.silence import HANG_SECONDS, LOADING_SECONDS, LOOK_SECONDS, SilenceClock
from vaedist.launchers.environment import loopback_interface, python_path, rank_environment
from vaedist.launchers.rank_process import fit_rank
from vaedist.launchers.recovery import Recovery
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.startup_timings import process_start_time
from vaedist.runs.stop_request import StopRequest, write_stop_file

_GRACE_SECONDS = 5.0
"""How long the other ranks may report errors after one has failed, and how long a rank may take to exit."""

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}


def run(
    job: Job,
    run_folder: Path,
    *,
    workers: int | None = None,
    device: str = "auto",
    max_failures: int = 0,
    hang_seconds: float = HANG_SECONDS,
    options: FitOptions | None = None,
) -> Outcome:
    """Train with `workers` processes on this machine.

    Args:
        job: The job.
        run_folder: Made if missing (0700).
        workers: Processes; None: one, or the rank that another launcher made of this process.
        device: `auto`, `cpu` or `cuda`; a rank takes the GPU of its number.
        max_failures: How often a group that lost a rank is started again.
        hang_seconds: How long a rank may be silent, or keep others waiting while its main thread stands still, before
            it counts as lost; 0: for ever.
        options: What the command asked for; the token is filled in here, and the attempt where it has no name.

    Raises:
        UserError: what stopped the run, from whichever rank.
    """
    launched = all(name in os.environ for name in _RENDEZVOUS)
    if workers is not None and launched:
        raise UserError(
            f"this process is rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} of another launcher (RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set): leave --workers out, or unset these variables"
        )
    options = options or FitOptions()
    options = replace(options, attempt=options.attempt or secrets.token_hex(4))
    if workers is None or workers == 1:
        return fit_rank(job, run_folder, device, options.with_startup(("imports", process_start_time())))
    RunFolder.make(run_folder)
    with StopRequest(None, "") as request, RunLock.acquire(run_folder) as lock:
        options = replace(options, token=lock.token, hang_seconds=hang_seconds)
        options = options.with_startup(("launcher", process_start_time()))
        failures = 0
        recovery = Recovery()
        while True:
            try:
                return _run_group(job, run_folder, workers, device, options, request, recovery)
            except WorkerLost as lost:
                failures += 1
                if failures > max_failures or request.requested:
                    raise
                options = replace(options, startup=None)
                message = f"{lost}; starting again from there ({failures} of at most {max_failures} times)"
                print(f"vaedist: {message}", file=sys.stderr, flush=True)


# The group --------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """One started process: what it reported, and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    answers: int  # the reading end of its pipe
    console: IO[bytes] | None  # what ranks beyond 0 print, shown only if the rank dies
    stages: dict[str, float] = field(
        default_factory=dict
    )  # the stages it has reached, after how much CPU time
    answer: dict[str, Any] | None = None  # its outcome or its error; None if it died without one
    pipe_ended: bool = False
    hung: float = 0.0  # after how many seconds of silence it was killed
    stuck: str = ""  # its report of a stalled main thread
    killed_by_launcher: bool = False
    _line: bytearray = field(default_factory=bytearray)  # incomplete

    @property
    def failed(self) -> bool:
        return bool(self.stuck or self.hung) or (
            self.pipe_ended and (self.answer is None or "outcome" not in self.answer)
        )

    @property
    def died(self) -> bool:
        """Whether it ended without an answer, and not because the launcher ended it."""
        killed = self.killed_by_launcher and self.process.returncode in (None, -signal.SIGKILL)
        return self.answer is None and not killed

    def on_message(self, part: bytes) -> None:
        """Take what came through the pipe: each line is a heartbeat (empty), a stage, a stall, or the answer."""
        *lines, rest = (bytes(self._line) + part).split(b"\n")
        self._line = bytearray(rest)
        for message in (json.loads(line) for line in lines if line):
            if "reached" in message:
                self.stages[message["reached"]] = message["cpu"]
            elif "stuck" in message:
                self.stuck = message["stuck"]
            else:
                self.answer = message

    def last_lines(self) -> str:
        if self.console is None:
            return ""
        self.console.seek(0)
        text = self.console.read().decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-20:])


def _run_group(
    job: Job,
    run_folder: Path,
    workers: int,
    device: str,
    options: FitOptions,
    request: StopRequest,
    recovery: Recovery,
) -> Outcome:
    config = {
        "launcher": os.getpid(),
        "job": job.model_dump(mode="json"),
        "run_folder": str(run_folder),
        "device": device,
        "options": asdict(options),
    }
    ranks: list[_Rank] = []
    with contextlib.ExitStack() as exits:
        exits.callback(_end, ranks)
        listener = exits.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2 * workers + 8))
        for number in range(workers):
            rank = _start(number, workers, listener, config, exits)
            ranks.append(rank)  # at once: `_end` must know it should the next one fail to start
        listener.close()  # rank 0 holds it now
        failures = _watch(ranks, run_folder, options, request, recovery)
        if failures:
            raise _failure(failures, workers)
    answer = ranks[0].answer
    assert answer is not None
    return Outcome(**answer["outcome"])


def _start(
    number: int, workers: int, listener: socket.socket, config: dict[str, Any], exits: contextlib.ExitStack
) -> _Rank:
    reading, writing = os.pipe()
    exits.callback(os.close, reading)
    console = None if number == 0 else exits.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    numbers = (number, workers)
    environment |= rank_environment(numbers, numbers, "127.0.0.1", listener.getsockname()[1])
    environment["PYTHONPATH"] = python_path()
    environment.pop("VAEDIST_STORE_FD", None)
    environment |= loopback_interface()
    inherited = [writing]
    if number == 0:
        environment["VAEDIST_STORE_FD"] = str(listener.fileno())
        inherited.append(listener.fileno())
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vaedist.launchers.rank_process"],
            stdin=subprocess.PIPE,
            stdout=console,
            stderr=console,
            env=environment,
            pass_fds=inherited,
        )
    finally:
        os.close(writing)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps({**config, "answers": writing}).encode())
    return _Rank(number, process, reading, console)


def _watch(
    ranks: list[_Rank], run_folder: Path, options: FitOptions, request: StopRequest, recovery: Recovery
) -> list[_Rank]:
    """Wait for all ranks; those that failed, the first to fail first."""
    failures: list[_Rank] = []
    deadline = float("inf")
    stop_forwarded = False
    clock = SilenceClock()
    with selectors.DefaultSelector() as pipes:
        for rank in ranks:
            pipes.register(rank.answers, selectors.EVENT_READ, rank)
        while pipes.get_map() and time.monotonic() <= deadline:
            for key, _ in pipes.select(timeout=LOOK_SECONDS):
                rank = key.data
                clock.reset(rank.number)
                if part := os.read(rank.answers, 1 << 16):
                    rank.on_message(part)
                else:
                    pipes.unregister(rank.answers)
                    rank.pipe_ended = True
            if not any(rank.failed for rank in ranks):
                _report_recovery(recovery, ranks, options.quiet)
            silent = [key.data for key in pipes.get_map().values() if not key.data.hung]
            clock.look(*(rank.number for rank in silent))
            for rank in silent if options.hang_seconds else ():
                loading = 0.0 if "imported" in rank.stages else LOADING_SECONDS
                if clock.seconds[rank.number] > max(options.hang_seconds, loading):
                    if rank.process.poll() is not None:  # dead, while a child of its own holds the pipe open
                        pipes.unregister(rank.answers)
                        rank.pipe_ended = True
                        continue
                    # It fails now: one that is frozen dies when it thaws, and its pipe ends no earlier.
                    rank.hung = clock.seconds[rank.number]
                    rank.process.kill()
            for rank in ranks:
                if rank.failed and rank not in failures:
                    if not failures:
                        recovery.on_lost(time.monotonic())
                        deadline = time.monotonic() + _GRACE_SECONDS
                    failures.append(rank)
            if request.requested and not stop_forwarded:
                stop_forwarded = True
                write_stop_file(run_folder, options.attempt)
    _end(ranks)
    return failures


def _report_recovery(recovery: Recovery, ranks: list[_Rank], quiet: bool) -> None:
    """Note which stage all ranks have reached; after their first step say where the time went."""
    while (stage := recovery.next_stage) and all(stage in rank.stages for rank in ranks):
        message = recovery.on_stage(stage, time.monotonic())
        if message and not quiet:
            busiest = max(rank.stages[stage] for rank in ranks)
            print(f"{message}; CPU time of a rank {busiest:.1f} s", flush=True)


def _end(ranks: list[_Rank]) -> None:
    """Wait a moment for ranks that are about to exit, kill the others, and leave no zombie."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        # The kernel closes the pipe of a dying process a moment before `poll` sees its death.
        if rank.answer is not None or rank.pipe_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.process.poll() is None:
            rank.killed_by_launcher = True
            rank.process.kill()
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A frozen one is not waited for: its death is decided, it runs no more instruction of its own.
            rank.process.wait(_GRACE_SECONDS if rank.hung or rank.stuck else None)


# The error --------------------------------------------------------------------------------------------------


def _failure(failures: list[_Rank], workers: int) -> Exception:
    """The error that ended the group: a named error before a death, a death before the errors it caused in others.

    Args:
        failures: At least one, the first to fail first.
    """
    for rank in failures:
        if rank.stuck:
            return WorkerLost(f"{rank.stuck}; the same command continues from the last checkpoint")
    for rank in failures:
        if rank.answer is not None and "error" in rank.answer:
            kind = getattr(errors, rank.answer["error"], UserError)
            error: Exception = kind(rank.answer["text"])
            return error
    for rank in failures:
        who = f"rank {rank.number} of {workers}"
        if rank.hung:
            return WorkerLost(
                f"{who} did not answer for {rank.hung:.0f} s (stopped, frozen, or its machine hung) and was killed; "
                "the same command continues from the last checkpoint"
            )
        if rank.died:
            if lines := rank.last_lines():
                print(f"vaedist: rank {rank.number} last printed:\n{lines}", file=sys.stderr)
            return WorkerLost(f"{who} {_death(rank.process.returncode)}")
    for rank in failures:
        if rank.answer is not None:
            return RuntimeError(f"rank {rank.number} of {workers} failed\n{rank.answer['traceback']}")
    return WorkerLost(
        f"rank {failures[0].number} of {workers} closed its pipe without an answer, did not exit within "
        f"{_GRACE_SECONDS:.0f} s and was killed; the same command continues from the last checkpoint"
    )


def _death(code: int) -> str:
    """How a process died, and what is left."""
    continues = "; the same command continues from the last checkpoint"
    if code >= 0:
        return f"left with exit code {code}{continues}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if -code in _CRASHES:  # the same command may well crash again
        return f"was killed by {name}, a crash in compiled code; the run is safe up to the last checkpoint"
    hint = " (often the kernel, out of memory: ask for more, or lower data.cache and train.batch_size)"
    return f"was killed by {name}{hint if name == 'SIGKILL' else ''}{continues}"
