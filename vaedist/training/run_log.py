"""What a person sees of a run: TensorBoard, metrics.jsonl and .csv, a bar or plain lines, and curves.png at the end.

metrics.jsonl has one strict-JSON object per line: `step`, `kind` (`train` or `validate`), `epoch`, `time` (UTC),
then the numbers by name; a number that is not finite is null. metrics.csv is the same as a table. TensorBoard has
the same numbers under `train/`, `validate/` and `speed/` (images per second, share of the time waited for data).
Every call reaches the files before it returns, so a killed process loses nothing that it logged.

On a terminal there is a bar with loss, images/s and time left; in a batch log there are plain lines.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vaedist.config.job import Job
from vaedist.core.files import disk_errors, temporary
from vaedist.core.imaging import figure
from vaedist.core.terminal import colored, progress_bar
from vaedist.runs.metrics_csv import MetricsCsv
from vaedist.runs.run_folder import RunFolder

SPEED = frozenset({"images_per_second", "data_wait"})
"""Names that measure the machine: images per second, and the share of time spent waiting for data."""


class SilentLog:
    """The log of every process but rank 0: writes nothing, says nothing. `RunLog` is the one that does."""

    def summary(self, lines: Mapping[str, object]) -> None:
        """Show what is about to run: name and value per line."""

    def message(self, text: str) -> None:
        """Show one line."""

    def train(
        self, step: int, scalars: Mapping[str, float], *, images: int, epoch: float, wait_seconds: float
    ) -> None:
        """Numbers of training after `step` steps.

        Args:
            step: Optimizer steps done.
            scalars: By name.
            images: Images taken in since step 0; images/s comes from it.
            epoch: Epochs done.
            wait_seconds: Time waited for data since this start; the share of the tick comes from it.
        """

    def validate(self, step: int, scalars: Mapping[str, float], *, best: bool = False) -> None:
        """Numbers over the whole validation split; `best`: they are the best so far."""

    def alarm(self, text: str) -> None:
        """A line that a person should look at."""

    def images(self, step: int, tag: str, grid: NDArray[np.uint8]) -> None:
        """A picture for TensorBoard: (H, W) or (H, W, C), C = 1 or 3."""

    def histogram(self, step: int, tag: str, values: NDArray[np.float64]) -> None:
        """A distribution of numbers for TensorBoard: (n,)."""

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (validation) does not count as training time in images/s."""
        yield

    def close(self) -> None:
        """Draw curves.png and close the files."""


class RunLog(SilentLog):
    """Rank 0's log.

    Args:
        run: Its folder, where `begin` has cut what lies beyond `start_step`.
        job: Resolved; for TensorBoard's hparams and the batch size.
        total_steps: Length of the run.
        start_step: Steps done before.
        quiet: Nothing on the console.
        console: Where plain lines go, whatever it is; default: a bar on a terminal, else lines on standard output.
    """

    def __init__(
        self,
        run: RunFolder,
        job: Job,
        *,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        console: IO[str] | None = None,
    ) -> None:
        # Importing TensorBoard takes a second or more; only the process that writes pays for it.
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.total_steps, self.start_step = run, total_steps, start_step
        self.quiet, self.console = quiet, console or sys.stdout
        self._rows = run.metrics.open("a", buffering=1, encoding="utf-8")
        with disk_errors("the log", run.path):
            self._table = MetricsCsv(run.table, lambda: read_metrics(run.metrics))
        # The purge mark is for a TensorBoard that is running and holds in memory what `cut` took from the files.
        self._board: Any = SummaryWriter(str(run.tensorboard), purge_step=start_step + 1 if start_step else 0)
        self._bar: Any = None
        if not quiet and console is None and sys.stderr.isatty():
            self._bar = progress_bar(total_steps, "step", initial=start_step)
        if start_step == 0:
            self._hparams(job)
        self._began = self._tick = time.monotonic()
        self._images, self._waited = start_step * job.train.batch_size, 0.0
        self._epochs_per_step = 0.0

    def summary(self, lines: Mapping[str, object]) -> None:
        width = max(map(len, lines), default=0)
        self.message("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))

    def message(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, file=self.console, flush=True)

    def alarm(self, text: str) -> None:
        self.message(f"{colored('ALARM:', 'yellow', self.console)} {text}")

    def train(
        self, step: int, scalars: Mapping[str, float], *, images: int, epoch: float, wait_seconds: float
    ) -> None:
        now = time.monotonic()
        seconds = max(now - self._tick, 1e-9)
        rate, waited = (images - self._images) / seconds, (wait_seconds - self._waited) / seconds
        self._tick, self._images, self._waited = now, images, wait_seconds
        self._epochs_per_step = epoch / step
        self._write(step, "train", {**scalars, "images_per_second": rate, "data_wait": waited})
        losses = {name: value for name, value in scalars.items() if name.partition("/")[0] == "loss"}
        loss = "  ".join(f"{name} {value:.6g}" for name, value in (losses or {"loss": math.nan}).items())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{loss}, {rate:.4g} images/s", refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            self.message(
                f"{_clock()}  step {step}/{self.total_steps}  epoch {epoch:.2f}  {loss}  {rate:.4g} images/s  "
                f"{self._left(step)} left"
            )

    def validate(self, step: int, scalars: Mapping[str, float], *, best: bool = False) -> None:
        self._write(step, "validate", scalars)
        shown = "  ".join(f"{name} {value:.6g}" for name, value in scalars.items())
        mark = colored("  (best so far)", "green", self.console) if best else ""
        self.message(f"{_clock()}  step {step}  validation  {shown}{mark}")

    def images(self, step: int, tag: str, grid: NDArray[np.uint8]) -> None:
        with disk_errors("the log", self.run.path):
            self._board.add_image(tag, grid, step, dataformats="HW" if grid.ndim == 2 else "HWC")
            self._board.flush()

    def histogram(self, step: int, tag: str, values: NDArray[np.float64]) -> None:
        finite = values[np.isfinite(values)]
        if finite.size:
            with disk_errors("the log", self.run.path):
                self._board.add_histogram(tag, finite, step)
                self._board.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._tick += time.monotonic() - began

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        with disk_errors("the log", self.run.path):
            self._board.close()
            self._rows.close()
            draw_curves(self.run.metrics, self.run.figures / "curves.png")

    def _write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        clock = {
            "step": step,
            "kind": kind,
            "epoch": step * self._epochs_per_step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        numbers = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with disk_errors("the log", self.run.path):
            self._rows.write(json.dumps(clock | finite, allow_nan=False) + "\n")
            self._table.add(clock | finite)
            for name, value in numbers.items():
                self._board.add_scalar(f"{'speed' if name in SPEED else kind}/{name}", value, step)
            self._board.flush()

    def _left(self, step: int) -> str:
        """Time left, from the pace of this start, validation included."""
        done = step - self.start_step
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._began) / done * max(0, self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _hparams(self, job: Job) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = dict(_flat("", job.model_dump(mode="json")))
        # TensorBoard's own add_hparams makes a run of its own for them; these belong to this one.
        for summary in hparams(settings, {"validate/loss": 0.0}):
            self._board.file_writer.add_summary(summary, 0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl, in order; a row being written right now is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(row) for row in text.splitlines(keepends=True) if row.endswith("\n")]


def draw_curves(metrics: Path, target: Path) -> None:
    """Loss of training and validation, learning rate, and codebook use where there is one, over the steps."""
    rows = read_metrics(metrics)
    curves = {
        (kind, name): [
            (row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None
        ]
        for kind in ("train", "validate")
        for name in dict.fromkeys(key for row in rows for key in row)
        if name.rpartition("/")[2] in ("loss", "codes_used", "perplexity") or name.startswith("learning_rate")
    }
    panels = {
        "loss": ("loss",),
        "learning rate": ("learning_rate",),
        "codebook": ("codes_used", "perplexity"),
    }
    drawn = {
        title: [
            (kind, name, points)
            for (kind, name), points in curves.items()
            if points and name.startswith(starts)
        ]
        for title, starts in panels.items()
    }
    drawn = {title: lines for title, lines in drawn.items() if lines}
    if not drawn:
        return
    sheet = figure(figsize=(5 * len(drawn), 3.6), layout="constrained")
    for axes, (title, lines) in zip(
        sheet.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True
    ):
        for kind, name, points in lines:
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps, values, marker="o" if len(points) < 30 else "", markersize=3, label=f"{kind} {name}"
            )
        axes.set(title=title, xlabel="step")
        positive = all(value > 0 for _, _, points in lines for _, value in points)
        if title == "loss" and positive:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    target.parent.mkdir(exist_ok=True)
    scratch = temporary(target)
    sheet.savefig(scratch, format="png", dpi=110)
    os.replace(scratch, target)


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _flat(prefix: str, section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted keys and values that TensorBoard's hparams can show."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        if isinstance(value, Mapping):
            found += _flat(f"{prefix}{key}.", value)
        elif value is not None:
            found.append((f"{prefix}{key}", value if isinstance(value, (bool, int, float)) else str(value)))
    return found
