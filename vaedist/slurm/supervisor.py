"""The supervisor of a batch job: what every batch script ends in, whoever wrote it.

    exec python -m vaedist.slurm.supervisor train jobs/vqvae_oasis.yaml train.steps=20000

It starts the ranks on all nodes of the allocation (under `srun`, or under Ray), receives Slurm's signals, asks the
run to save and stop (through a stop file that names this attempt), and has the job continue later
(`vaedist.slurm.requeue`).
`exec` matters: Slurm sends the warning of `--signal=B:USR1@180` to the batch shell, which is then this process.

Who receives which signal (Slurm 22.05):

| event | batch shell | steps |
|---|---|---|
| time limit, `B:USR1@180` | USR1, 2 to 3 minutes before the end | |
| preemption, grace time, `preempt_send_user_signal` | USR1 at once | |
| preemption, grace time, without it | nothing until the end | TERM at once |
| preemption without grace, `scancel`, `scontrol requeue`, a node that is taken down | TERM | TERM |

USR1 therefore means: save, and continue later. The TERM of a grace time reaches steps only. So a step of its own, the
TERM listener, does nothing but wait for one, and ends when it comes. It serves ranks that run outside any step. It also
tells this process why ranks stopped: without a TERM, a person may have written the stop file.

After a TERM, Slurm is asked for the job's state. RUNNING means preemption, and the job continues later. In any other
state Slurm has ended the job or queued it again itself, and nothing is done.
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vaedist.config.site import Site, load_site
from vaedist.core import errors
from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, cli_command
from vaedist.runs import stop_request
from vaedist.runs.run_folder import RunFolder
from vaedist.runs.startup_timings import process_start_time, timings_to_environment
from vaedist.slurm.batch_job import SlurmJob, log
from vaedist.slurm.cleanup import clean_this_node
from vaedist.slurm.process_layout import RAY_END_FILE, RAY_NODES_MODULE, ProcessLayout, plan_processes
from vaedist.slurm.requeue import RequeuePolicy
from vaedist.slurm.srun_command import srun_command

VERBS = ("shard", "train", "tune", "evaluate", "sample")
_MAX_RANK_LOSSES = 3
"""How often lost ranks are started again in the same allocation, as under the other engines."""

_FINAL_ERRORS = (errors.UserError, errors.DataError, errors.Diverged, errors.CannotWrite)
_FINAL_CODES = {EXIT_FINISHED, *(kind.exit_code for kind in _FINAL_ERRORS)}
"""Exit codes after which continuing would change nothing: finished, or an error that would come again."""

_END_SECONDS = 20.0
"""How long a process that we end may take to leave."""

_FOREIGN_ENV = """
    RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER VAEDIST_RAY_CLUSTER
    """.split()
"""Variables of another Ray cluster: sbatch passes the submitter's environment on to the job."""

_LISTENER_SECONDS = 10.0
_TERM_LISTENER = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); signal.sigwait([15])"
"""Exits with 0 on TERM alone. (A shell would sleep in a child; which of the two dies first decides its exit code.)"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vaedist.slurm.supervisor",
        description="Run a command of vaedist inside a Slurm job: on all its nodes, with its signals, and again later "
        "if it could not finish. Outside a job the command simply runs.",
    )
    engine = "what starts the ranks (default: the site's; else local on one node, srun on several)"
    parser.add_argument("--engine", choices=("local", "ray", "srun"), help=engine)
    parser.add_argument("--ranks-per-node", metavar="N", type=int, help="default: GPUs of the job on a node")
    continue_by = "default: the site's, else requeue"
    parser.add_argument("--continue-by", choices=("requeue", "resubmit", "none"), help=continue_by)
    parser.add_argument("--max-restarts", metavar="N", type=int, help="default: the site's, else 20")
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as vaedist-VERB takes them")
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    site_file = os.environ.get("VAEDIST_SITE")
    site = load_site(site_file) if site_file else Site()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    job = SlurmJob.current()
    command = [sys.executable, "-m", f"vaedist.{options.verb}", *options.arguments]
    if job is None:
        sys.stdout.flush()
        os.execv(sys.executable, command)  # noqa: S606 - the same Python, no shell meant
    with _Signals() as signals:
        _prepare_environment(job, site)
        clean_this_node()
        layout = plan_processes(job, site, options, command)
        cap = site.max_restarts if options.max_restarts is None else options.max_restarts
        policy = RequeuePolicy(job, options.continue_by or site.continue_by, cap)
        return _Supervisor(job, options.verb, layout, policy, signals).run()


def _prepare_environment(job: SlurmJob, site: Site) -> None:
    """Set the environment of everything that is started from here."""
    for name in _FOREIGN_ENV:
        os.environ.pop(name, None)
    os.environ["VAEDIST_JOB"] = job.marker
    if local := site.node_local:
        os.environ.setdefault("VAEDIST_NODE_LOCAL", local)  # expanded on each node
    if site.interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, site.interface)
    if idle := job.idle_gpus():
        log(
            f"{job.node} has {idle} GPUs, but this job has none: ask for them with --gpus-per-node=N (or "
            "gpus_per_node in the site file)"
        )


# Supervising ------------------------------------------------------------------------------------------------


class _Signals:
    """The signals that this process has received, and a way to sleep until one comes or a child ends."""

    def __init__(self) -> None:
        self.warned = False
        """USR1: time is nearly up."""
        self.terminated = False
        """TERM or Ctrl-C here, or TERM in a step: Slurm or a person ends the job."""
        self._before: dict[signal.Signals, Any] = {}
        self._read_end, self._write_end = os.pipe()

    def __enter__(self) -> _Signals:
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        for end in (self._read_end, self._write_end):
            os.close(end)

    @property
    def stop_asked(self) -> bool:
        return self.warned or self.terminated

    def wait(self, seconds: float) -> None:
        """Sleep until a signal comes, at most so many seconds."""
        select.select([self._read_end], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_end, 4096)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.warned = True
        elif number in (signal.SIGTERM, signal.SIGINT):
            self.terminated = True


@dataclass
class _Supervisor:
    job: SlurmJob
    verb: str
    layout: ProcessLayout
    policy: RequeuePolicy
    signals: _Signals

    def run(self) -> int:
        """Run the command to its end, again where ranks were lost; the exit code of the job."""
        restarts = self.policy.restarts
        note = f", restart {restarts}" if restarts else ""
        log(f"Slurm job {self.job.number}{note}: {self.verb} {self.layout.summary}")
        self.policy.prepare()
        for losses in range(_MAX_RANK_LOSSES + 1):
            code = self._run_once(losses)
            # A rank under srun that hangs ends itself with this code; under Ray the losses have been counted already.
            hung = code == errors.WorkerLost.exit_code and self.layout.ray_cluster is None
            lost = code < 0 or code >= 128 or hung
            may_restart = self.layout.restartable and losses < _MAX_RANK_LOSSES
            if not lost or self.signals.stop_asked or not may_restart:
                break
            log(
                f"a rank was lost; starting again from the last checkpoint ({losses + 1} of {_MAX_RANK_LOSSES} times)"
            )
        return self.finish(code if code >= 0 else 128 - code)

    def _run_once(self, losses: int) -> int:
        """Start everything and wait for its end; the exit code, negative where a signal killed it."""
        environment = os.environ | {"VAEDIST_ATTEMPT": self.layout.attempt}
        if losses == 0:
            stage = "srun" if self.layout.command[0] == "srun" else "start"
            environment |= timings_to_environment(
                (("supervisor", process_start_time()), (stage, time.time()))
            )
        with contextlib.ExitStack() as exits:
            cluster = ray_nodes = None
            if self.layout.ray_cluster is not None:
                if self.layout.run_folder is not None:
                    RunFolder.make(self.layout.run_folder)  # 0700, before anything is in it
                cluster = self.layout.ray_cluster
                cluster = cluster.with_name(f"{cluster.name}-{losses}").absolute()
                ray_nodes = exits.enter_context(_ray_nodes(self.job, cluster))
                environment["VAEDIST_RAY_CLUSTER"] = str(cluster)
            listener = exits.enter_context(_term_listener(self.job))
            child = exits.enter_context(
                _ended_on_exit(subprocess.Popen(self.layout.command, env=environment))
            )
            asked = False
            nodes_gone_since: float | None = None
            while child.poll() is None:
                self.signals.wait(5.0)
                if listener is not None and listener.poll() == 0:
                    self.signals.terminated = True  # Slurm ends the steps
                if cluster is not None and ray_nodes is not None and ray_nodes.poll() is not None:
                    # Ray's nodes are gone: the driver gets a moment to say so, and must not wait for ever.
                    if nodes_gone_since is None:
                        nodes_gone_since = time.monotonic()
                        self.signals.terminated |= _received_term(listener)
                    if not (cluster / "head").exists() and not self.signals.stop_asked:
                        child.kill()
                        child.wait()
                        return 1  # Ray never started, and has said why
                    if time.monotonic() - nodes_gone_since > _END_SECONDS:
                        child.kill()
                if self.signals.stop_asked and not asked:
                    asked = True
                    self._ask_to_stop(child)
            if child.returncode == EXIT_STOPPED and not self.signals.stop_asked:
                # Either a TERM came that the listener has not shown yet, or a person wrote the stop file.
                self.signals.terminated |= _received_term(listener)
            return child.returncode

    def _ask_to_stop(self, child: subprocess.Popen[bytes]) -> None:
        """Ask the command to save and leave."""
        log("asked to stop: saving a checkpoint" if self.layout.run_folder else "asked to stop")
        if self.layout.run_folder is not None:
            RunFolder.make(self.layout.run_folder)
            stop_request.write_stop_file(self.layout.run_folder, self.layout.attempt)
        else:
            child.terminate()

    def finish(self, code: int) -> int:
        """Have the job continue later where that is wanted, and say how it ended; the exit code of the job."""
        if not self.signals.stop_asked or code in _FINAL_CODES:
            if code == EXIT_STOPPED:
                log("stopped by a stop file, not by Slurm: the same sbatch command continues")
            self.policy.cancel_successor()
            return code
        if not self.signals.warned and (state := self.job.state()) != "RUNNING":
            # Ended by its user, or queued again by Slurm: not ours to change.
            log(f"left to Slurm, which calls this job {state or '(no answer)'}")
            if state in ("CANCELLED", "COMPLETING") and not self.job.preempted():
                self.policy.cancel_successor()
            return code
        self.policy.continue_later()
        return EXIT_STOPPED


# Child processes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ended_on_exit(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
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


@contextlib.contextmanager
def _term_listener(job: SlurmJob) -> Iterator[subprocess.Popen[bytes] | None]:
    """A step that exits with 0 when Slurm sends TERM to the steps of this job; None where srun is not in reach."""
    step = [*srun_command(job, 1, nodes=1), "--cpus-per-task=1"]
    command = [*step, sys.executable, "-IS", "-c", _TERM_LISTENER]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        yield None
        return
    with _ended_on_exit(process):
        yield process


def _received_term(listener: subprocess.Popen[bytes] | None) -> bool:
    """Whether the listener got a TERM; its exit may take a moment to show."""
    if listener is None:
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        return listener.wait(_LISTENER_SECONDS) == 0
    return False


@contextlib.contextmanager
def _ray_nodes(job: SlurmJob, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray cluster over all nodes in a step of its own; its driver finds what it must know in `folder`."""
    folder.mkdir(mode=0o700)
    try:
        command = [*srun_command(job, 1), sys.executable, "-m", RAY_NODES_MODULE, str(folder)]
        names = job.node_names() or [f"node {number}" for number in range(job.nodes)]
        (folder / "nodes").write_text("\n".join(names))
        with _ended_on_exit(subprocess.Popen(command, stdin=subprocess.DEVNULL)) as step:
            yield step
            (folder / RAY_END_FILE).touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(_END_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
