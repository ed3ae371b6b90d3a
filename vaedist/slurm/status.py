"""What has become of a launch: from Slurm's queue while Slurm knows a job, else from what the job left behind.

`sacct` needs an accounting database, which many clusters do not have, so it is never asked. `squeue` knows jobs until
they end and `scontrol` for a while after (MinJobAge, 5 minutes by default). The state of a job that both have forgotten
comes from its run folder (`finished.json`, the last line of `metrics.jsonl`) and from the end of its log. Where Slurm
does not answer, the view says so and shows the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from vaedist.slurm.batch_job import slurm_output
from vaedist.slurm.launch_record import LaunchedTask
from vaedist.slurm.logs import last_line, last_lines
from vaedist.slurm.requeue import SUCCESSOR_COMMENT

ENDED = frozenset(
    """
    BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT
    ENDED FINISHED STOPPED
    """.split()
)
"""States from which nothing more comes: Slurm's, and our own where Slurm knows nothing."""

_SUCCEEDED = ("COMPLETED", "FINISHED")
_ANSWER_SECONDS = 15.0
_COLUMNS = ("LINK", "RUN", "JOB", "STATE", "STEP", "RESTARTS", "NOTE")


@dataclass(frozen=True)
class JobState:
    """What is known of one job, or of one task of an array.

    Attributes:
        job: Its number; a successor's differs from that of the job that was submitted.
        state, reason: In Slurm's words.
        code: Exit code, or None.
        restarts: How often it has been put back into the queue.
        node: Where it runs or ran.
        begins: When it may start, as Slurm prints times.
    """

    job: str
    state: str
    reason: str = "None"
    code: int | None = None
    restarts: int = 0
    node: str = ""
    begins: str = ""


@dataclass(frozen=True)
class TaskStatus:
    """One row of the view.

    Attributes:
        step: How far training is, such as `1200/5000`; of a task that trains nothing, `-`.
        note: What it waits for, where it runs, or why it ended.
    """

    task: LaunchedTask
    job: JobState
    step: str
    note: str = ""

    @property
    def ended(self) -> bool:
        """Whether it will do nothing more."""
        return self.job.state in ENDED

    @property
    def index(self) -> str:
        """Its place in a job array; empty outside one."""
        return self.task.job.partition("_")[2]


class SlurmQueue:
    """Slurm's answers about the jobs of one launch, asked for once.

    Attributes:
        silent: Whether Slurm did not answer.
    """

    def __init__(self, tasks: Sequence[LaunchedTask]) -> None:
        self.silent = False
        self._known: dict[str, JobState] = {}
        self._successors: dict[tuple[str, str], list[JobState]] = {}
        submitted = [task for task in tasks if task.executor == "slurm"]
        if not submitted:
            return
        comments = {task.mark for task in submitted}
        arrays = {task.array for task in submitted}
        columns = "--format=%i|%T|%S|%N|%j|%r|%k"
        user = f"--user={os.geteuid()}"
        listed = slurm_output("squeue", "--noheader", "--array", user, columns, seconds=_ANSWER_SECONDS)
        self.silent = listed is None
        for line in (listed or "").splitlines():
            parts = line.split("|", 6)
            if len(parts) < 7:
                continue
            number, state, begins, node, name, reason, comment = parts
            job = JobState(number, state, reason, node=node, begins=begins)
            if number.partition("_")[0] in arrays:
                self._known[number] = job
            elif comment.partition(SUCCESSOR_COMMENT)[0] in comments:
                self._successors.setdefault((name, number.partition("_")[2]), []).append(job)
        # A client of Slurm that finds no controller tries for a minute or more, so it is not asked again.
        for array in () if self.silent else sorted(arrays):
            command = ("scontrol", "show", "job", "--oneliner", array)
            for job in parse_scontrol(slurm_output(*command, seconds=_ANSWER_SECONDS) or ""):
                self._known[job.job] = job

    @property
    def successors(self) -> list[str]:
        """Jobs that were submitted to go on where one of these stops."""
        return [job.job for jobs in self._successors.values() for job in jobs]

    def current_job(self, task: LaunchedTask) -> JobState | None:
        """The job that does a task's work now, itself or its successor; None: Slurm knows neither."""
        own = self._known.get(task.job)
        if own is not None and own.state not in ENDED:
            return own
        name = f"{Path(task.log).parent.name}.{task.link}"
        successors = self._successors.get((name, task.job.partition("_")[2]), [])
        # One that runs has submitted its own successor already.
        return min(successors, key=lambda job: job.state == "PENDING", default=own)


def parse_scontrol(text: str) -> Iterator[JobState]:
    """Jobs in what `scontrol show job --oneliner` prints; of an array that waits, one line is several tasks."""
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))
        if "JobState" not in fields:
            continue
        numbers = [fields.get("JobId", "")]
        if "ArrayTaskId" in fields:
            numbers = [f"{fields['ArrayJobId']}_{index}" for index in _indices(fields["ArrayTaskId"])]
        code = fields.get("ExitCode", "").partition(":")[0]
        for number in numbers:
            yield JobState(
                number,
                fields["JobState"],
                fields.get("Reason", "None"),
                int(code) if code.isdecimal() else None,
                int(fields.get("Restarts", "0")),
                fields.get("NodeList", ""),
                fields.get("StartTime", ""),
            )


def _indices(text: str) -> Iterator[int]:
    """`0,3-5%2`: 0, 3, 4, 5."""
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            yield from range(int(first), int(last if last.isdecimal() else first) + 1)


# The view ---------------------------------------------------------------------------------------------------


def launch_status(tasks: Sequence[LaunchedTask], queue: SlurmQueue) -> list[TaskStatus]:
    """The status of each task."""
    rows = [
        TaskStatus(task, queue.current_job(task) or _job_left_behind(task), _step(task)) for task in tasks
    ]
    by_job = {(row.task.array, row.index): row for row in rows}
    return [replace(row, note=_note(row, by_job)) for row in rows]


def has_ended(tasks: Sequence[LaunchedTask]) -> bool:
    """Whether none of these will do anything more."""
    return all(row.ended for row in launch_status(tasks, SlurmQueue(tasks)))


def _job_left_behind(task: LaunchedTask) -> JobState:
    """The state of a job that Slurm has forgotten, or never knew, from its files."""
    if task.executor == "local":
        with contextlib.suppress(OSError, ValueError):
            code = int(Path(f"{task.log}.code").read_text())
            state = {EXIT_FINISHED: "COMPLETED", EXIT_STOPPED: "STOPPED"}.get(code, "FAILED")
            return JobState(task.job, state, code=code)
        if _is_running(task):
            return JobState(task.job, "RUNNING")
    finished = _trains(task) and (Path(str(task.run)) / "finished.json").is_file()
    return JobState(task.job, "FINISHED" if finished else "ENDED")


def _trains(task: LaunchedTask) -> bool:
    return task.run is not None and task.link in ("train", "prior")


def _is_running(task: LaunchedTask) -> bool:
    """Whether submitit's process for it lives; its number alone could be another program's by now."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{task.job}/cmdline").read_bytes().split(b"\0")
        return str(Path(task.log).parent / "submitit").encode() in command
    return False


def _step(task: LaunchedTask) -> str:
    if not _trains(task):
        return "-"
    run = Path(str(task.run))
    last = None
    for line in reversed(last_lines(run / "metrics.jsonl")):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            last = int(json.loads(line)["step"])
            break
    total = None
    with contextlib.suppress(OSError):
        job = (run / "job.yaml").read_text(encoding="utf-8")
        total = re.search(r"^  steps: (\d+)$", job, re.MULTILINE)
    return "-" if last is None else f"{last}/{total[1]}" if total else str(last)


def _note(row: TaskStatus, by_job: Mapping[tuple[str, str], TaskStatus]) -> str:
    job, task = row.job, row.task
    needed = _needed(row, by_job)
    failed = f"{needed.task.link} ({needed.job.job}) did not finish" if needed else ""
    if job.state == "PENDING":
        if job.reason == "Dependency" and needed:
            return f"waits for {needed.task.link} ({task.after})"
        if job.reason == "BeginTime":
            return f"Slurm holds it for two minutes after a requeue: until {job.begins.partition('T')[2]}"
        in_queue = job.reason in ("None", "Resources", "Priority")
        return "waits in the queue" if in_queue else f"waits: {job.reason}"
    did_fail = needed is not None and needed.ended and needed.job.state not in _SUCCEEDED
    never_ran = did_fail and not Path(task.log).exists()
    if job.state == "CANCELLED" and (job.reason.startswith("Dependency") or never_ran):
        return f"cancelled, because {failed or 'what it waited for failed'}"
    if job.state in ("RUNNING", "COMPLETING"):
        return f"on {job.node}" if job.node not in ("", "(null)") else ""
    if job.state in _SUCCEEDED:
        return ""
    if job.state == "ENDED" and never_ran:
        return f"never ran, because {failed}"
    code = f"exit code {job.code}" if job.code else ""
    reason = job.reason if job.reason not in ("None", "NonZeroExitCode") else ""
    return ": ".join(part for part in (reason or code, last_line(Path(task.log))) if part)


def _needed(row: TaskStatus, by_job: Mapping[tuple[str, str], TaskStatus]) -> TaskStatus | None:
    """What a task waits or waited for: the task of its number where both are arrays, else the first that failed."""
    after = row.task.after
    if after is None:
        return None
    if (same_index := by_job.get((after, row.index))) is not None:
        return same_index
    before = [other for (array, _), other in by_job.items() if array == after]
    failed = [other for other in before if other.job.state not in _SUCCEEDED]
    return next(iter(failed or before), None)


def status_table(rows: Sequence[TaskStatus]) -> str:
    """The view as text."""
    lines = [
        (row.task.link, row.task.label, row.job.job, row.job.state, row.step, str(row.job.restarts), row.note)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *lines, strict=True)][:-1]
    return "\n".join(
        "  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in (_COLUMNS, *lines)
    )


def cancel_launch(tasks: Sequence[LaunchedTask], echo: Callable[[str], None]) -> None:
    """End every job of a launch that has not ended, successors too.

    Raises:
        UserError: Slurm does not answer, or scancel refused.
    """
    queue = SlurmQueue(tasks)
    living = [row for row in launch_status(tasks, queue) if not row.ended]
    if queue.silent:
        raise UserError("Slurm does not answer (squeue failed): try again, or use scancel yourself")
    local = [row.job.job for row in living if row.task.executor == "local"]
    # A successor first: it would begin with the end of the job that it waits for.
    numbers = queue.successors + [row.job.job for row in living if row.task.executor == "slurm"]
    numbers = list(dict.fromkeys(numbers))
    if numbers:
        done = subprocess.run(["scancel", *numbers], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"scancel refused: {done.stderr.strip()}")
    for number in local:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), 15)
    ended = ", ".join(numbers + local)
    echo(f"cancelled: {ended}" if ended else "nothing to cancel: all have ended")
