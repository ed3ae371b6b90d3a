"""A trained run is opened at its best checkpoint, with the weights that its job names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs.small_job import job
from vaedist.config.job import Spec
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.models.contract import build
from vaedist.runs.checkpoint import Best, Checkpoints
from vaedist.runs.open_run import open_run
from vaedist.runs.resolved_job import resolved
from vaedist.runs.resume_rules import data_section
from vaedist.runs.run_folder import RunFolder


def trained(folder: Path, index: Index, *overrides: str) -> dict[str, dict[str, Any]]:
    """A run of two checkpoints, the first of them best; the states that were saved."""
    asked = resolved(job(*overrides))
    run = RunFolder.make(folder)
    run.record_start(asked, step=None)
    store = Checkpoints(run.path)
    states = {}
    for step in (5, 10):
        model = build(asked.model, index.spec, seed=step)
        average = build(asked.model, index.spec, seed=100 + step)
        if asked.train.precision == "fp64":
            model.double(), average.double()
        states[f"{step}"] = {
            "step": step,
            "model": model.state_dict(),
            "ema": average.state_dict() if asked.train.ema_half_life else None,
            "job": asked.model_dump(mode="json"),
            "data": data_section(index),
        }
        path = store.commit(states[f"{step}"], step, guard=lambda: None)
        if step == 5:
            store.mark_best(path, Best("loss", 1.0))
    return states


def equal(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_a_run_opens_at_its_best_and_a_checkpoint_at_itself(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index, "train.ema_half_life=1000")
    run = open_run(tmp_path / "run")
    assert (run.step, run.weights, run.folder) == (5, "ema", tmp_path / "run")
    assert equal(run.model, states["5"]["ema"])
    assert not run.model.training and not any(parameter.requires_grad for parameter in run.model.parameters())
    assert run.spec == Spec(1, (8, 8), 2) and run.classes == ("ill", "well")
    assert run.data_identity == "ab" * 32 and run.data_path == str(index.folder)
    assert run.job == resolved(job("train.ema_half_life=1000"))
    assert run.model.reconstruct(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).shape == (3, 1, 8, 8)

    last = open_run(tmp_path / "run" / "checkpoints" / "step-000000010", weights="raw")
    assert last.step == 10 and equal(last.model, states["10"]["model"])

    moved = tmp_path / "moved"
    last.checkpoint.rename(moved)
    assert open_run(moved).folder == moved


def test_weights_follow_the_jobs_rule_and_precision(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index, "train.precision=fp64")
    run = open_run(tmp_path / "run")
    assert run.weights == "raw" and equal(run.model, states["5"]["model"])
    assert next(run.model.parameters()).dtype == torch.float64
    with pytest.raises(UserError, match="not averaged"):
        open_run(tmp_path / "run", weights="ema")


def test_a_checkpoint_of_another_making_is_one_sentence(tmp_path: Path, index: Index) -> None:
    states = trained(tmp_path / "run", index)
    store = Checkpoints(tmp_path / "run")
    for step, change, message in (
        (20, {"data": {}}, "lacks what vaedist-train writes"),
        (30, {"model": {}}, "do not fit its model 'vae'"),
        (40, {"model": {"x": torch.zeros(1)}}, "do not fit its model 'vae'"),
        (50, {"job": states["5"]["job"] | {"model": {"kind": "nothing"}}}, "unknown model kind 'nothing'"),
        (60, {"job": states["5"]["job"] | {"surprise": 1}}, "unknown key 'surprise'"),
    ):
        path = store.commit(states["5"] | change, step, guard=lambda: None)
        with pytest.raises(UserError, match=message):
            open_run(path)
