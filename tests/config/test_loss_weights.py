"""Loss weights: every schedule's values by step, what validation sees, and mistakes in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from vaedist.config.loss_weights import Cyclical, Ramp, Weight, ramp_end, weight_at
from vaedist.config.settings import Strict, parse
from vaedist.core.errors import UserError


def test_ramps() -> None:
    ramp = Ramp(start=1.0, end=3.0, steps=4)
    assert [ramp.at(step) for step in (0, 1, 2, 4, 100)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    assert weight_at(ramp, 1, training=True) == 1.5
    assert weight_at(ramp, 1, training=False) == 3.0  # validation always sees the final weight
    assert weight_at(0.25, 1, training=True) == weight_at(0.25, 1, training=False) == 0.25
    assert ramp_end(0.1, ramp, Ramp(steps=9), Cyclical(period=5, cycles=3)) == 15
    assert ramp_end(0.1, 2.0) == 0


class Weighted(Strict):
    beta: Weight = 1.0


def weight(section: object) -> Any:
    return parse(Weighted, {"beta": section}, "job.yaml", "model").beta


@pytest.mark.parametrize(
    ("section", "steps", "values"),
    [
        (2, (0, 9), (2, 2)),
        ("1e-3", (0, 9), (1e-3, 1e-3)),
        ({"start": 1, "end": 3, "steps": 4}, (0, 1, 3, 4, 9), (1, 1.5, 2.5, 3, 3)),
        ({"kind": "linear", "steps": 4}, (0, 1, 4), (0, 0.25, 1)),
        ({"kind": "linear", "start": 4, "end": 2, "steps": 2}, (0, 1, 2, 3), (4, 3, 2, 2)),
        ({"kind": "cosine", "end": 2, "steps": 6}, (0, 1, 2, 3, 6, 7), (0, 1 - 0.75**0.5, 0.5, 1, 2, 2)),
        (
            {"kind": "steps", "start": 1, "end": 3, "steps": 9, "stairs": 3},
            range(11),
            [1] * 3 + [5 / 3] * 3 + [7 / 3] * 3 + [3] * 2,
        ),
        (
            {"kind": "cyclical", "end": 4, "period": 8, "cycles": 2},
            range(19),
            [*(cycle := [0, 1, 2, 3, 4, 4, 4, 4]), *cycle, 4, 4, 4],
        ),
        (
            {"kind": "cyclical", "start": 1, "end": 3, "period": 4, "cycles": 1, "rise": 1},
            range(6),
            [1, 1.5, 2, 2.5, 3, 3],
        ),
    ],
)
def test_weights_change_by_optimizer_step(
    section: object, steps: Sequence[int], values: Sequence[float]
) -> None:
    one = weight(section)
    assert [weight_at(one, step, training=True) for step in steps] == pytest.approx(values)
    assert weight_at(one, 0, training=False) == weight_at(one, 10**9, training=True)
    assert weight_at(one, ramp_end(one), training=True) == weight_at(one, 10**9, training=True)
    assert weight(Weighted(beta=one).model_dump(mode="json")["beta"]) == one


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (-1, "model.beta: input should be greater than or equal to 0 (it is -1)"),
        (
            "much",
            "model.beta: input should be a number (it is 'much')",
        ),
        (
            {"end": 4, "stepz": 9},
            "unknown key 'model.beta.stepz'; did you mean 'steps'? Valid: end, kind, start,",
        ),
        ({"kind": "cosine", "end": 4}, "the key 'model.beta.steps' is missing"),
        ({"kind": "cyclical", "steps": 4}, "unknown key 'model.beta.steps'"),
        (
            {"kind": "cosin", "steps": 4},
            "model.beta: there is no kind 'cosin': give a number or one of 'linear', ",
        ),
    ],
)
def test_a_wrong_weight_is_one_sentence(section: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        weight(section)
    assert message in str(caught.value)
