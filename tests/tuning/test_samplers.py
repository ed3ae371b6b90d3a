"""Proposals: a function of the record alone, better than chance where there is something to learn."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.spaces import ended, small_space
from vaedist.tuning.samplers import propose
from vaedist.tuning.space import Space
from vaedist.tuning.trial_log import Trial

X = {"model.beta.end": {"kind": "uniform", "low": 0.0, "high": 1.0}}
ONE = [{"metric": "mse"}]


def search(space: Space, count: int, value: Any) -> list[Trial]:
    """Trials one after the other, each with the number that `value` gives its settings."""
    known: list[Trial] = []
    for number in range(count):
        settings = propose(space, number, known)
        assert settings is not None
        known.append(ended(number, settings, **value(settings)))
    return known


def bowl(settings: dict[str, Any]) -> dict[str, float]:
    return {"mse": (settings["model.beta.end"] - 0.3) ** 2}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_the_same_record_gives_the_same_proposal(kind: str) -> None:
    space = small_space(dimensions=X, objectives=ONE, search={"kind": kind})
    whole = search(space, 12, bowl)
    assert [propose(space, number, whole[:number]) for number in range(12)] == [
        trial.settings for trial in whole
    ]
    assert len({str(trial.settings) for trial in whole}) == 12
    other = small_space(dimensions=X, objectives=ONE, search={"kind": kind, "seed": 1})
    assert propose(other, 0, []) != whole[0].settings


def test_tpe_learns_where_it_is_good() -> None:
    def late(kind: str) -> float:
        space = small_space(dimensions=X, objectives=ONE, search={"kind": kind})
        found = search(space, 30, bowl)[15:]
        return sum(abs(trial.settings["model.beta.end"] - 0.3) for trial in found) / len(found)

    assert late("tpe") < 0.5 * late("random")


def test_tpe_learns_the_front_of_two_objectives() -> None:
    dimensions = X | {"model.latent": {"kind": "choice", "values": [2, 4]}}

    def values(settings: dict[str, Any]) -> dict[str, float]:
        wrong = 5.0 * (settings["model.latent"] == 2)
        x = settings["model.beta.end"]
        return {"rate": x + wrong, "distortion": 1 - x + wrong}

    found = search(small_space(dimensions=dimensions), 24, values)[12:]
    assert sum(trial.settings["model.latent"] == 4 for trial in found) >= 9


def test_what_is_being_tried_now_is_not_tried_again() -> None:
    space = small_space(dimensions=X, objectives=ONE)
    known = search(space, 10, bowl)
    first = propose(space, 10, known)
    assert first is not None
    second = propose(space, 11, [*known, Trial(10, first)])
    third = propose(space, 11, known)
    assert second != third, "a running trial counts"


def test_failed_trials_are_no_observations() -> None:
    space = small_space(dimensions=X, objectives=ONE, search={"kind": "tpe", "startup": 3})
    failed = [ended(number, {"model.beta.end": 0.5}, "failed") for number in range(5)]
    drawn = small_space(dimensions=X, objectives=ONE, search={"kind": "random"})
    assert propose(space, 5, failed) == propose(drawn, 5, []), "nothing was learnt yet: a random draw"
    known = [*failed, *(ended(5 + n, {"model.beta.end": n / 4}, mse=float(n)) for n in range(4))]
    found = propose(space, 9, known)
    assert found is not None and 0 <= found["model.beta.end"] <= 1


def test_dimensions_that_are_not_there_are_not_proposed() -> None:
    dimensions = {
        "model.latent": {"kind": "choice", "values": [2, 4]},
        "model.beta.end": {"kind": "uniform", "low": 0, "high": 1, "when": {"model.latent": 4}},
    }
    space = small_space(dimensions=dimensions, objectives=ONE)
    found = search(space, 16, lambda settings: {"mse": settings.get("model.beta.end", 0.5)})
    for trial in found:
        assert ("model.beta.end" in trial.settings) == (trial.settings["model.latent"] == 4)
    assert {trial.settings["model.latent"] for trial in found} == {2, 4}


def test_a_grid_ends() -> None:
    dimensions = {"model.beta.end": {"kind": "loguniform", "low": 0.01, "high": 100.0, "points": 5}}
    space = small_space(dimensions=dimensions, objectives=ONE, search={"kind": "grid"})
    found = [propose(space, number, []) for number in range(6)]
    values = [one["model.beta.end"] for one in found if one]
    assert [math.log10(float(value)) for value in values] == pytest.approx([-2, -1, 0, 1, 2])
    assert found[5] is None
