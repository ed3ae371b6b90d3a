"""Handing links in, through submitit: to Slurm, or to processes of this machine one after the other.

submitit's own batch text sends `USR2` to every process of a job step, which kills Ray's, and it runs a pickled
function; ours is the filled-in template (`vaedist.slurm.script`) that ends in the supervisor, so there is no pickle
that somebody could exchange. What is kept of submitit is its way to hand in, to keep the script, and its jobs.

Variables that sbatch would take for options (`SBATCH_*`, left by `--print-env` for another site) or that describe
another job (`SLURM_*`, inside an allocation) are not handed on: what is handed in is what `--dry-run` prints.

References: submitit 1.5, `submitit.slurm.slurm.SlurmExecutor`; sbatch(1) of Slurm 22.05, "INPUT ENVIRONMENT VARIABLES".
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from vaedist.config.site import Site
from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from vaedist.core.files import replace_file
from vaedist.slurm import launch_record as record
from vaedist.slurm.chain import Link
from vaedist.slurm.launch_record import Entry
from vaedist.slurm.script import Batch, fill, template

_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"})


@dataclass(frozen=True)
class Launch:
    """Where links go, and how.

    Attributes:
        folder: The launch folder.
        site, site_file: The site, and the file that jobs read it from.
        nodes, ranks_per_node, engine, time, parallel: As in `vaedist.slurm.script.Batch`, for links that train.
        python_folder: Put first in PATH where the site says nothing about Python; None: left alone.
    """

    folder: Path
    site: Site
    site_file: Path
    nodes: int = 1
    ranks_per_node: int | None = None
    engine: str | None = None
    time: str | None = None
    parallel: int | None = None
    python_folder: Path | None = None

    def batch(self, link: Link) -> Batch:
        """What sbatch is asked for, for one link."""
        several = len(link.tasks) > 1
        batch = Batch(
            name=f"{self.folder.name}.{link.name}",
            tasks=tuple(task.arguments for task in link.tasks),
            log=str(self.folder / f"{link.name}-{'%A_%a' if several else '%j'}.log"),
            mark=f"vaedist:{self.folder}",
            time=self.time,
            parallel=self.parallel,
        )
        if link.trains:
            return replace(batch, nodes=self.nodes, ranks_per_node=self.ranks_per_node, engine=self.engine)
        return replace(batch, gpus=None if self.site.gpu_syntax == "none" else 1)

    def script(self, link: Link) -> str:
        """The very text that sbatch gets for one link."""
        if "%" in str(self.folder):
            raise UserError(
                f"sbatch would read the % in {self.folder} as a place to fill in: give another --folder"
            )
        several = "array" if len(link.tasks) > 1 else None
        kind = several or {"train": "train", "prior": "train", "tune": "tune"}.get(link.name, "chain")
        return fill(template(kind), self.batch(link), self.site, self.site_file, self.python_folder)


class Executor(submitit.SlurmExecutor):
    """submitit's executor with a text of our own and a dependency on its command line.

    Args:
        folder: Where submitit keeps the script.
        text: The batch script.
        after: Options of sbatch that name what the job waits for.
    """

    def __init__(self, folder: Path, text: str, after: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._text, self._after = text, tuple(after)

    @classmethod
    def affinity(cls) -> int:
        return -1 if shutil.which("sbatch") is None else 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*sbatch(), *self._after, str(submission_file_path)]

    def _num_tasks(self) -> int:
        return 1  # of submitit's: ours are started by the supervisor

    def _internal_process_submissions(self, delayed_submissions: Any) -> list[Any]:
        raise TypeError("this executor hands in the text that it was made with: call hand_in()")

    def hand_in(self) -> str:
        """The number of the new job.

        Raises:
            UserError: sbatch refused it; its own words are told.
        """
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error says
                return str(self._submit_command("").job_id)
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"sbatch refused a job: {_last_words(str(error))}") from None


def sbatch() -> list[str]:
    """`sbatch` without the variables that it would take for options."""
    unset = [
        name
        for name in sorted(os.environ)
        if (name.startswith(("SBATCH_", "SLURM_")) and name not in _KEPT)
        or name in ("VAEDIST_SETUP", "VAEDIST_SITE")
    ]
    return ["env", *(word for name in unset for word in ("-u", name)), "sbatch"] if unset else ["sbatch"]


def waiting_options(number: str | None, *, each: bool) -> list[str]:
    """Options that make a job wait for another's success, and end with its failure.

    Args:
        each: Both are arrays of one length, and each task waits for its own.
    """
    if number is None:
        return []
    kind = "aftercorr" if each else "afterok"
    return [f"--dependency={kind}:{number}", "--kill-on-invalid-dep=yes"]


def plan(links: Sequence[Link], launch: Launch) -> Iterator[tuple[Link, str, list[str]]]:
    """Each link with its text and its options for waiting, the numbers still as names in angle brackets."""
    for link in links:
        yield (
            link,
            launch.script(link),
            waiting_options(f"<{link.after}>" if link.after else None, each=_each(link, links)),
        )


def _each(link: Link, links: Sequence[Link]) -> bool:
    before = next((one for one in links if one.name == link.after), None)
    return before is not None and len(before.tasks) > 1


def submit(links: Sequence[Link], launch: Launch, told: Callable[[str], None]) -> list[Entry]:
    """Hand all links in; what is already in the queue is taken back where a later one is refused.

    Raises:
        UserError: there is no Slurm here, or sbatch refused a link.
    """
    if Executor.affinity() < 0:
        raise UserError("there is no sbatch here: run this on a login node, or add --local")
    texts = {link.name: launch.script(link) for link in links}  # all of them, before anything is in the queue
    numbers: dict[str, str] = {}
    entries: list[Entry] = []
    for link in links:
        path = launch.folder / f"{link.name}.sbatch"
        path.write_text(texts[link.name], encoding="utf-8")
        _try(link.name, path)
    for link in links:
        before = numbers.get(link.after) if link.after else None
        try:
            number = Executor(
                launch.folder, texts[link.name], waiting_options(before, each=_each(link, links))
            ).hand_in()
        except UserError:
            if numbers:
                subprocess.run(["scancel", *numbers.values()], capture_output=True, check=False)
            raise
        numbers[link.name] = number
        made = _entries(link, launch, number, before)
        record.append(launch.folder, made)
        entries += made
        waits = f", waits for {link.after} ({before})" if before else ""
        array = f"_[0-{len(link.tasks) - 1}]" if len(link.tasks) > 1 else ""
        told(f"{link.name}: job {number}{array}{waits}")
    return entries


def _try(name: str, path: Path) -> None:
    """A job that waits for another is taken without a look at what it asks for, and then never starts: look now."""
    done = subprocess.run([*sbatch(), "--test-only", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch refused {name}: {_last_words(done.stderr)}")


def _entries(link: Link, launch: Launch, number: str, before: str | None) -> list[Entry]:
    several = len(link.tasks) > 1
    batch = launch.batch(link)
    return [
        Entry(
            link=link.name,
            label=task.label,
            job=f"{number}_{place}" if several else number,
            executor="slurm",
            arguments=task.arguments,
            run=None if task.run is None else str(task.run.absolute()),
            log=batch.log.replace("%A", number).replace("%a", str(place)).replace("%j", number),
            after=before,
            mark=batch.mark,
            sent=time.time(),
        )
        for place, task in enumerate(link.tasks)
    ]


# Without Slurm ----------------------------------------------------------------------------------------------


def run_local(links: Sequence[Link], launch: Launch, told: Callable[[str], None]) -> int:
    """Run all links here, one task after the other, through submitit's local executor.

    Returns:
        The exit code: that of the first task that did not finish, else 0. What depends on it is not run.
    """
    fate: dict[str, list[int]] = {}
    first = EXIT_FINISHED
    for link in links:
        codes = []
        for place, task in enumerate(link.tasks):
            name = link.name if len(link.tasks) == 1 else f"{link.name} {task.label}"
            before = fate.get(link.after, []) if link.after else []
            needed = before if len(before) != len(link.tasks) else before[place : place + 1]
            if any(needed):
                told(f"{name}: not run, because {link.after} did not finish")
                codes.append(max(needed))
                continue
            code = _one(replace(link, tasks=(task,)), launch, name, place, told)
            first = first or code
            codes.append(code)
            if code == EXIT_STOPPED:
                return code
        fate[link.name] = codes
    return first


def _one(link: Link, launch: Launch, name: str, place: int, told: Callable[[str], None]) -> int:
    path = launch.folder / f"{link.name}-{place}.sbatch"
    path.write_text(launch.script(link), encoding="utf-8")
    log = path.with_suffix(".log")
    executor = submitit.LocalExecutor(launch.folder / "submitit")
    executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
    begun = time.monotonic()
    # Ctrl-C reaches every process of this terminal, and submitit's would kill what it started within a second: they
    # ignore it, training has an ear of its own for it, and what has none is told below.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = executor.submit(run_script, str(path), str(log), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        signal.signal(signal.SIGINT, heard)
    entry = _entries(link, launch, str(job.job_id), None)[0]
    record.append(launch.folder, [replace(entry, executor="local", log=str(log))])
    told(f"{name}: running, log {log}")
    try:
        code = int(job.result())
    except KeyboardInterrupt:
        told(f"{name}: asked to stop")
        os.kill(int(job.job_id), signal.SIGTERM)
        code = int(job.result())
    except submitit.core.utils.UncompletedJobError as error:
        raise UserError(f"{name} ended without a result: {_last_words(str(error))}; see {log}") from None
    ended = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped; the same command goes on"}
    told(f"{name}: {ended.get(code, f'failed with exit code {code}')} after {time.monotonic() - begun:.0f} s")
    return code


def run_script(path: str, log: str, devices: str | None) -> int:
    """Run a batch script as Slurm would, without Slurm: its exit code, also in LOG.code. submitit runs this function.

    Args:
        devices: CUDA_VISIBLE_DEVICES as it was: submitit hides all GPUs.
    """
    dropped = ("SLURM_", "SBATCH_", "SUBMITIT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    with (
        Path(log).open("ab") as file,
        subprocess.Popen(
            ["bash", path], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        # What submitit's process hears is for the script's; Ctrl-C is ignored in both, see _one.
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        code = process.wait()
    code = code if code >= 0 else 128 - code
    replace_file(Path(f"{log}.code"), f"{code}\n".encode())
    return code


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line or line.startswith("sbatch:")] or lines[-1:]
    return "; ".join(dict.fromkeys(line.removeprefix("sbatch: ").removeprefix("error: ") for line in told))
