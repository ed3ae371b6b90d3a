"""What a launcher gives to the training loop, and what it gets back. It loads no torch: a launcher needs none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vaedist.runs.startup_timings import StartupTimings


@dataclass(frozen=True)
class FitOptions:
    """Options of one attempt, from the launcher; none of them changes the numbers.

    Attributes:
        override: Allow changes of `override` settings on resume.
        token: Token of the run's lock where the launcher holds it; None: rank 0 takes the lock itself.
        attempt: Name of this attempt; a stop file that holds it (or `any`) stops the run. It comes from
            $VAEDIST_ATTEMPT, else from the launcher.
        quiet: No console output.
        engine: For the start-up summary.
        threads: CPU threads per process where the job does not say; None: this process's CPUs / processes on the node.
        command: The command line, for the record; empty: this process's own.
        hang_seconds: After how long a stalled rank is killed (`vaedist.distributed.liveness.stalls`); 0: never.
        verbose: On the console also the libraries, and each checkpoint.
        startup: The stages of this start so far (`vaedist.runs.startup_timings`); None: this attempt replaces a group
            that was lost.
    """

    override: bool = False
    token: str | None = None
    attempt: str = ""
    quiet: bool = False
    engine: str = "local"
    threads: int | None = None
    command: tuple[str, ...] = ()
    hang_seconds: float = 0.0
    startup: StartupTimings | None = None
    verbose: bool = False

    def with_startup(self, *stages: tuple[str, float]) -> FitOptions:
        """The same with further stages of this start, where it is timed."""
        return self if self.startup is None else replace(self, startup=(*self.startup, *stages))


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: after which step, and the last validation's numbers."""

    status: Literal["finished", "stopped", "already finished"]
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
