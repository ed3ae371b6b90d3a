"""What a search draws can be read."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vaedist.tuning.search_figures import label_options


@pytest.mark.parametrize(
    "options",
    [
        ["ema", "fsq"],
        ["16", "32", "64"],
        ["[4, 4]", "[6, 5]", "[5, 4, 3]", "[6, 5, 4]", "[8, 6, 5]", "[8, 5, 4, 3]"],
    ],
)
def test_names_of_options_do_not_lie_on_each_other(options: list[str]) -> None:
    """Drawn as wide as in the figure; turned names are compared by the heights of their lines along the axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6, 2.3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    label_options(axis, options)
    canvas.draw()
    labels = axis.get_xticklabels()
    assert [label.get_text() for label in labels] == options
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    if labels[0].get_rotation():
        apart = [right.x1 - left.x1 for left, right in pairwise(boxes)]
        assert min(apart) > labels[0].get_fontsize() * figure.dpi / 72, (
            "a line's height between one and the next"
        )
    else:
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
