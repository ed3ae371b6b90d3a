"""What values a searched setting may have.

| kind | values |
|---|---|
| `uniform` | numbers from `low` to `high` |
| `loguniform` | the same, evenly over their logarithm: learning rates, weights of a loss |
| `integer` | whole numbers from `low` to `high`, both included; evenly over the logarithm with `log: true` |
| `choice` | those of a list; or of a mapping, whose names stand for values that are sections themselves |

With `when: {OTHER: VALUE}` (or a list of values) a dimension exists only where another one, listed before it, has
that value: the size of a codebook where the codebook is learnt, the levels where it is a grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vaedist.config.settings import Strict
from vaedist.core.errors import UserError

Setting = bool | int | float | str
"""A value of a dimension as the record holds it; a choice among sections is held by name."""


class _Dimension(Strict):
    when: dict[str, Any] = Field(
        default_factory=dict,
        description="Another dimension to the value, or list of values, with which this one exists.",
    )

    def exists(self, settings: Mapping[str, Setting]) -> bool:
        """Whether the dimension is there beside those settings."""
        return all(
            name in settings and settings[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )


class _Range(_Dimension):
    low: float
    high: float
    points: int | None = Field(None, ge=2, description="How many of them a grid takes; no other search does.")

    @model_validator(mode="after")
    def _rises(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self

    def grid(self) -> tuple[float, ...]:
        """`points` values, evenly spread.

        Raises:
            UserError: there is no `points`.
        """
        if self.points is None:
            raise UserError("a grid needs the number of values: give it `points`, or make it a choice")
        share = [step / (self.points - 1) for step in range(self.points)]
        return tuple(self.at(part) for part in share)

    def at(self, part: float) -> float:
        """The value at a share of the way from low (0) to high (1)."""
        return self.low + part * (self.high - self.low)


class Uniform(_Range):
    """Numbers, evenly."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """Numbers, evenly over the logarithm."""

    kind: Literal["loguniform"] = "loguniform"

    @model_validator(mode="after")
    def _positive(self) -> LogUniform:
        if self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be above 0, where a logarithm begins")
        return self

    def at(self, part: float) -> float:
        if part in (0.0, 1.0):
            return self.high if part else self.low
        return math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))


class Integer(_Dimension):
    """Whole numbers."""

    kind: Literal["integer"] = "integer"
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _rises(self) -> Integer:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low < 1:
            raise ValueError(f"low ({self.low}) must be 1 or more where log is true")
        return self

    def grid(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(self.low, self.high + 1))

    def at(self, part: float) -> int:
        """The value at a share of [0, 1): every one has an equal part (of the logarithm, with `log`)."""
        if not self.log:
            return min(self.high, self.low + int(part * (self.high - self.low + 1)))
        low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
        return max(self.low, min(self.high, round(math.exp(low + part * (high - low)))))


class Categorical(_Dimension):
    """One of several."""

    kind: Literal["choice"] = "choice"
    values: list[Any] | dict[str, Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Categorical:
        if isinstance(self.values, list) and len(self.options) < len(self.values):
            raise ValueError("a value stands there twice")
        return self

    @property
    def options(self) -> dict[Setting, Any]:
        """How the record names a value, to the value."""
        if isinstance(self.values, dict):
            return dict(self.values.items())
        return {
            value if isinstance(value, bool | int | float | str) else json.dumps(value): value
            for value in self.values
        }

    def grid(self) -> tuple[Setting, ...]:
        """All of them."""
        return tuple(self.options)

    def at(self, part: float) -> Setting:
        """The value at a share of [0, 1)."""
        names = self.grid()
        return names[min(len(names) - 1, int(part * len(names)))]


Dimension = Annotated[Uniform | LogUniform | Integer | Categorical, Field(discriminator="kind")]
