"""The supervisor of a batch job: what every batch script ends in, whoever wrote it.

    exec python -m vaedist.slurm.supervisor train jobs/vqvae_oasis.yaml train.steps=20000

It alone knows Slurm. It starts the ranks on all nodes of the allocation (under `srun`, or under Ray), hears the
signals, asks the run to stop with a file that names this attempt, and has the job go on later. `exec` matters: Slurm
sends the warning of `--signal=B:USR1@180` to the batch shell, which is then this process.

What Slurm tells, and to whom, was measured (22.05):

| event | batch shell | step |
|---|---|---|
| time limit, `B:USR1@180` | USR1, 2 to 3 minutes before the end | |
| preemption, grace time, `preempt_send_user_signal` | USR1 at once | |
| preemption, grace time, without it | nothing until the end | TERM at once |
| preemption without grace, `scancel`, `scontrol requeue`, a node that is taken down | TERM | TERM |

So USR1 means: save, and go on later. A step that does nothing but listen (the canary) hears the TERM of a grace time,
for ranks that run outside any step, and for this process, which must know why ranks left: a person may also have
written the stop file. After a TERM Slurm is asked: a job that it still calls running is being preempted and goes on
later; any other it has ended or queued itself, and that is left to Slurm.

Going on is `scontrol requeue`, or a successor that was handed in at the start and waits for the end of this job
(`continue_by: resubmit`), at most `max_restarts` times: a job that fails for ever must not stay in the queue for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from vaedist.config.site import Site, load_site
from vaedist.core.errors import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    CannotWrite,
    DataError,
    Diverged,
    UserError,
    WorkerLost,
    cli_command,
)
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.startup_timings import process_start_time, timings_to_environment
from vaedist.runs.stop_request import write_stop_file
from vaedist.slurm.batch_job import SlurmJob
from vaedist.slurm.cleanup import sweep_here
from vaedist.slurm.process_layout import RAY_END, RAY_NODES, Plan, plan, srun

VERBS = ("shard", "train", "tune", "evaluate", "sample")
_DEATHS = 3
"""How often ranks that died are started again in the same allocation, as under the other engines."""

_FINAL = {EXIT_FINISHED, *(kind.exit_code for kind in (UserError, DataError, Diverged, CannotWrite))}
"""Exit codes after which going on would change nothing: finished, or a mistake that comes again."""

_END_SECONDS = 20.0
"""How long what we end may take to leave."""

_STRANGERS = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "VAEDIST_RAY_CLUSTER",
)
"""Of another cluster, or of one on the loopback address: sbatch hands the submitter's environment to the job."""

_CANARY_SECONDS = 10.0
_CANARY = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); signal.sigwait([15])"
"""Ends well on TERM alone. A shell would need a child to sleep in, and whichever of the two dies first decides."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vaedist.slurm.supervisor",
        description="Run a verb of vaedist inside a Slurm job: on all its nodes, with its signals, and again later if "
        "it could not finish. Outside a job the verb simply runs.",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray", "srun"),
        help="who starts the ranks (default: the site's; else local on one node, srun on several)",
    )
    parser.add_argument("--ranks-per-node", metavar="N", type=int, help="default: GPUs of the job on a node")
    parser.add_argument(
        "--continue-by", choices=("requeue", "resubmit", "none"), help="default: the site's, else requeue"
    )
    parser.add_argument("--max-restarts", metavar="N", type=int, help="default: the site's, else 20")
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as vaedist-VERB takes them")
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    place = os.environ.get("VAEDIST_SITE")
    site = load_site(place) if place else Site()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    job = SlurmJob.here()
    command = [sys.executable, "-m", f"vaedist.{options.verb}", *options.arguments]
    if job is None:
        sys.stdout.flush()
        os.execv(sys.executable, command)  # noqa: S606 - the same Python, no shell meant
    with _Signals() as signals:
        _settle(job, site)
        sweep_here()
        return _Supervisor(job, site, options, plan(job, site, options, command), signals).run()


def _settle(job: SlurmJob, site: Site) -> None:
    """The environment of everything that is started from here."""
    for name in _STRANGERS:
        os.environ.pop(name, None)
    os.environ["VAEDIST_JOB"] = job.marker
    if local := site.node_local:
        os.environ.setdefault("VAEDIST_NODE_LOCAL", local)  # expanded on each node
    if site.interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, site.interface)
    if idle := job.idle_gpus():
        _say(
            f"{job.node} has {idle} GPUs, but this job has none: ask for them with --gpus-per-node=N (or "
            "gpus_per_node in the site file)"
        )


# How it is watched ------------------------------------------------------------------------------------------


class _Signals:
    """What this process has heard, and a way to sleep until it hears something or a child ends."""

    def __init__(self) -> None:
        self.warned = False
        """USR1: time is nearly up."""
        self.ended = False
        """TERM or Ctrl-C: Slurm, or a person, ends the job; or a step of it heard so."""
        self._before: dict[signal.Signals, Any] = {}
        self._reading, self._writing = os.pipe()

    def __enter__(self) -> _Signals:
        for end in (self._reading, self._writing):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        for end in (self._reading, self._writing):
            os.close(end)

    @property
    def asked(self) -> bool:
        return self.warned or self.ended

    def wait(self, seconds: float) -> None:
        """Sleep, at most so long."""
        select.select([self._reading], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.warned = True
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.ended = True


@dataclass
class _Supervisor:
    job: SlurmJob
    site: Site
    options: argparse.Namespace
    plan: Plan
    signals: _Signals
    successor: str = field(default="", init=False)

    def run(self) -> int:
        restarts = self.restarts
        again = f", restart {restarts}" if restarts else ""
        _say(f"Slurm job {self.job.number}{again}: {self.options.verb} {self.plan.told}")
        self.prepare()
        for death in range(_DEATHS + 1):
            code = self.once(death)
            # A rank under srun that stands still ends itself with a code of its own; Ray has counted its losses then.
            stuck = code == WorkerLost.exit_code and self.plan.cluster is None
            killed = code < 0 or code >= 128 or stuck
            if not killed or self.signals.asked or not self.plan.again or death == _DEATHS:
                break
            _say(f"a rank was lost; starting again from the last checkpoint ({death + 1} of {_DEATHS} times)")
        return self.leave(code if code >= 0 else 128 - code)

    @property
    def restarts(self) -> int:
        """Of this job by Slurm, or of the chain of its predecessors."""
        return self.job.restarts + int(os.environ.get("VAEDIST_RESTARTS") or 0)

    @property
    def continue_by(self) -> str:
        return str(self.options.continue_by or self.site.continue_by)

    @property
    def may_continue(self) -> bool:
        limit = self.site.max_restarts if self.options.max_restarts is None else self.options.max_restarts
        return self.continue_by != "none" and self.restarts < limit

    def prepare(self) -> None:
        """Hand in the successor now: when time is up it may be too late for that."""
        if self.continue_by != "resubmit":
            return
        if self.job.restarts:
            # Slurm has queued this job again before its last start could take its successor back (a lost node).
            for number in self.job.successors():
                self.job.cancel(number)
                _say(f"job {number}, which an earlier start of this one handed in, is taken back")
        if not self.may_continue:
            return
        script = os.environ.get("VAEDIST_SCRIPT")
        if not script:
            raise UserError(
                'continue_by: resubmit needs to know the batch script: set VAEDIST_SCRIPT="$0" and '
                "VAEDIST_SCRIPT_ARGUMENTS in it, as jobs/start does"
            )
        arguments = os.environ.get("VAEDIST_SCRIPT_ARGUMENTS", "").split("\x1f")
        given = [argument for argument in arguments if argument]
        self.successor, why = self.job.submit_successor(Path(script), given, self.restarts + 1)
        if self.successor:
            _say(f"job {self.successor} waits for the end of this one and goes on where it stops")
        else:
            _say(
                f"no successor could be handed in ({why}): run the same command again when this job has ended"
            )

    def once(self, death: int) -> int:
        """Start everything, wait for its end; the exit code, negative where a signal killed it."""
        environment = os.environ | {"VAEDIST_ATTEMPT": self.plan.attempt}
        if death == 0:
            what = "srun" if self.plan.command[0] == "srun" else "start"
            environment |= timings_to_environment((("supervisor", process_start_time()), (what, time.time())))
        with contextlib.ExitStack() as exits:
            cluster = beside = None
            if self.plan.cluster is not None:
                if self.plan.run_folder is not None:
                    RunFolder.make(self.plan.run_folder)  # 0700, before anything is in it
                cluster = self.plan.cluster.with_name(f"{self.plan.cluster.name}-{death}").absolute()
                beside = exits.enter_context(_ray_nodes(self.job, cluster))
                environment["VAEDIST_RAY_CLUSTER"] = str(cluster)
            canary = exits.enter_context(_step(self._canary()))
            child = exits.enter_context(_ended(subprocess.Popen(self.plan.command, env=environment)))
            told = False
            lost_since: float | None = None
            while child.poll() is None:
                self.signals.wait(5.0)
                if canary is not None and canary.poll() == 0:
                    self.signals.ended = True  # Slurm ends the steps
                if cluster is not None and beside is not None and beside.poll() is not None:
                    # Ray's nodes are gone: the driver gets a moment to say so, and must not wait for ever.
                    if lost_since is None:
                        lost_since = time.monotonic()
                        self.signals.ended |= _heard(canary)
                    if not (cluster / "head").exists() and not self.signals.asked:
                        child.kill()
                        child.wait()
                        return 1  # Ray never started, and has said why
                    if time.monotonic() - lost_since > _END_SECONDS:
                        child.kill()
                if self.signals.asked and not told:
                    told = True
                    self.ask(child)
            if child.returncode == EXIT_STOPPED and not self.signals.asked:
                # Its ranks may have heard a TERM before the canary's end was told; or a person wrote the stop file.
                self.signals.ended |= _heard(canary)
            return child.returncode

    def _canary(self) -> list[str]:
        return [*srun(self.job, 1, nodes=1), "--cpus-per-task=1", sys.executable, "-IS", "-c", _CANARY]

    def ask(self, child: subprocess.Popen[bytes]) -> None:
        """Ask what runs to save and leave."""
        _say("asked to stop: saving a checkpoint" if self.plan.run_folder else "asked to stop")
        if self.plan.run_folder is not None:
            RunFolder.make(self.plan.run_folder)
            write_stop_file(self.plan.run_folder, self.plan.attempt)
        else:
            child.terminate()

    def leave(self, code: int) -> int:
        """Have the job go on later where that is wanted, and say how it ended."""
        if not self.signals.asked or code in _FINAL:
            if code == EXIT_STOPPED:
                _say("stopped by a stop file, not by Slurm: the same sbatch command continues")
            self.drop_successor()
            return code
        if not self.signals.warned and (state := self.job.state()) != "RUNNING":
            # Ended by its user, or queued again by Slurm: not ours to change.
            _say(f"left to Slurm, which calls this job {state or 'nothing that we could hear'}")
            if state in ("CANCELLED", "COMPLETING") and not self.job.preempted():
                self.drop_successor()
            return code
        if not self.may_continue:
            capped = f"{self.restarts} restarts, max_restarts"
            why = "continue_by: none" if self.continue_by == "none" else capped
            _say(f"not handed in again ({why}): the same sbatch command goes on from the last checkpoint")
        elif self.continue_by == "requeue":
            refusal = self.job.requeue()
            _say(
                f"requeued: Slurm starts job {self.job.number} again, after 2 minutes at the earliest"
                if refusal is None
                else f"Slurm did not requeue this job ({refusal}): the same sbatch command goes on from the last "
                "checkpoint; continue_by: resubmit in the site file avoids this"
            )
        return EXIT_STOPPED

    def drop_successor(self) -> None:
        """Nothing is left to do for it, or an error would come again."""
        if self.successor:
            self.job.cancel(self.successor)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child that does not outlive this block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _heard(canary: subprocess.Popen[bytes] | None) -> bool:
    """Whether the canary has heard a TERM: it may take a moment until its end is told."""
    if canary is None:
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        return canary.wait(_CANARY_SECONDS) == 0
    return False


@contextlib.contextmanager
def _step(command: list[str]) -> Iterator[subprocess.Popen[bytes] | None]:
    """A step beside the work; None where srun is not in reach."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        yield None
        return
    with _ended(process):
        yield process


@contextlib.contextmanager
def _ray_nodes(job: SlurmJob, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray cluster over all nodes in a step of its own; what its driver must know lies in the folder `place`."""
    place.mkdir(mode=0o700)
    try:
        command = [*srun(job, 1), sys.executable, "-m", RAY_NODES, str(place)]
        names = job.node_names() or [f"node {number}" for number in range(job.nodes)]
        (place / "nodes").write_text("\n".join(names))
        with _ended(subprocess.Popen(command, stdin=subprocess.DEVNULL)) as step:
            yield step
            (place / RAY_END).touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(_END_SECONDS)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _say(text: str) -> None:
    print(f"vaedist: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
