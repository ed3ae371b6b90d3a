"""Successive halving: where the rungs are, who goes on, and that rising weights are never compared."""

from __future__ import annotations

import pytest

from vaedist.tuning.asha import rungs, should_continue
from vaedist.tuning.space import Asha
from vaedist.tuning.trial_log import Trial


def there(*values: float, step: int = 10) -> list[Trial]:
    return [Trial(number, {}, rungs={step: value}) for number, value in enumerate(values)]


def test_rungs_are_validations_below_the_length() -> None:
    asha = Asha(metric="mse", reduction=3)
    assert rungs(asha, 900, 50, 0) == (100, 300)
    assert rungs(asha, 900, 250, 0) == (250, 500)
    assert rungs(Asha(metric="mse", reduction=2, first=10), 100, 10, 0) == (10, 20, 40, 80)


def test_a_rung_before_the_schedules_end_is_left_out() -> None:
    asha = Asha(metric="mse", reduction=3)
    assert rungs(asha, 900, 50, 100) == (100, 300)
    assert rungs(asha, 900, 50, 101) == (300,)
    assert rungs(asha, 900, 50, 301) == ()


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_the_best_of_each_three_go_on(mode: str, sign: float) -> None:
    asha = Asha(metric="mse", mode=mode, reduction=3)
    assert should_continue(asha, 10, sign * 9.0, []), "alone"
    assert should_continue(asha, 10, sign * 9.0, there(sign * 1.0)), "two are fewer than three"
    assert not should_continue(asha, 10, sign * 9.0, there(sign * 1.0, sign * 2.0))
    assert should_continue(asha, 10, sign * 0.5, there(sign * 1.0, sign * 2.0))
    five = there(*(sign * value for value in (1.0, 2.0, 3.0, 4.0, 5.0)))
    assert should_continue(asha, 10, sign * 1.5, five), "two of six go on"
    assert not should_continue(asha, 10, sign * 2.5, five)


def test_only_those_that_were_at_the_rung_count() -> None:
    asha = Asha(metric="mse", reduction=2)
    assert should_continue(asha, 20, 9.0, there(1.0, 1.0, 1.0, step=10))
    assert not should_continue(asha, 20, 9.0, there(1.0, step=20))
