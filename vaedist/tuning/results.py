"""What a search leaves behind: results.csv, `best`, figures, TensorBoard's hparams, and the lines on the console.

    results.csv     a row per trial, in the order of their numbers
    best            a link to the run folder of the best trial, for vaedist-sample and vaedist-evaluate
    figures/        see `vaedist.tuning.search_figures`
    tensorboard/    hparams: settings and numbers of each trial side by side

All of it is made anew from the record; nothing is read back.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vaedist.core.files import disk_errors, replace_file, temporary
from vaedist.tuning.objectives import best_trial, modes, pareto_front, value_of, values_of
from vaedist.tuning.space import Space
from vaedist.tuning.trial_log import Record, Trial, run_folder

BEST = "best"
TABLE = "results.csv"


def trial_line(space: Space, trials: Sequence[Trial], trial: Trial) -> str:
    """A trial's line on the console, with the best so far."""
    ended = sum(one.ended for one in trials)
    ahead = best_trial(space, trials)
    line = f"trial {trial.number} {trial.status} ({ended} of {space.trials}): {objectives_line(space, trial)}"
    line += f", {trial.seconds:.0f} s"
    if ahead is None:
        return line
    if len(space.objectives) == 1:
        return f"{line}; best so far: trial {ahead.number}, {objectives_line(space, ahead)}"
    shown = ", ".join(str(one.number) for one in pareto_front(space, trials))
    return f"{line}; front so far: {shown}; picked: trial {ahead.number}, {objectives_line(space, ahead)}"


def objectives_line(space: Space, trial: Trial) -> str:
    """A trial's objectives on one line."""
    values = values_of(space, trial)
    if values is None:
        return "no number"
    return ", ".join(
        f"{objective.metric} {value:.5g}" for objective, value in zip(space.objectives, values, strict=True)
    )


def write_table(record: Record) -> None:
    """results.csv and `best`."""
    with disk_errors("the results", record.folder):
        replace_file(record.folder / TABLE, csv_table(record).encode())
        ahead = best_trial(record.space, record.trials)
        if ahead is not None:
            replace_link(record.folder / BEST, run_folder(record.folder, ahead.number))


def csv_table(record: Record) -> str:
    """results.csv: settings as `key`, objectives by name, then all else that was measured."""
    space = record.space
    ahead, chosen = pareto_front(space, record.trials), best_trial(space, record.trials)
    objectives = [objective.metric for objective in space.objectives]
    measures = sorted({name for trial in record.trials for name in trial.measures} - set(objectives))
    columns = ["trial", "status", "front", "best", *space.dimensions, *objectives, "step", "seconds", "run"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *measures, "reason"])
    for trial in record.trials:
        row: list[Any] = [
            trial.number,
            trial.status or "unfinished",
            int(trial in ahead),
            int(trial is chosen),
        ]
        row += [trial.settings.get(key, "") for key in space.dimensions]
        row += [value_of(trial.measures, name) for name in objectives]
        row += [trial.step, round(trial.seconds, 1), f"trials/{trial.number:03d}"]
        row += [trial.measures.get(name) for name in measures]
        writer.writerow(["" if value is None else value for value in [*row, trial.reason]])
    return text.getvalue()


def replace_link(place: Path, target: Path) -> None:
    """Make `place` a relative link to `target` beside it, all at once."""
    scratch = temporary(place)
    scratch.symlink_to(os.path.relpath(target, place.parent))
    os.replace(scratch, place)


def write_all(record: Record) -> list[Path]:
    """Everything, figures and TensorBoard too, as far as there are trials; the figures written."""
    from vaedist.tuning.search_figures import draw_figures

    write_table(record)
    if not any(trial.ended for trial in record.trials):
        return []
    folder = record.folder / "figures"
    with disk_errors("the figures", record.folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        drawn = draw_figures(record)
        for name, picture in drawn.items():
            replace_file(folder / name, picture)
        _hparams(record)
    return [folder / name for name in drawn]


def _hparams(record: Record) -> None:
    """TensorBoard's table of settings and numbers, one small run per trial."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    folder = record.folder / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    names = [objective.metric for objective in record.space.objectives]
    for trial in record.trials:
        values = values_of(record.space, trial)
        if values is None:
            continue
        values_by_name = dict(zip(names, values, strict=True))
        board: Any = SummaryWriter(str(folder / f"{trial.number:03d}"))
        for summary in hparams(
            dict(trial.settings), {f"tune/{name}": value for name, value in values_by_name.items()}
        ):
            board.file_writer.add_summary(summary, 0)
        for name, value in values_by_name.items():
            board.add_scalar(f"tune/{name}", value, trial.step)
        board.close()


def summary_lines(record: Record) -> list[str]:
    """The last lines on the console: what was found and where it lies."""
    space, trials = record.space, record.trials
    ahead, chosen = pareto_front(space, trials), best_trial(space, trials)
    if chosen is None:
        return ["no trial has finished yet"]
    lines = []
    if len(space.objectives) > 1:
        better = ", ".join(
            f"{objective.metric} {'low' if mode == 'min' else 'high'}"
            for objective, mode in zip(space.objectives, modes(space), strict=True)
        )
        lines.append(f"front ({better}): no trial is better in one without being worse in another")
    for trial in ahead:
        settings = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in trial.settings.items()
        )
        mark = "*" if trial is chosen else " "
        lines.append(f"{mark} trial {trial.number}: {objectives_line(space, trial)}   {settings}")
    lines.append(f"best: {record.folder / BEST} -> trials/{chosen.number:03d}")
    return lines
