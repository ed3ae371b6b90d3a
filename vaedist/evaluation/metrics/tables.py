"""Evaluation results as text: one row per model, baseline or group, one column per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEADS = {
    "ssim": "SSIM",
    "ssim_foreground": "SSIM foregr.",
    "ssim_default": "SSIM 7x7",
    "ssim_default_foreground": "7x7 foregr.",
    "ms_ssim": "MS-SSIM",
    "psnr": "PSNR dB",
    "mse": "MSE",
    "mae": "MAE",
}
_DIGITS = {"psnr": 2, "mse": 5}

Summaries = Mapping[str, Mapping[str, float | int | None]]


def digits(name: str) -> int:
    """Decimal places of a metric."""
    return _DIGITS.get(name, 4)


def cell(name: str, value: Mapping[str, float | int | None], images: int, spread: bool = True) -> str:
    """`0.9123 ±0.0210`: mean and spread over images; how many images, where not all have a value."""
    if value["mean"] is None or value["std"] is None:
        return "-"
    places = digits(name)
    text = f"{value['mean']:.{places}f}" + (f" ±{value['std']:.{places}f}" if spread else "")
    return text if value["count"] == images else f"{text} ({value['count']})"


def metrics_rows(
    rows: Mapping[str, tuple[int, Summaries]], first: str = "", spread: bool = True
) -> list[list[str]]:
    """A head, and cells for each entry of `rows`: name to (number of images, metrics); what no image has is left out.

    Args:
        first: Head of the first column.
        spread: Whether the standard deviation over images stands beside each mean.
    """
    present = {name for _, metrics in rows.values() for name, value in metrics.items() if value["count"]}
    names = [name for name in HEADS if name in present]
    lines = [[first, "images", *(HEADS[name] for name in names)]]
    for title, (images, metrics) in rows.items():
        cells = (cell(name, metrics[name], images, spread) if name in metrics else "-" for name in names)
        lines.append([title, str(images), *cells])
    return lines


def metrics_table(rows: Mapping[str, tuple[int, Summaries]], first: str = "", spread: bool = True) -> str:
    """`metrics_rows` as aligned text."""
    return columns(metrics_rows(rows, first, spread))


def terms_table(terms: Summaries, units: Mapping[str, str], images: int) -> str:
    """A line per term of the model's loss: mean and spread over images, and the unit where one is declared."""
    lines = [["per image", "mean ±spread", "unit"]]
    for name, value in terms.items():
        base = name.partition("/")[0]
        unit = units.get(base, "nats" if base == "elbo" else "")
        lines.append([name, cell(name, value, images), unit])
    return columns(lines)


def sample_rows(sets: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A head, and a row for each sample metric of `this run`; a column for each set of images."""
    rows = (
        [name, *(f"{values[name]:.4g}" if name in values else "-" for values in sets.values())]
        for name in sets["this run"]
    )
    return [["", *sets], *rows]


def columns(lines: Sequence[Sequence[Any]]) -> str:
    """Lines of cells as text: the first column flush left, the others flush right."""
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            str(text).rjust(width) if i else str(text).ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
