"""Objectives mean the same at every setting, or are refused; fronts and knees of known points."""

from __future__ import annotations

from typing import Any

import pytest

from tests.spaces import DIMENSIONS, ended, small_space
from vaedist.core.errors import UserError
from vaedist.evaluation.metrics.image_quality import NAMES
from vaedist.evaluation.metrics.sample_metrics import SAMPLE_METRICS
from vaedist.tuning.objectives import METRICS, best_trial, check_objectives, pareto_front, value_of, values_of
from vaedist.tuning.space import load_space, shipped
from vaedist.tuning.trial_log import Trial

LIKELIHOOD = {"model.likelihood.kind": {"kind": "choice", "values": ["bernoulli", "gaussian"]}}
ASHA = {"kind": "asha", "metric": "mse"}


def test_the_table_agrees_with_the_metrics_that_it_names() -> None:
    samples = {name for name, metric in METRICS.items() if metric.part == "samples"}
    assert all(METRICS[name].mode == SAMPLE_METRICS[name] for name in samples)
    pictures = {name for name, metric in METRICS.items() if metric.part == "reconstructions"}
    assert pictures <= set(NAMES)


@pytest.mark.parametrize("name", shipped())
def test_shipped_spaces_ask_for_numbers_that_mean_the_same_everywhere(name: str) -> None:
    check_objectives(load_space(name))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the loss": ({"objectives": [{"metric": "loss"}]}, "the loss cannot be an objective"),
    "a typing mistake": ({"objectives": [{"metric": "ssim_foregrund"}]}, "did you mean 'ssim_foreground'"),
    "the wrong way": ({"objectives": [{"metric": "kid", "mode": "max"}]}, "of kid the minimum is best"),
    "distortions of two likelihoods": (
        {"dimensions": DIMENSIONS | LIKELIHOOD},
        "distortion means another thing at each model.likelihood.kind",
    ),
    "bounds of two encoders": (
        {
            "objectives": [{"metric": "iwae"}],
            "dimensions": {"model.deterministic": {"kind": "choice", "values": [True, False]}},
        },
        "iwae means another thing at each model.deterministic",
    ),
    "reconstructions of two tasks": (
        {
            "objectives": [{"metric": "ssim"}],
            "dimensions": {"augment": {"kind": "choice", "values": {"no": {}, "yes": {"denoise": True}}}},
        },
        "ssim means another thing at each augment",
    ),
    "halved by the loss": (
        {"scheduler": {"kind": "asha", "metric": "loss"}},
        "scheduler.metric 'loss' is no number of validation that means the same",
    ),
    "halved after unequal lengths": (
        {"scheduler": ASHA, "dimensions": {"train.batch_size": {"kind": "choice", "values": [4, 8]}}},
        "so train.batch_size cannot be searched",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_gamed_is_refused(name: str) -> None:
    changes, told = REFUSED[name]
    with pytest.raises(UserError) as error:
        check_objectives(small_space(**changes))
    assert told in str(error.value)


def test_a_likelihood_may_be_searched_where_pictures_decide() -> None:
    check_objectives(
        small_space(dimensions=LIKELIHOOD, objectives=[{"metric": "ssim_foreground"}, {"metric": "kid"}])
    )


def trials(*points: tuple[float, float]) -> list[Trial]:
    return [
        ended(number, {}, rate=rate, distortion=distortion)
        for number, (rate, distortion) in enumerate(points)
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    space = small_space()
    held = trials((1, 10), (2, 5), (3, 5), (10, 1), (2, 5), (11, 11))
    assert [trial.number for trial in pareto_front(space, held)] == [0, 1, 4, 3]
    ssim = small_space(objectives=[{"metric": "ssim"}, {"metric": "bits_per_image"}])
    pair = [ended(0, {}, ssim=0.9, bits_per_image=10), ended(1, {}, ssim=0.8, bits_per_image=10)]
    assert pareto_front(ssim, pair) == pair[:1], "more similar is better, of equal size"


def test_the_knee_is_near_the_best_of_everything() -> None:
    held = trials((0, 100), (1, 20), (15, 15), (50, 0))
    assert best_trial(small_space(), held) is held[1]
    assert best_trial(small_space(pick="rate"), held) is held[0]
    assert best_trial(small_space(pick="distortion"), held) is held[3]
    assert best_trial(small_space(), []) is None


def test_one_objective_has_a_best() -> None:
    space = small_space(objectives=[{"metric": "kid"}])
    held = [ended(number, {}, **{"kid[vd-12345678]": value}) for number, value in enumerate((0.3, -0.1, 0.2))]
    assert best_trial(space, held) is held[1]
    assert value_of(held[0].measures, "kid") == 0.3


def test_trials_that_were_trained_less_are_not_best() -> None:
    space = small_space(objectives=[{"metric": "mse"}])
    held = [
        ended(0, {}, mse=0.5),
        ended(1, {}, "stopped early", mse=0.1),
        ended(2, {}, "failed"),
        Trial(3, {}),
        ended(4, {}, mse=float("nan")),
    ]
    assert best_trial(space, held) is held[0]
    assert [values_of(space, trial) for trial in held] == [[0.5], [0.1], None, None, None]
