"""Settings of `vaedist.nets.likelihoods`, importable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from vaedist.config.settings import Strict, overridable


class BernoulliLikelihood(Strict):
    """Each value is a coin flip."""

    kind: Literal["bernoulli"] = "bernoulli"


class GaussianLikelihood(Strict):
    """Squared error."""

    kind: Literal["gaussian"] = "gaussian"
    sigma: Annotated[float, Field(gt=0)] | Literal["data", "learned", "predicted", "optimal"] = overridable(
        "data",
        description="Standard deviation on the [0, 1] scale; `data`: that of the training images; `learned`: a "
        "trained number; `predicted`: from the decoder; `optimal`: the best one of each global batch.",
    )


class LaplaceLikelihood(Strict):
    """Absolute error."""

    kind: Literal["laplace"] = "laplace"
    scale: float = overridable(0.1, gt=0, description="Mean absolute deviation on the [0, 1] scale.")


class LogisticLikelihood(Strict):
    """Probabilities of the 256 levels."""

    kind: Literal["logistic"] = "logistic"
    components: int = Field(1, ge=1, description="Logistics in the mixture.")
    scale: Literal["predicted", "learned"] = Field(
        "predicted", description="From the decoder for each value, or one trained number per channel."
    )

    def outputs(self, channels: int) -> int:
        """Channels of the decoder for images of `channels`: weights, means, scales and couplings."""
        return sum(self.sections(channels))

    def sections(self, channels: int) -> tuple[int, int, int, int]:
        """Decoder channels that hold weights, means, scales and couplings, in this order."""
        parts = self.components * channels
        return (
            self.components if self.components > 1 else 0,
            parts,
            parts if self.scale == "predicted" else 0,
            self.components * math.comb(channels, 2),
        )


LikelihoodConfig = Annotated[
    BernoulliLikelihood | GaussianLikelihood | LaplaceLikelihood | LogisticLikelihood,
    Field(discriminator="kind"),
]
