"""One rank: the loop in this process, and the process that the local launcher starts for it.

The launcher (`vaedist.launchers.local`) writes the rank's configuration (JSON) to its standard input. The rank answers
through a pipe, one JSON object per line: a stage that it has reached, a stall of its main thread, and last its outcome
or its error. An empty line each second is its heartbeat.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.distributed.liveness.silence import heartbeat
from vaedist.launchers.allocation import allocation
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.startup_timings import process_start_time
from vaedist.runs.stop_request import write_stop_file

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1


def fit_rank(
    job: Job,
    run_folder: Path,
    device: str | torch.device,
    options: FitOptions,
    reached: Callable[[str], None] = lambda _: None,
    stuck: Callable[[str], None] | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Outcome:
    """Train in this process, as the rank that the environment names; alone where it names none.

    Args:
        options: Where they name no `threads`, the ranks of a node share its CPUs.
        reached: Called with each stage (see `vaedist.launchers.recovery`).
        stuck: Called with a sentence, from another thread, before this process is ended because it stalled.
        report: Called with the numbers of each line of the log.
    """
    from vaedist.distributed.liveness.stalls import print_to_stderr
    from vaedist.distributed.process_group import Group
    from vaedist.training.loop import fit

    reached("imported")
    options = options.with_startup(("rendezvous", time.time()))
    group = Group.join(device)
    reached("joined")
    try:
        threads = options.threads or max(1, allocation().cpus // group.local_world)
        return fit(
            job,
            run_folder,
            group=group,
            report=report,
            options=replace(options, threads=threads),
            reached=reached,
            stuck=stuck or print_to_stderr,
        )
    finally:
        group.close()


@contextlib.contextmanager
def signals_as_stop_request(run_folder: Path, attempt: str) -> Iterator[None]:
    """Until the loop handles signals itself, let them write the stop file, which the loop reads when it starts."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, lambda *_: write_stop_file(run_folder, attempt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _AnswerPipe:
    """The rank's end of its pipe to the launcher; its methods may be called from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._writing = threading.Lock()

    def reached(self, stage: str) -> None:
        self.send({"reached": stage, "cpu": time.process_time()})

    def stuck(self, sentence: str) -> None:
        self.send({"stuck": sentence})

    def send(self, message: dict[str, Any] | None = None) -> None:
        """Write a message; None: a heartbeat."""
        line = (json.dumps(message).encode() if message else b"") + b"\n"
        with self._writing:  # a long answer is more than one write to a pipe
            while line:
                line = line[os.write(self._descriptor, line) :]


def main() -> int:
    """The process that the local launcher starts."""
    config = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # die when the launcher does
    if os.getppid() != config["launcher"]:
        return 1  # the launcher died before that was set
    os.set_inheritable(config["answers"], False)
    pipe = _AnswerPipe(config["answers"])
    pipe.reached("started")
    folder, options = Path(config["run_folder"]), FitOptions(**config["options"])
    options = options.with_startup(("imports", process_start_time()))
    with signals_as_stop_request(folder, options.attempt), heartbeat(pipe.send):
        try:
            job = Job.model_validate(config["job"])
            outcome = fit_rank(job, folder, config["device"], options, pipe.reached, pipe.stuck)
            answer: dict[str, Any] = {"outcome": asdict(outcome)}
        except UserError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except Exception:  # noqa: BLE001 - whatever it is, the launcher prints it
            answer = {"traceback": traceback.format_exc()}
    pipe.send(answer)
    os.close(config["answers"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
