"""Asynchronous successive halving: trials that are behind at a rung do not go on.

Rungs lie at steps `first * reduction^k`, moved up to the next validation, below the trial's length. At a rung a trial's
value is compared with those of all trials that have been there before, and it goes on only if it is among the best 1 of
`reduction` of them, itself counted; while fewer than `reduction` have been there, everybody goes on. Nobody waits for
anybody. Li et al.: A system for massively parallel hyperparameter tuning (2020), the stopping variant.

Two rules keep the comparison fair. A rung that lies before the end of any trial's schedules is left out: a trial whose
weights are still rising would look better than it is. And all trials are compared after the same number of steps, so
what decides how many steps there are, or when they are validated, is not searched.

The values come from the record, so a search that goes on after a kill judges as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence

from vaedist.tuning.space import Asha
from vaedist.tuning.trial_log import Trial


def rungs(asha: Asha, length: int, every: int, schedules_end: int) -> tuple[int, ...]:
    """The steps at which trials are compared.

    Args:
        asha: The scheduler.
        length: Steps of a whole trial.
        every: Steps between validations.
        schedules_end: The last step at which any trial's loss weights still move.
    """
    found: list[int] = []
    step = asha.first or max(1, length // asha.reduction**2)
    while step < length:
        validated = -(-step // every) * every
        if schedules_end <= validated < length and validated not in found:
            found.append(validated)
        step *= asha.reduction
    return tuple(found)


def should_continue(asha: Asha, step: int, value: float, others: Sequence[Trial]) -> bool:
    """Whether a trial with that value at a rung is trained on.

    Args:
        asha: The scheduler.
        step: The rung.
        value: The trial's.
        others: The other trials; those that have not been there do not count.
    """
    known = [trial.rungs[step] for trial in others if step in trial.rungs]
    if len(known) + 1 < asha.reduction:
        return True
    sign = 1.0 if asha.mode == "min" else -1.0
    better = sum(sign * other < sign * value for other in known)
    return better < max(1, (len(known) + 1) // asha.reduction)
