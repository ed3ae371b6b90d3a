"""Settings of `vaedist.nets.divergences`, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vaedist.config.settings import Strict


class _Kernel(Strict):
    block: int | None = Field(
        None,
        ge=2,
        description="Compare in blocks of so many rows, in linear time; none: every row with every other.",
    )


class Imq(_Kernel):
    """Inverse multiquadratics of several scales."""

    kind: Literal["imq"] = "imq"
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.1, 0.2, 0.5, 1, 2, 5, 10), min_length=1)
    bandwidth: float = Field(1.0, gt=0, description="w: 1 suits a standard normal prior.")


class Rbf(_Kernel):
    """A Gaussian kernel."""

    kind: Literal["rbf"] = "rbf"
    bandwidth: float = Field(1.0, gt=0, description="w: 1 suits a standard normal prior.")


class Legacy(_Kernel):
    """The biased kernel of earlier systems, for comparison only."""

    kind: Literal["legacy"] = "legacy"


KernelConfig = Annotated[Imq | Rbf | Legacy, Field(discriminator="kind")]
