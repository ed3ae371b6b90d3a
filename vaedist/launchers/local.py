"""Processes on this machine: this one, or N that this process starts, watches and never leaves behind.

With one worker the loop runs right here. So it does where another launcher (torchrun, srun) made this process one
rank of a group: it then is one rank, and starts nothing.

With N workers this process trains nothing. It holds the run's lock for its whole life and hands the token down;
it opens the port of the rendezvous itself and gives rank 0 the listening socket, so that no other program can
take the port in between; and it starts `python -m vaedist.launchers.local` N times. Each rank reads its orders (JSON)
from standard input and answers with one JSON object on a pipe of its own. The end of that pipe is how a death is
noticed at once: the kernel closes it however the rank died. The others get a moment to tell what they saw, then
they are killed. Should this process die itself, the kernel kills the ranks (`PR_SET_PDEATHSIG`).

A rank that lives but does not run (SIGSTOP, a frozen cgroup, a machine that swaps itself to a standstill) closes no
pipe, and the others would wait for it in a collective for half an hour. So a thread of each rank says a byte every
second, and one that has said nothing for `hang_seconds` is killed. Silence is counted in this process's own looks
at the pipes: a launcher that was itself stopped (Ctrl-Z, a closed laptop) blames nobody for the time it slept. A rank
that still says its bytes while its main thread stands still finds that out itself (`vaedist.distributed.liveness`),
says so, and ends.

A lost rank costs what was trained since the last checkpoint: all ranks start again from there, at most
`max_failures` times, and where the time of such a recovery went is printed. An error that a rank could name is
not tried again.

Signals to this process become the run's stop file; a signal to a rank is agreed on by all. Either way every rank
saves the same step and leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import vaedist
from vaedist.config.job import Job
from vaedist.core import errors
from vaedist.core.errors import UserError, WorkerLost
from vaedist.distributed.liveness.silence import BEAT_SECONDS, LOADING_SECONDS
from vaedist.launchers.allocation import allocation
from vaedist.launchers.recovery import Recovery
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.run_lock import RunLock
from vaedist.runs.startup_timings import process_start_time
from vaedist.runs.stop_request import StopRequest, write_stop_file

_GRACE_SECONDS = 5.0
"""How long the other ranks may tell what they saw after one has failed, and how long a rank may take to leave."""

HANG_SECONDS = 45.0
"""How long a rank may be silent before it counts as lost."""

_LOOK_SECONDS = 0.5

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
        options: What the door asked for; the token is filled in here, and the attempt where it has no name.

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
        return fit_here(job, run_folder, device, options)
    RunFolder.make(run_folder)
    with StopRequest(None, "") as asked, RunLock.acquire(run_folder) as lock:
        options = replace(options, token=lock.token, hang_seconds=hang_seconds)
        if options.startup is not None:
            options = replace(options, startup=(*options.startup, ("launcher", process_start_time())))
        failures = 0
        recovery = Recovery()
        while True:
            try:
                return _run_group(job, run_folder, workers, device, options, asked, hang_seconds, recovery)
            except WorkerLost as lost:
                failures += 1
                if failures > max_failures or asked.requested:
                    raise
                options = replace(options, startup=None)
                told = f"{lost}; starting again from there ({failures} of at most {max_failures} times)"
                print(f"vaedist: {told}", file=sys.stderr, flush=True)


def fit_here(
    job: Job,
    run_folder: Path,
    device: str,
    options: FitOptions,
    reached: Callable[[str], None] = lambda _: None,
    stuck: Callable[[str], None] | None = None,
) -> Outcome:
    """The loop in this process, as the rank that the environment says it is; alone where it says nothing."""
    from vaedist.distributed.liveness.stalls import print_to_stderr
    from vaedist.distributed.process_group import Group
    from vaedist.training.loop import fit

    reached("imported")
    if options.startup is not None:
        here = (("imports", process_start_time()), ("rendezvous", time.time()))
        options = replace(options, startup=(*options.startup, *here))
    group = Group.join(device)
    reached("joined")
    try:
        options = replace(options, threads=max(1, allocation().cpus // group.local_world))
        told = stuck or print_to_stderr
        return fit(job, run_folder, group=group, options=options, reached=reached, stuck=told)
    finally:
        group.close()


# The launching process --------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """One started process: what it said, and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    answers: int  # the pipe's reading end
    console: IO[bytes] | None  # what ranks beyond 0 print, shown only if the rank dies
    milestones: dict[str, float] = field(default_factory=dict)  # what it reached, after how much CPU time
    answer: dict[str, Any] | None = None  # its outcome or its error; None if it died without a word
    silent: float = 0.0  # seconds
    hung: bool = False
    stuck: str = ""  # what it said of its main thread, which stands still
    killed_by_us: bool = False
    _line: bytearray = field(default_factory=bytearray)  # one that has not ended yet

    @property
    def failed(self) -> bool:
        return self.answer is None or "outcome" not in self.answer

    def hear(self, part: bytes) -> None:
        """Take in what came through the pipe: a line is a beat (empty), a milestone, an end, or the answer."""
        self.silent = 0.0
        *lines, rest = (bytes(self._line) + part).split(b"\n")
        self._line = bytearray(rest)
        for message in (json.loads(line) for line in lines if line):
            if "reached" in message:
                self.milestones[message["reached"]] = message["cpu"]
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


def _look(recovery: Recovery, ranks: list[_Rank], quiet: bool) -> None:
    """Note what all ranks have reached by now; after their first step say where the time went."""
    while (stage := recovery.awaited) and all(stage in rank.milestones for rank in ranks):
        told = recovery.reached(stage, time.monotonic())
        if told and not quiet:
            busiest = max(
                rank.milestones[stage] for rank in ranks
            )  # what an idle machine could not do without
            print(f"{told}; CPU time of a rank {busiest:.1f} s", flush=True)


def _run_group(
    job: Job,
    run_folder: Path,
    workers: int,
    device: str,
    options: FitOptions,
    asked: StopRequest,
    hang_seconds: float,
    recovery: Recovery,
) -> Outcome:
    orders = {
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
            rank = _start(number, workers, listener, orders, exits)
            ranks.append(rank)  # at once: `_end` must know it should the next one fail to start
        listener.close()  # rank 0 holds it now
        failures = _watch(ranks, run_folder, options, asked, hang_seconds, recovery)
        if failures:
            raise _verdict(failures, workers)
    answer = ranks[0].answer
    assert answer is not None
    return Outcome(**answer["outcome"])


def _start(
    number: int, workers: int, listener: socket.socket, orders: dict[str, Any], exits: contextlib.ExitStack
) -> _Rank:
    reading, writing = os.pipe()
    exits.callback(os.close, reading)
    console = None if number == 0 else exits.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    environment |= {
        "RANK": str(number),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "PYTHONPATH": python_path(),
    }
    environment.pop("VAEDIST_STORE_FD", None)
    environment |= loopback()
    handed = [writing]
    if number == 0:
        environment["VAEDIST_STORE_FD"] = str(listener.fileno())
        handed.append(listener.fileno())
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vaedist.launchers.local"],
            stdin=subprocess.PIPE,
            stdout=console,
            stderr=console,
            env=environment,
            pass_fds=handed,
        )
    finally:
        os.close(writing)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps({**orders, "answers": writing}).encode())
    return _Rank(number, process, reading, console)


def python_path() -> str:
    """PYTHONPATH with which another Python finds this vaedist, checkout or installed."""
    home = str(Path(vaedist.__file__).resolve().parents[1])
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if home not in (*path, *site.getsitepackages(), site.getusersitepackages()):
        path.insert(0, home)
    return os.pathsep.join(path)


def loopback() -> dict[str, str]:
    """What makes gloo, on one machine, independent of how its host name resolves; a setting of the user's stays."""
    there = any(name == "lo" for _, name in socket.if_nameindex())
    return {"GLOO_SOCKET_IFNAME": "lo"} if there and "GLOO_SOCKET_IFNAME" not in os.environ else {}


def _watch(
    ranks: list[_Rank],
    run_folder: Path,
    options: FitOptions,
    asked: StopRequest,
    hang_seconds: float,
    recovery: Recovery,
) -> list[_Rank]:
    """Wait for all ranks; those that failed, the first to fail first."""
    failures: list[_Rank] = []
    deadline: float | None = None
    told = False
    looked = time.monotonic()

    def failed(rank: _Rank) -> None:
        nonlocal deadline
        if not failures:
            recovery.lost(time.monotonic())
            deadline = time.monotonic() + _GRACE_SECONDS
        if rank not in failures:
            failures.append(rank)

    with selectors.DefaultSelector() as open_pipes:
        for rank in ranks:
            open_pipes.register(rank.answers, selectors.EVENT_READ, rank)
        while open_pipes.get_map():
            for key, _ in open_pipes.select(timeout=_LOOK_SECONDS):
                rank = key.data
                part = os.read(rank.answers, 1 << 16)
                if part:
                    rank.hear(part)
                    if rank.stuck:
                        failed(rank)  # it is about to end; where the kernel holds its thread, it cannot
                    continue
                open_pipes.unregister(rank.answers)
                if rank.failed:
                    failed(rank)
            if not failures:
                _look(recovery, ranks, options.quiet)
            # However long the last look is ago, it counts as one: this process may have been stopped itself.
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * _LOOK_SECONDS), now
            for key in list(open_pipes.get_map().values()) if hang_seconds else ():
                rank = key.data
                if rank.hung:
                    continue
                rank.silent += passed
                limit = hang_seconds if "imported" in rank.milestones else max(hang_seconds, LOADING_SECONDS)
                if rank.silent > limit:
                    rank.hung = True
                    rank.process.kill()
                    failed(rank)  # now: one that is frozen dies when it thaws, and its pipe ends no earlier
            if asked.requested and not told:
                told = True
                write_stop_file(run_folder, options.attempt)
            if deadline and time.monotonic() > deadline:
                break
    _end(ranks)
    return failures


def _end(ranks: list[_Rank]) -> None:
    """Wait a moment for ranks that have said their last word, kill what is left, and leave no zombie."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if rank.answer is not None:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.process.poll() is None:
            rank.killed_by_us = True
            rank.process.kill()
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A frozen one is not waited for: its death is decided, it runs no more instruction of its own.
            rank.process.wait(_GRACE_SECONDS if rank.hung or rank.stuck else None)


def _verdict(failures: list[_Rank], workers: int) -> Exception:
    """What the user is told: a named error before a death, a death before the errors it caused in others."""
    for rank in failures:
        if rank.stuck:
            return WorkerLost(f"{rank.stuck}; the same command continues from the last checkpoint")
    for rank in failures:
        if rank.answer is not None and "error" in rank.answer:
            kind = getattr(errors, rank.answer["error"], UserError)
            error: Exception = kind(rank.answer["text"])
            return error
    for rank in failures:
        if rank.hung:
            return WorkerLost(
                f"rank {rank.number} of {workers} did not answer for {rank.silent:.0f} s (stopped, frozen, or its "
                "machine hung) and was killed; the same command continues from the last checkpoint"
            )
        if rank.answer is None and not rank.killed_by_us:
            if lines := rank.last_lines():
                print(f"vaedist: rank {rank.number} last printed:\n{lines}", file=sys.stderr)
            return WorkerLost(
                f"rank {rank.number} of {workers} {_death(rank.process.returncode)}; the same command continues "
                "from the last checkpoint"
            )
    for rank in failures:
        if rank.answer is not None:
            return RuntimeError(f"rank {rank.number} of {workers} failed\n{rank.answer['traceback']}")
    raise AssertionError("a group failed, but no rank did")


def _death(code: int) -> str:
    if code >= 0:
        return f"left with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often the kernel, out of memory: ask for more, or lower data.cache and train.batch_size)"
    return f"was killed by {name}" + (hint if name == "SIGKILL" else "")


# A started rank ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def early_signals(run_folder: Path, attempt: str) -> Iterator[None]:
    """Until the loop listens, a signal to this rank becomes the stop file, which outlives its start."""
    heard = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, lambda *_: write_stop_file(run_folder, attempt)) for number in heard]
    try:
        yield
    finally:
        for number, handler in zip(heard, before, strict=True):
            signal.signal(number, handler)


class _Line:
    """The rank's end of its pipe: lines of JSON, and an empty line as a sign of life every second."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._writing = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="vaedist-beat", daemon=True).start()

    def reached(self, milestone: str) -> None:
        self._say({"reached": milestone, "cpu": time.process_time()})

    def stuck(self, sentence: str) -> None:
        """This rank is about to end, because its main thread stands still."""
        self._say({"stuck": sentence})

    def end(self, answer: dict[str, Any]) -> None:
        """The last word."""
        self._over.set()
        self._say(answer)
        with self._writing:  # a beat may have been on its way
            os.close(self._descriptor)

    def _say(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._writing:  # a long answer is more than one write to a pipe
            while line:
                line = line[os.write(self._descriptor, line) :]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._writing:
                if not self._over.is_set():
                    os.write(self._descriptor, b"\n")


def _rank_main() -> int:
    orders = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die when the launcher does
    if os.getppid() != orders["launcher"]:
        return 1  # it died before that was set
    os.set_inheritable(orders["answers"], False)
    line = _Line(orders["answers"])
    line.reached("started")
    folder, options = Path(orders["run_folder"]), FitOptions(**orders["options"])
    with early_signals(folder, options.attempt):
        try:
            job = Job.model_validate(orders["job"])
            outcome = fit_here(job, folder, orders["device"], options, line.reached, line.stuck)
            answer: dict[str, Any] = {"outcome": asdict(outcome)}
        except UserError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except Exception:  # noqa: BLE001 - whatever it is, the launcher prints it
            answer = {"traceback": traceback.format_exc()}
    line.end(answer)
    return 0


if __name__ == "__main__":
    raise SystemExit(_rank_main())
