"""What has become of a launch: from Slurm's queue where it still knows a job, else from what the job left behind.

`sacct` needs an accounting database, which many clusters do not have and which this never asks. `squeue` knows jobs
until they end and `scontrol` for a while after (MinJobAge, 5 minutes by default); a job that both have forgotten is
told by its run folder (`finished.json`, the last line of `metrics.jsonl`) and by the end of its log. Slurm not
answering is told too, and is no reason to show nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from vaedist.slurm.batch_job import slurm_output
from vaedist.slurm.launch_record import Entry
from vaedist.slurm.requeue import SUCCESSOR_COMMENT

ENDED = frozenset(
    """
    BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT
    ENDED FINISHED STOPPED
    """.split()
)
"""States from which nothing more comes: Slurm's, and our own where Slurm knows nothing."""

_ASK_SECONDS = 15.0
_FOLLOW_SECONDS = 1.0
_LOOK_SECONDS = 15.0
_TAIL_BYTES = 65536
_COLUMNS = ("LINK", "RUN", "JOB", "STATE", "STEP", "RESTARTS", "NOTE")


@dataclass(frozen=True)
class Seen:
    """What Slurm says of one job or task.

    Attributes:
        job: Its number; a successor's is another than the one that was handed in.
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
class Row:
    """One line of the view."""

    entry: Entry
    seen: Seen
    step: str
    note: str

    @property
    def ended(self) -> bool:
        """Whether it will do nothing more."""
        return self.seen.state in ENDED


class Queue:
    """Slurm's answers about the jobs of one launch; asked once."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.silent = False
        self._known: dict[str, Seen] = {}
        self._successors: dict[tuple[str, str], list[Seen]] = {}
        slurm = [entry for entry in entries if entry.executor == "slurm"]
        if not slurm:
            return
        marks = {entry.mark for entry in slurm}
        ours = {entry.array for entry in slurm}
        listed = slurm_output(
            "squeue",
            "--noheader",
            "--array",
            f"--user={os.geteuid()}",
            "--format=%i|%T|%S|%N|%j|%r|%k",
            seconds=_ASK_SECONDS,
        )
        self.silent = listed is None
        for line in (listed or "").splitlines():
            parts = line.split("|")
            if len(parts) < 7:
                continue
            job, state, begins, node, name, reason, mark = *parts[:6], "|".join(parts[6:])
            seen = Seen(job, state, reason, node=node, begins=begins)
            if job.partition("_")[0] in ours:
                self._known[job] = seen
            elif mark.partition(SUCCESSOR_COMMENT)[0] in marks:
                self._successors.setdefault((name, job.partition("_")[2]), []).append(seen)
        # A client of Slurm that finds no controller tries for a minute or more: it is not asked again and again.
        for number in () if self.silent else sorted(ours):
            for seen in _shown(
                slurm_output("scontrol", "show", "job", "--oneliner", number, seconds=_ASK_SECONDS) or ""
            ):
                self._known[seen.job] = seen

    @property
    def successors(self) -> list[str]:
        """Jobs that were handed in to go on where one of these stops."""
        return [seen.job for several in self._successors.values() for seen in several]

    def of(self, entry: Entry) -> Seen | None:
        """What Slurm says of the job that does an entry's work now: itself, or its successor."""
        own = self._known.get(entry.job)
        if own is not None and own.state not in ENDED:
            return own
        name = f"{Path(entry.log).parent.name}.{entry.link}"
        several = self._successors.get((name, entry.job.partition("_")[2]), [])
        # One that runs has handed in its own successor already.
        return min(several, key=lambda seen: seen.state == "PENDING", default=own)


def _shown(text: str) -> Iterator[Seen]:
    """Jobs in what `scontrol show job --oneliner` prints; of an array that waits, one line is several tasks."""
    for line in text.splitlines():
        found = dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))
        if "JobState" not in found:
            continue
        if "ArrayTaskId" in found:
            numbers = [f"{found['ArrayJobId']}_{task}" for task in _tasks(found["ArrayTaskId"])]
        else:
            numbers = [found.get("JobId", "")]
        code = found.get("ExitCode", "").partition(":")[0]
        for number in numbers:
            yield Seen(
                number,
                found["JobState"],
                found.get("Reason", "None"),
                int(code) if code.isdecimal() else None,
                int(found.get("Restarts", "0")),
                found.get("NodeList", ""),
                found.get("StartTime", ""),
            )


def _tasks(text: str) -> Iterator[int]:
    """`0,3-5%2`: 0, 3, 4, 5."""
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            yield from range(int(first), int(last if last.isdecimal() else first) + 1)


# The view ---------------------------------------------------------------------------------------------------


def rows(entries: Sequence[Entry]) -> tuple[list[Row], bool]:
    """A row for each entry, and whether Slurm did not answer."""
    queue = Queue(entries)
    return _rows(entries, queue), queue.silent


def _rows(entries: Sequence[Entry], queue: Queue) -> list[Row]:
    found: list[Row] = []
    for entry in entries:
        seen = queue.of(entry) or _left_behind(entry)
        found.append(Row(entry, seen, _step(entry), ""))
    fates = {(row.entry.array, row.entry.job.partition("_")[2]): row for row in found}
    return [Row(row.entry, row.seen, row.step, _note(row, fates)) for row in found]


def _left_behind(entry: Entry) -> Seen:
    """What a job that Slurm has forgotten, or never knew, says of itself."""
    if entry.executor == "local":
        with contextlib.suppress(OSError, ValueError):
            code = int(Path(f"{entry.log}.code").read_text())
            return Seen(
                entry.job,
                {EXIT_FINISHED: "COMPLETED", EXIT_STOPPED: "STOPPED"}.get(code, "FAILED"),
                code=code,
            )
        if _alive(entry):
            return Seen(entry.job, "RUNNING")
    finished = entry.run is not None and entry.link in ("train", "prior")
    if finished and (Path(str(entry.run)) / "finished.json").is_file():
        return Seen(entry.job, "FINISHED")
    return Seen(entry.job, "ENDED")


def _alive(entry: Entry) -> bool:
    """Whether submitit's process for it is there: its number alone could be another program's by now."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{entry.job}/cmdline").read_bytes().split(b"\0")
        return str(Path(entry.log).parent / "submitit").encode() in command
    return False


def _step(entry: Entry) -> str:
    """How far training is, such as `1200/5000`; of a task that trains nothing, `-`."""
    if entry.run is None or entry.link not in ("train", "prior"):
        return "-"
    last = None
    for line in reversed(_tail(Path(entry.run) / "metrics.jsonl")):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            last = int(json.loads(line)["step"])
            break
    total = None
    with contextlib.suppress(OSError):
        match = re.search(
            r"^  steps: (\d+)$", (Path(entry.run) / "job.yaml").read_text(encoding="utf-8"), re.MULTILINE
        )
        total = match and match[1]
    return "-" if last is None else f"{last}/{total}" if total else str(last)


def _note(row: Row, fates: Mapping[tuple[str, str], Row]) -> str:
    seen, entry = row.seen, row.entry
    needed = _needed(entry, fates)
    if seen.state == "PENDING":
        if seen.reason == "Dependency" and needed:
            return f"waits for {needed.entry.link} ({entry.after})"
        if seen.reason == "BeginTime":
            return f"Slurm holds it for two minutes after a requeue: until {seen.begins.partition('T')[2]}"
        return (
            "waits in the queue"
            if seen.reason in ("None", "Resources", "Priority")
            else f"waits: {seen.reason}"
        )
    if seen.state == "CANCELLED" and (seen.reason.startswith("Dependency") or _never_ran(entry, needed)):
        why = (
            f"{needed.entry.link} ({needed.seen.job}) did not finish"
            if needed
            else "what it waited for failed"
        )
        return f"cancelled, because {why}"
    if seen.state in ("RUNNING", "COMPLETING"):
        return f"on {seen.node}" if seen.node not in ("", "(null)") else ""
    if seen.state in ("COMPLETED", "FINISHED"):
        return ""
    if seen.state == "ENDED" and _never_ran(entry, needed):
        return f"never ran, because {needed.entry.link} ({needed.seen.job}) did not finish" if needed else ""
    said = last_line(Path(entry.log))
    code = f"exit code {seen.code}" if seen.code else ""
    reason = seen.reason if seen.reason not in ("None", "NonZeroExitCode") else ""
    return ": ".join(part for part in (reason or code, said) if part)


def _needed(entry: Entry, fates: Mapping[tuple[str, str], Row]) -> Row | None:
    """The row that an entry waits or waited for: its own task's where both are arrays, else the first that failed."""
    if entry.after is None:
        return None
    same = fates.get((entry.after, entry.job.partition("_")[2]))
    if same is not None:
        return same
    several = [row for (array, _), row in fates.items() if array == entry.after]
    failed = [row for row in several if row.seen.state not in ("COMPLETED", "FINISHED")]
    return next(iter(failed or several), None)


def _never_ran(entry: Entry, needed: Row | None) -> bool:
    bad = needed is not None and needed.ended and needed.seen.state not in ("COMPLETED", "FINISHED")
    return bad and not Path(entry.log).exists()


def table(found: Sequence[Row]) -> str:
    """The view as text."""
    lines = [
        (
            row.entry.link,
            row.entry.label,
            row.seen.job,
            row.seen.state,
            row.step,
            str(row.seen.restarts),
            row.note,
        )
        for row in found
    ]
    widths = [max(len(line[column]) for line in (_COLUMNS, *lines)) for column in range(len(_COLUMNS) - 1)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        ).rstrip()
        for line in (_COLUMNS, *lines)
    )


def cancel(entries: Sequence[Entry], told: Callable[[str], None]) -> int:
    """End every job of a launch that has not ended, successors too; the exit code.

    Raises:
        UserError: scancel refused, in its own words.
    """
    queue = Queue(entries)
    found = _rows(entries, queue)
    if queue.silent:
        raise UserError("Slurm does not answer (squeue failed): try again, or use scancel yourself")
    living = [row for row in found if not row.ended]
    # A successor first: it would begin with the end of the job that it waits for.
    numbers = queue.successors + [row.seen.job for row in living if row.entry.executor == "slurm"]
    numbers = list(dict.fromkeys(numbers))
    if numbers:
        done = subprocess.run(["scancel", *numbers], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"scancel refused: {done.stderr.strip()}")
    for row in living:
        if row.entry.executor == "local":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(row.entry.job), 15)
    numbers += [row.seen.job for row in living if row.entry.executor == "local"]
    told(f"cancelled: {', '.join(numbers)}" if numbers else "nothing to cancel: all have ended")
    return 0


# Logs -------------------------------------------------------------------------------------------------------


def _tail(path: Path) -> list[str]:
    """The last lines of a file; none where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def last_line(log: Path) -> str:
    """What a log says at its end: the last error of ours, else the last line that is not Slurm's own."""
    lines = _tail(log)
    errors = [line for line in lines[-50:] if re.match(r"vaedist-\w+: error: |\w*(Error|Exception)\b", line)]
    plain = [line for line in lines if not re.match(r"slurmstepd|srun:|submitit ", line)]
    said = (errors or plain or lines or [""])[-1].strip()
    return said if len(said) <= 200 else said[:197] + "..."


def logs(entries: Sequence[Entry], lines: int, *, follow: bool, write: Callable[[str], None]) -> int:
    """Print the ends of the logs; with `follow`, go on until their jobs have ended."""
    places = {Path(entry.log): 0 for entry in entries}
    several = len(places) > 1
    for path in places:
        if several:
            write(f"==> {path} <==\n")
        try:
            content = path.read_bytes()
        except OSError:
            write(f"(nothing yet in {path})\n")
            continue
        places[path] = len(content)
        tail = content.splitlines(keepends=True)[-lines:] if lines else []
        write(b"".join(tail).decode("utf-8", errors="replace"))
    looked = time.monotonic()
    while follow:
        news = False
        for path, begun in places.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(begun)
                content = file.read()
                if content:
                    news = True
                    if several:
                        write(f"==> {path} <==\n")
                    write(content.decode("utf-8", errors="replace"))
                    places[path] = begun + len(content)
        if not news and time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            if all(row.ended for row in rows(entries)[0]):
                return 0
        time.sleep(_FOLLOW_SECONDS)
    return 0
