"""Pictures of a search, drawn with matplotlib's Agg canvas.

| file | what |
|---|---|
| `dimensions.png` | each objective over each searched setting; what no other trial beats is filled |
| `curves.png` | one number of validation over the steps, a line per trial |
| `front.png` | the first two objectives against each other, with the front, where they are not rate and distortion |
| `rate_distortion.png` | distortion over rate, where the trials have both |
| `codes.png` | codes used and perplexity over the codes there are, where the trials have codes |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vaedist.core import imaging
from vaedist.training.run_log import read_metrics
from vaedist.tuning.dimensions import Categorical, Integer, LogUniform
from vaedist.tuning.objectives import best_trial, modes, pareto_front, value_of, values_of
from vaedist.tuning.space import Asha, Space
from vaedist.tuning.trial_log import Record, Trial, run_folder

_CURVES = ("kid", "mse", "distortion", "loss")
"""What a learning curve shows: the first of them that all trials have, and means the same in all but the last."""
_AHEAD, _OTHER, _BEST = "#b3202a", "#7a8793", "#123f7a"


def draw_figures(record: Record) -> dict[str, bytes]:
    """File name to PNG file, of all figures that the trials have something for."""
    space = record.space
    held = [trial for trial in record.trials if values_of(space, trial) is not None]
    ahead, chosen = pareto_front(space, held), best_trial(space, held)
    found: dict[str, bytes] = {}
    if held:
        found["dimensions.png"] = _dimensions(space, held, ahead, chosen)
        names = [objective.metric for objective in space.objectives]
        are_the_front = set(names) == {"rate", "distortion"}
        if len(names) > 1 and not are_the_front:
            found["front.png"] = _pair(names[1], names[0], held, ahead, chosen, line=len(names) == 2)
        if _have(held, "rate", "distortion"):
            rate_distortion = _pair("rate", "distortion", held, ahead, chosen, line=are_the_front)
            found["rate_distortion.png"] = rate_distortion
        if _have(held, "codes_used", "perplexity"):
            found["codes.png"] = _codes(held, chosen)
    if curves := _curves(record, chosen):
        found["curves.png"] = curves
    return found


def _have(trials: Sequence[Trial], *names: str) -> bool:
    return any(all(value_of(trial.measures, name) is not None for name in names) for trial in trials)


def _figure(width: float, height: float) -> Any:
    return imaging.figure(figsize=(width, height), dpi=110, layout="constrained")


def _axes(width: float, x_label: str, y_label: str) -> Any:
    """The one pair of axes of a new figure."""
    axis = _figure(width, 3.8).subplots()
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    return axis


def _mark(axis: Any, x: Any, y: float, trial: Trial, ahead: Sequence[Trial], chosen: Trial | None) -> None:
    """A trial: filled on the front, a star for the best, hollow where it was stopped early."""
    on_front = trial in ahead
    colour = _BEST if trial is chosen else _AHEAD if on_front else _OTHER
    axis.plot(
        [x],
        [y],
        linestyle="none",
        marker="*" if trial is chosen else "o",
        markersize=11 if trial is chosen else 6,
        color=colour,
        markerfacecolor=colour if trial.status == "finished" else "none",
        zorder=3 if on_front else 2,
    )


def label_options(axis: Any, options: Sequence[str]) -> None:
    """A tick for each option; names that are too long to stand side by side are turned."""
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(
        range(len(options)), options, fontsize=7, **(turned if sum(map(len, options)) > 30 else {})
    )
    axis.set_xlim(-0.5, len(options) - 0.5)


def _dimensions(space: Space, held: Sequence[Trial], ahead: Sequence[Trial], chosen: Trial | None) -> bytes:
    keys, objectives = list(space.dimensions), [objective.metric for objective in space.objectives]
    figure = _figure(2.6 * len(keys) + 0.6, 2.3 * len(objectives) + 0.4)
    grid = figure.subplots(len(objectives), len(keys), squeeze=False, sharey="row")
    for row, (name, mode) in enumerate(zip(objectives, modes(space), strict=True)):
        for axis, key in zip(grid[row], keys, strict=True):
            dimension = space.dimensions[key]
            options = list(dimension.grid()) if isinstance(dimension, Categorical) else None
            for trial in held:
                value = value_of(trial.measures, name)
                if key in trial.settings and value is not None:
                    setting = trial.settings[key]
                    x = options.index(setting) if options is not None else setting
                    _mark(axis, x, value, trial, ahead, chosen)
            if options is not None:
                label_options(axis, [str(option) for option in options])
            else:
                assert not isinstance(dimension, Categorical)
                if isinstance(dimension, LogUniform) or (isinstance(dimension, Integer) and dimension.log):
                    axis.set_xscale("log")
                    middle = math.sqrt(dimension.low * dimension.high)
                else:
                    middle = (dimension.low + dimension.high) / 2
                ticks = [dimension.low, middle, dimension.high]
                axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
                axis.minorticks_off()
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.25)
            if row == len(objectives) - 1:
                axis.set_xlabel(key, fontsize=8)
        grid[row][0].set_ylabel(f"{name} ({'low' if mode == 'min' else 'high'} is better)", fontsize=8)
    legend = "star: best" if len(objectives) == 1 else "star: picked, red: on the front"
    stopped = any(trial.status == "stopped early" for trial in held)
    figure.suptitle(legend + ", hollow: stopped early" * stopped, fontsize=8)
    return imaging.figure_png(figure)


def _pair(
    across: str, up: str, held: Sequence[Trial], ahead: Sequence[Trial], chosen: Trial | None, *, line: bool
) -> bytes:
    axis = _axes(4.8, across, up)
    places = {
        trial.number: (value_of(trial.measures, across), value_of(trial.measures, up)) for trial in held
    }
    for trial in held:
        x, y = places[trial.number]
        if x is None or y is None:
            continue
        _mark(axis, x, y, trial, ahead, chosen)
        axis.annotate(str(trial.number), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    if line:
        on_front = sorted((places[trial.number] for trial in ahead), key=lambda place: place[0] or 0.0)
        axis.plot(*zip(*on_front, strict=True), color=_AHEAD, linewidth=1, zorder=1)
    return imaging.figure_png(axis.figure)


def _codes(held: Sequence[Trial], chosen: Trial | None) -> bytes:
    axis = _axes(4.8, "codes in the book", "on held-out images")
    for name, marker in (("codes_used", "o"), ("perplexity", "x")):
        points = [
            (2 ** (bits / positions), value, trial is chosen)
            for trial in held
            if (value := value_of(trial.measures, name)) is not None
            and (bits := value_of(trial.measures, "bits_per_image")) is not None
            and (positions := value_of(trial.measures, "positions")) is not None
        ]
        axis.plot(*zip(*[point[:2] for point in points], strict=True), marker, color=_OTHER, label=name)
        best_ones = [point[:2] for point in points if point[2]]
        if best_ones:
            axis.plot(*zip(*best_ones, strict=True), marker, color=_BEST, markersize=9)
    low, high = axis.get_xlim()
    axis.plot([low, high], [low, high], color=_AHEAD, linewidth=0.8, label="all of them")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.legend(fontsize=8)
    return imaging.figure_png(axis.figure)


def _curves(record: Record, chosen: Trial | None) -> bytes | None:
    rows = {
        trial.number: [
            row
            for row in read_metrics(run_folder(record.folder, trial.number) / "metrics.jsonl")
            if row["kind"] == "validate"
        ]
        for trial in record.trials
    }
    rows = {number: held for number, held in rows.items() if held}
    asha = record.space.scheduler
    wanted = ((asha.metric,) if isinstance(asha, Asha) else ()) + _CURVES
    named = [{key.partition("[")[0] for key in row} for held in rows.values() for row in held]
    shown = next((name for name in wanted if named and all(name in names for names in named)), None)
    if shown is None:
        return None
    axis = _axes(5.6, "step", f"validation {shown}")
    for number, held in rows.items():
        points = [(row["step"], value_of(_numbers(row), shown)) for row in held]
        is_best = chosen is not None and number == chosen.number
        axis.plot(
            *zip(*points, strict=True),
            marker=".",
            linewidth=2 if is_best else 1,
            color=_BEST if is_best else None,
            alpha=1 if is_best else 0.7,
            label=f"trial {number}",
        )
    values = [value for held in rows.values() for row in held if (value := value_of(_numbers(row), shown))]
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axis.set_yscale("log")
    if len(rows) <= 16:
        axis.legend(fontsize=6, ncols=2)
    return imaging.figure_png(axis.figure)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float | int)}
