"""The run folder: its files, and the truncation of its logs that lets each step appear once.

    runs/NAME/                     0700: medical images are private
      job.yaml                     the job, every default filled in
      provenance.json              one entry per start: see `vaedist.runs.provenance`
      checkpoints/, best.json      see `vaedist.runs.checkpoint`
      lock                         see `vaedist.runs.run_lock`
      metrics.jsonl, metrics.csv, tensorboard/  see `vaedist.training.run_log`
      latents.jsonl, collapse.json what each latent dimension carries: see `vaedist.training.validation_figures`
      figures/                     curves.png, validation-STEP.png and what the commands draw
      finished.json                only once there is nothing left to do

A resumed run logs again what it had logged beyond its last checkpoint, so `truncate_logs` removes that first: rows of
metrics.jsonl and latents.jsonl, pictures of later validations, and records of TensorBoard's event files.

Nothing here needs torch: a launcher makes the folder and holds its lock without it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.core.files import as_json, disk_errors, replace_file
from vaedist.runs.provenance import Change, append_start, provenance
from vaedist.runs.tensorboard_events import truncate_event_files

_ALLOWED_BEFORE_START = re.compile(r"\.|lock|stop$|stuck|ray|.*\.(?:log|out|err)$")
"""What a folder may hold before a run has started in it: what a failed start left, or the log of its job."""


class RunFolder:
    """The files of one run. Only the holder of its lock writes."""

    def __init__(self, path: Path, *, fresh: bool = False, parents: Sequence[Path] = ()) -> None:
        self.path, self.fresh, self._parents = path, fresh, parents
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self.table = path / "metrics.csv"
        self.latents = path / "latents.jsonl"
        self.collapse = path / "collapse.json"
        self.figures = path / "figures"
        self.stop = path / "stop"

    @classmethod
    def make(cls, path: str | Path, *, new_run: bool = False) -> RunFolder:
        """The run folder at `path`, made (0700) if missing.

        Args:
            new_run: Never continue: where `path` holds a run already, a fresh `path-2` (or 3, ...) is made.
        """
        wanted = Path(path).expanduser()
        try:
            parents = [parent for parent in wanted.parents if not parent.exists()]  # innermost first
            wanted.parent.mkdir(parents=True, exist_ok=True)
            number = 0
            while True:
                number += 1
                folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
                try:
                    folder.mkdir(mode=0o700)
                    return cls(folder, fresh=True, parents=parents)
                except FileExistsError:
                    if not folder.is_dir():
                        raise
                if not (new_run and (number > 1 or cls(folder).has_run)):
                    if not any(folder.iterdir()):
                        folder.chmod(0o700)
                    return cls(folder, parents=parents)
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"cannot make the run folder {wanted}: {reason}; choose another --run-dir"
            ) from None

    def discard(self) -> None:
        """Remove the folder, and the parents made for it, if this start made it and wrote nothing into it."""
        if self.fresh:
            with contextlib.suppress(OSError):
                (self.path / "checkpoints").rmdir()
            with contextlib.suppress(OSError):  # not empty: something was written
                for folder in (self.path, *self._parents):
                    folder.rmdir()

    def check_is_run_folder(self, marker: str) -> None:
        """Refuse a folder that holds something else than what is to be continued in it.

        Args:
            marker: The file by which the folder is recognized: `job.yaml` of a run, or `trials.jsonl` of a search.

        Raises:
            UserError: it holds the other one, packed data, or foreign files.
        """
        contents = {"job.yaml": "a training run", "trials.jsonl": "a search", "index.json": "packed data"}
        names = [] if self.fresh else sorted(path.name for path in self.path.iterdir())
        if marker in names:
            return
        what = next((contents[name] for name in contents if name in names), None)
        if what is None and not self.has_run:
            foreign = [name for name in names if not _ALLOWED_BEFORE_START.match(name)]
            what = f"{foreign[0]!r}, which is not of a run" if foreign else None
        if what is not None:
            raise UserError(f"{self.path} holds {what}: give a new folder with --run-dir")

    @property
    def has_run(self) -> bool:
        """Whether training has begun in this folder."""
        return (self.path / "job.yaml").exists() or (self.path / "checkpoints").exists()

    def record_start(
        self,
        job: Job,
        *,
        step: int | None,
        initialization: Mapping[str, Any] | None = None,
        changed: Sequence[Change] = (),
        engine: str = "local",
        world: int = 1,
        attempt: str = "",
        command: Sequence[str] | None = None,
    ) -> None:
        """Record a start (the resolved job, who starts it), and remove what was logged beyond `step`.

        Args:
            job: Resolved (`vaedist.runs.resolved_job`).
            step: The checkpoint's step; None: there is none and the run starts from nothing.
            initialization: How it starts (`vaedist.training.initialization`): `how`, and the other runs whose weights
                it takes.
            changed: From `vaedist.runs.resume_rules.check_resume`.
            command: The command line, where it is not this process's own.
        """
        with disk_errors("the record of this start", self.path):
            for folder in (self.tensorboard, self.figures):
                folder.mkdir(mode=0o700, exist_ok=True)
            (self.path / "finished.json").unlink(missing_ok=True)
            entry = provenance(command) | {
                "attempt": attempt,
                "start_step": step or 0,
                "start": dict(initialization or {}),
                "engine": engine,
                "workers": world,
                "changed": [change.plain() for change in changed],
            }
            self.write_job(job)
            append_start(self.path, entry)
            self.truncate_logs(step)

    def write_job(self, job: Job) -> None:
        """`job.yaml`: the job, resolved by the caller; vaedist-train takes it as it is."""
        text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        header = "# Written by vaedist-train: the job of this run, every default filled in.\n"
        replace_file(self.path / "job.yaml", (header + text).encode())

    def finish(self, step: int, reason: str, metrics: Mapping[str, float]) -> None:
        """Record that there is nothing left to do: `reason` is `length` or `early stop`."""
        content = {"step": step, "reason": reason, "metrics": _finite(metrics)}
        with disk_errors("finished.json", self.path):
            replace_file(self.path / "finished.json", as_json(content))

    def finished(self) -> dict[str, Any] | None:
        """What `finish` recorded last: `step`, `reason`, `metrics`."""
        try:
            content: dict[str, Any] = json.loads((self.path / "finished.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return content

    def truncate_logs(self, step: int | None) -> None:
        """Remove what was logged beyond `step` (None: everything), so that each step appears once."""
        last = -1 if step is None else step
        for path in (self.metrics, self.latents):
            if path.exists():
                rows = path.read_bytes().splitlines(keepends=True)
                kept = [row for row in rows if _row_step(row) <= last]
                if kept != rows:
                    replace_file(path, b"".join(kept))
        for picture in self.figures.glob("validation-*.png"):
            of_step = picture.stem.removeprefix("validation-")
            if of_step.isdecimal() and int(of_step) > last:
                picture.unlink()
        truncate_event_files(self.tensorboard, last)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if abs(value) < float("inf") else None for name, value in metrics.items()}


def _row_step(row: bytes) -> float:
    """The step of a row of metrics.jsonl; infinite for one that a kill has torn."""
    try:
        return float(json.loads(row)["step"]) if row.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
