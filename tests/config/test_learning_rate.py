"""Learning-rate schedules against closed forms and torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from vaedist.config.job import Monitor, Optim, Plateau
from vaedist.config.learning_rate import PlateauState, better, factor


def optim(**schedule: object) -> Optim:
    return Optim(schedule=schedule)  # type: ignore[arg-type]


def test_constant_and_warm_up() -> None:
    assert factor(optim(kind="constant"), 5, 10) == 1
    warm = optim(kind="constant", warmup=4)
    assert [factor(warm, step, 10) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_cosine_runs_from_one_to_final() -> None:
    cosine = optim(kind="cosine", warmup=10, final=0.1)
    assert factor(cosine, 10, 111) == 1
    assert factor(cosine, 60, 111) == pytest.approx(0.55)
    assert factor(cosine, 110, 111) == pytest.approx(0.1)
    assert factor(cosine, 500, 111) == pytest.approx(0.1), "beyond the end it stays"
    assert math.isfinite(factor(optim(kind="cosine"), 0, 1))


def test_cosine_is_torchs_cosine() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=49)
    for step in range(50):
        assert factor(optim(kind="cosine"), step, 50) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()


def test_multistep_is_torchs_multistep() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    peer = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.2)
    for step in range(12):
        ours = factor(optim(kind="multistep", milestones=(3, 7), gamma=0.2), step, 12)
        assert ours == pytest.approx(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_is_torchs_plateau(mode: str) -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    # torch cuts after `patience` bad results and one more.
    settings = {"factor": 0.5, "patience": 2, "threshold": 1e-2, "min_lr": 0.1}
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, **settings)  # type: ignore[arg-type]
    schedule = Plateau(kind="plateau", factor=0.5, patience=3, threshold=1e-2, floor=0.1)
    ours = PlateauState(schedule, Monitor(mode=mode))  # type: ignore[arg-type]
    for step in range(60):
        value = 10 + math.sin(step / 3) * 5 * (1 if step < 20 else 0.01)
        before = ours.factor
        assert ours.step(value) == (ours.factor < before)
        peer.step(value)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]["lr"])
    copy = PlateauState(schedule, Monitor(mode=mode))  # type: ignore[arg-type]
    copy.load(ours.state())
    assert copy.state() == ours.state()


def test_nan_is_never_better() -> None:
    assert not better(math.nan, None, Monitor())
    assert not better(math.nan, 1.0, Monitor())
    assert better(1.0, None, Monitor()) and better(0.5, 1.0, Monitor()) and not better(1.0, 1.0, Monitor())
    assert better(2.0, 1.0, Monitor(mode="max"))
