"""Charts as SVG that takes its text and axes from the page: the same file reads in light and dark.

Matplotlib draws; its black is then replaced by CSS's `currentColor`, its fonts by the page's, and its element names,
which would repeat in a page of several charts, are taken away.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.imaging import figure

Points = Sequence[tuple[float, float]]

COLORS = "#3b7dd8 #d1495b #2a9d6f #b07d12 #8a63d2 #1f9aa8 #c2568f #6b8e23 #a0522d #708090".split()
"""Distinct on white and on near-black."""
_INK = "#010203"
_MOST_POINTS = 600


def lines(
    series: Mapping[str, Points], *, x: str, y: str, logarithmic: bool = False, level: float | None = None
) -> str:
    """A line for each series.

    Args:
        series: Name to points (x, y), in order of x.
        x, y: Names of the axes.
        logarithmic: The y axis, where all values are above 0.
        level: A horizontal line.
    """
    with _ink():
        sheet, axes = _sheet(x, y)
        for color, (name, points) in zip(COLORS * 3, series.items(), strict=False):
            every = max(1, -(-len(points) // _MOST_POINTS))
            shown = [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]
            marker = "o" if len(shown) < 3 else None
            axes.plot(*zip(*shown, strict=True), color=color, linewidth=1.4, marker=marker, label=name)
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=":")
        if logarithmic and all(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _svg(sheet, f"{y} over {x}")


def bars(heights: Sequence[float], *, x: str, y: str, level: float | None = None) -> str:
    """A bar for each value, in the given order."""
    with _ink():
        sheet, axes = _sheet(x, y)
        axes.bar(np.arange(len(heights)), heights, width=1.0 if len(heights) > 40 else 0.8, color=COLORS[0])
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.8, linestyle=":")
        axes.margins(x=0.01)
        return _svg(sheet, f"{y} by {x}")


def scatter(points: NDArray[Any], groups: Sequence[str], *, x: str, y: str) -> str:
    """(N, 2) points, colored by group, the most frequent groups first; further ones share the last colour."""
    names, counts = np.unique(np.asarray(groups, dtype=object).astype(str), return_counts=True)
    ranked = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    shown = ranked if len(ranked) <= len(COLORS) else [*ranked[: len(COLORS) - 1], "others"]
    labels = [name if name in shown else "others" for name in map(str, groups)]
    with _ink():
        sheet, axes = _sheet(x, y)
        for color, name in zip(COLORS, shown, strict=False):
            mine = points[[label == name for label in labels]]
            axes.scatter(mine[:, 0], mine[:, 1], s=7, alpha=0.7, linewidths=0, color=color, label=name)
        if len(shown) > 1:
            axes.legend(
                frameon=False, fontsize=7, markerscale=1.6, loc="center left", bbox_to_anchor=(1.0, 0.5)
            )
        return _svg(sheet, f"{y} against {x}")


def _ink() -> Any:
    import matplotlib

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[Any, Any] = dict.fromkeys(names, _INK)
    return matplotlib.rc_context(settings | {"svg.fonttype": "none", "svg.hashsalt": "vaedist"})


def _sheet(x: str, y: str) -> tuple[Any, Any]:
    sheet = figure(figsize=(5.6, 3.0), layout="constrained")
    axes = sheet.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.15)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return sheet, axes


def _svg(sheet: Any, title: str) -> str:
    buffer = io.StringIO()
    sheet.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_plain(title)}" ', 1)


def _plain(text: str) -> str:
    return re.sub(r"[^\w .,()/-]", " ", text)
