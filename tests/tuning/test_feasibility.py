"""Before anything starts: objectives that the base model has not, and rungs that lie after every schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.spaces import DIMENSIONS, MODEL, TRAIN, small_space
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.tuning.feasibility import check_settings, plan_search, schedules_end

MLP = MODEL["encoder"]
GAN = {"kind": "gan", "generator": MLP, "latent": 4}
GAN_TRAIN = TRAIN | {"optim": {"discriminator": {}, "generator": {"start": 8}}, "monitor": {"metric": "kid"}}
VQ = {"kind": "vqvae", "encoder": {"kind": "conv", "width": 8, "depth": 0, "downsample": 4}}
RATE = {"train.optim.main.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}


@pytest.fixture(scope="module")
def index(phantom: Path) -> Index:
    return Index.open(phantom)


def base(model: dict[str, Any], train: dict[str, Any] = TRAIN) -> dict[str, Any]:
    return {"base": {"model": model, "train": train}, "dimensions": RATE}


LACKING: dict[str, tuple[dict[str, Any], str, str]] = {
    "a VQ-VAE draws nothing": (base(VQ), "kid", "sample is not defined, because this run has no prior"),
    "a GAN reconstructs nothing": (base(GAN, GAN_TRAIN), "ssim", "a GAN has no encoder"),
    "a VAE has no codes": (base(MODEL), "bits_per_image", "codes is not defined"),
    "a VQ-VAE has no rate": (base(VQ), "rate", "the model has the terms"),
    "points have no rate": (
        base({"kind": "infovae", "encoder": MLP, "latent": 2, "alpha": 1, "deterministic": True}),
        "rate",
        "the model has the terms",
    ),
    "points have no bound": (
        base({"kind": "infovae", "encoder": MLP, "latent": 2, "alpha": 1, "deterministic": True}),
        "iwae",
        "a deterministic encoder has no bound",
    ),
    "grey images have no Bernoulli": (
        base(MODEL),
        "iwae",
        "its likelihood is no probability of these images",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_an_objective_that_the_model_has_not_is_told_before_anything_starts(name: str, index: Index) -> None:
    changes, metric, told = LACKING[name]
    with pytest.raises(UserError) as error:
        plan_search(small_space(objectives=[{"metric": metric}], **changes), index)
    assert f"the objective {metric} does not fit its base job" in str(error.value)
    assert told in str(error.value)


def test_a_proper_likelihood_has_a_bound(index: Index) -> None:
    logistic = MODEL | {"likelihood": {"kind": "logistic"}}
    plan_search(small_space(objectives=[{"metric": "iwae"}], **base(logistic)), index)
    black_and_white = base(MODEL)
    black_and_white["base"]["data"] = {"binarise": "static"}
    plan_search(small_space(objectives=[{"metric": "iwae"}], **black_and_white), index)


def test_the_longest_schedule_of_any_trial_counts(index: Index) -> None:
    steps = {"model.beta.steps": {"kind": "integer", "low": 1, "high": 8, "log": True}}
    assert schedules_end(small_space(), index) == 4
    assert schedules_end(small_space(dimensions=DIMENSIONS | steps), index) == 8
    chosen = {"model.beta": {"kind": "choice", "values": {"now": 1.0, "late": {"end": 1.0, "steps": 7}}}}
    assert schedules_end(small_space(dimensions=chosen), index) == 7
    assert schedules_end(small_space(objectives=[{"metric": "kid"}], **base(GAN, GAN_TRAIN)), index) == 8


def test_asha_has_no_rung_before_the_schedules_have_ended(index: Index) -> None:
    asha = {"kind": "asha", "metric": "mse", "reduction": 2, "first": 2}
    space = small_space(scheduler=asha, train={"validate_every": 2})
    assert plan_search(space, index).rungs == (4, 8), "step 2 lies within the ramp of 4 steps"
    late = {"model.beta.steps": {"kind": "integer", "low": 1, "high": 12}}
    with pytest.raises(UserError, match="asha has no rung: the schedules end by step 12"):
        plan_search(small_space(scheduler=asha, dimensions=DIMENSIONS | late), index)


def test_trials_that_end_before_their_schedules_are_doubted(index: Index) -> None:
    assert plan_search(small_space(), index).warning == ""
    assert plan_search(small_space(train={"steps": 4}), index).warning == "", "the ramp ends with the trial"
    assert plan_search(small_space(train={"steps": 3}), index).warning == (
        "a trial of space 'small' has 3 steps, but weights of the loss move, or a phase begins, until step 4: its "
        "numbers will not be those of its settings; for more than a try set train.steps to well above 4, or shorten "
        "the schedules"
    )
    searched = {"model.beta.steps": {"kind": "integer", "low": 1, "high": 40}}
    assert "until step 40:" in plan_search(small_space(dimensions=DIMENSIONS | searched), index).warning
    warm = {"optim": {"main": {"schedule": {"kind": "cosine", "warmup": 12}}}}
    assert (
        "but the learning rate of 'main' warms up for 12 steps:"
        in plan_search(small_space(train=warm), index).warning
    )


def test_settings_that_make_no_model_are_found_without_training(index: Index) -> None:
    conv = MODEL | {"encoder": {"kind": "conv", "width": 8, "downsample": 4}}
    sizes = {"model.encoder.downsample": {"kind": "choice", "values": [4, 5]}}
    space = small_space(dimensions=sizes, base={"model": conv, "train": TRAIN})
    check_settings(space, {"model.encoder.downsample": 4}, index)
    with pytest.raises(UserError, match="downsample"):
        check_settings(space, {"model.encoder.downsample": 5}, index)
