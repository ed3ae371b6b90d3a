"""Loss weights, and how they change with the optimizer step.

A weight in a job file is a number, or a section with `start` and `end`:

| kind | from `start` to `end` |
|---|---|
| `linear` | evenly over `steps` steps; the kind where none is named |
| `cosine` | half a cosine over `steps` steps |
| `steps` | `stairs` equal jumps within `steps` steps |
| `cyclical` | `cycles` times, each within a part of `period` steps |
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, Tag

from vaedist.config.settings import NUMBER, Strict, number_or


class _Schedule(Strict):
    """A loss weight that moves from `start` to `end` with the optimizer step.

    Training uses `at(step)`; validation, best, early stopping and everything downstream use `end`, so that no
    loss counts as better only because its weight was still small.
    """

    start: float = Field(0.0, ge=0)
    end: float = Field(1.0, ge=0)

    @property
    def last(self) -> int:
        """The step from which the weight stays at `end`."""
        raise NotImplementedError

    def progress(self, step: int) -> float:
        """Share of the way from `start` (0) to `end` (1)."""
        raise NotImplementedError

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * self.progress(step)


class Ramp(_Schedule):
    """Linear over `steps` steps."""

    kind: Literal["linear"] = "linear"
    steps: int = Field(gt=0)

    @property
    def last(self) -> int:
        return self.steps

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps)


class CosineRamp(_Schedule):
    """Half a cosine over `steps` steps: slow at both ends."""

    kind: Literal["cosine"] = "cosine"
    steps: int = Field(gt=0)

    @property
    def last(self) -> int:
        return self.steps

    def progress(self, step: int) -> float:
        return 0.5 * (1 - math.cos(math.pi * min(1.0, step / self.steps)))


class Staircase(_Schedule):
    """`stairs` equal jumps in `steps` steps, the first after steps / stairs: annealing by epochs is this."""

    kind: Literal["steps"] = "steps"
    steps: int = Field(gt=0)
    stairs: int = Field(20, ge=1)

    @property
    def last(self) -> int:
        return self.steps

    def progress(self, step: int) -> float:
        return min(step, self.steps) * self.stairs // self.steps / self.stairs


class Cyclical(_Schedule):
    """`cycles` times: up linearly in the first `rise` of `period` steps, then at `end`; after the last, at `end`.

    Fu et al., "Cyclical annealing schedule: a simple approach to mitigating KL vanishing", equation 6; they rise
    during half of each of four cycles.
    """

    kind: Literal["cyclical"] = "cyclical"
    period: int = Field(gt=0, description="Steps of one cycle.")
    cycles: int = Field(4, ge=1)
    rise: float = Field(0.5, gt=0, le=1)

    @property
    def last(self) -> int:
        return self.period * self.cycles

    def progress(self, step: int) -> float:
        return 1.0 if step >= self.last else min(1.0, step % self.period / (self.rise * self.period))


Weight = Annotated[
    Annotated[Annotated[float, Field(ge=0)], Tag(NUMBER)]
    | Annotated[Ramp, Tag("linear")]
    | Annotated[CosineRamp, Tag("cosine")]
    | Annotated[Staircase, Tag("steps")]
    | Annotated[Cyclical, Tag("cyclical")],
    number_or("linear"),
]
"""A number, or how it changes: `{start, end, steps}`, linear unless `kind` says cosine, steps or cyclical."""


def weight_at(weight: float | _Schedule, step: int, training: bool) -> float:
    """Value of a (possibly scheduled) loss weight; outside training always the final one."""
    if isinstance(weight, _Schedule):
        return weight.at(step) if training else weight.end
    return weight


def ramp_end(*weights: float | _Schedule) -> int:
    """The step from which every one of these weights has its final value."""
    return max((weight.last for weight in weights if isinstance(weight, _Schedule)), default=0)
