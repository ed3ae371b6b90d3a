"""What a launcher and the loop tell each other. It loads without torch, because a launcher needs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class FitOptions:
    """What the launcher says of this attempt; none of it changes the numbers.

    Attributes:
        override: Allow changes of `override` settings on resume.
        token: Token of the run's lock where the launcher holds it; None: rank 0 takes the lock itself.
        attempt: Name of this attempt; a stop file that holds it (or `any`) stops the run. Who started the launcher may
            name it ($VAEDIST_ATTEMPT), else the launcher does.
        quiet: No console output.
        engine: For the start-up summary.
        threads: CPU threads per process where the job does not say; None: this process's CPUs / processes on the node.
        command: The command line, for the record; empty: this process's own.
        hang_seconds: After how long a stalled rank is ended (`vaedist.distributed.liveness.stalls`); 0: never.
        verbose: On the console also the libraries, and each checkpoint.
        phases: Of this start so far (`vaedist.runs.startup_timings`); None: it replaces a group that was lost.
    """

    override: bool = False
    token: str | None = None
    attempt: str = ""
    quiet: bool = False
    engine: str = "local"
    threads: int | None = None
    command: tuple[str, ...] = ()
    hang_seconds: float = 0.0
    phases: tuple[tuple[str, float], ...] | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: after which step, and the last validation's numbers."""

    status: Literal["finished", "stopped", "already finished"]
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
