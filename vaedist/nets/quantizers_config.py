"""Settings of `vaedist.nets.quantizers`, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vaedist.config.settings import Strict, overridable

Estimator = Literal["straight_through", "rotation"]


class _Vectors(Strict):
    codes: int = Field(512, ge=2, description="K.")
    dim: int = Field(64, ge=1, description="D.")
    residual_levels: int = Field(
        1, ge=1, description="Codebooks, each of which quantises what the ones before left over."
    )
    cosine: bool = Field(False, description="Vectors and codes on a sphere: the smallest angle is nearest.")
    estimator: Estimator = overridable("straight_through", description="How the gradient passes the codes.")

    @model_validator(mode="after")
    def _what_is_left_over_is_not_on_the_sphere(self) -> _Vectors:
        if self.cosine and self.residual_levels > 1:
            raise ValueError(
                "cosine codes have no residual levels: leave residual_levels at 1, or cosine at false"
            )
        return self


class EmaCodebook(_Vectors):
    """Running means."""

    kind: Literal["ema"] = "ema"
    decay: float = overridable(0.99, ge=0, lt=1, description="d.")
    expire: float = overridable(
        0.01,
        ge=0,
        lt=1,
        description="A code whose running count is below this part of their mean is dead; 0: never.",
    )


class GradientCodebook(_Vectors):
    """Trained vectors."""

    kind: Literal["gradient"] = "gradient"


class Fsq(Strict):
    """A fixed grid of rounded channels."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (8, 5, 5, 5), min_length=1, description="Values per channel; K is their product."
    )


QuantizerConfig = Annotated[EmaCodebook | GradientCodebook | Fsq, Field(discriminator="kind")]
