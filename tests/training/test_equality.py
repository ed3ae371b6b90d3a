"""The same job is the same curve: on 1 and 2 processes, in one pass or accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.run_commands import curve, small_job, train, write_job
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit

Row = dict[str, Any]


def alone(data: Path, run: Path, model: str, **settings: Any) -> list[Row]:
    fit(small_job(data, model, **settings), run, options=FitOptions(quiet=True))
    return curve(run)


def with_two(data: Path, run: Path, model: str, **settings: Any) -> list[Row]:
    job = write_job(run.with_suffix(".yaml"), small_job(data, model, **settings))
    code, _, err = train(job, run, "--workers", "2", "-q")
    assert (code, err) == (0, "")
    return curve(run)


def furthest(one: list[Row], other: list[Row], floor: float = 1e-6) -> tuple[float, str]:
    """The largest relative difference of two curves, and where it is.

    Numbers below `floor` count as if they were that large: a commitment of 1e-12 has no digits to compare.
    """
    assert [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in other]
    worst, place = 0.0, ""
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"step", "kind", "best"}:
            apart = abs(mine[name] - theirs[name]) / max(abs(mine[name]), abs(theirs[name]), floor)
            if apart > worst:
                worst, place = apart, f"{name} of the {mine['kind']} row at step {mine['step']}"
    return worst, place


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_two_processes_agree_with_one_in_fp64(model: str, phantom: Path, tmp_path: Path) -> None:
    settings = {"steps": 200, "precision": "fp64", "batch_size": 8}
    one = alone(phantom, tmp_path / "one", model, **settings)
    two = with_two(phantom, tmp_path / "two", model, **settings)
    worst, place = furthest(one, two)
    assert worst < 1e-9, place
    assert one[0]["loss"] > 1.02 * one[-1]["loss"], "nothing was learnt, so nothing was compared"


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_two_processes_agree_with_one_in_fp32(model: str, phantom: Path, tmp_path: Path) -> None:
    settings = {"steps": 20, "batch_size": 8}
    one = alone(phantom, tmp_path / "one", model, **settings)
    two = with_two(phantom, tmp_path / "two", model, **settings)
    worst, place = furthest(one, two)
    assert worst < 1e-5, place


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_one_pass_two_processes_and_two_passes_agree(model: str, phantom: Path, tmp_path: Path) -> None:
    """1 x 2B, 2 x B and accumulated 2 x B; then slices that differ by a sample (2 x 4 or 3 and more passes)."""
    settings = {"steps": 30, "precision": "fp64", "batch_size": 16}
    whole = alone(phantom, tmp_path / "whole", model, **settings)
    twice = alone(phantom, tmp_path / "twice", model, micro_batch_size=8, **settings)
    uneven = alone(phantom, tmp_path / "uneven", model, micro_batch_size=7, **settings)
    two = with_two(phantom, tmp_path / "two", model, micro_batch_size=5, **settings)
    for other in (twice, uneven, two):
        worst, place = furthest(whole, other)
        assert worst < 1e-9, place
