"""Settings of `vaedist.models.infovae`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vaedist.config.settings import overridable
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig
from vaedist.nets.divergences_config import Imq, KernelConfig


class Config(GaussianAutoencoderConfig):
    """Settings of `kind: infovae`."""

    kind: Literal["infovae"] = "infovae"
    alpha: float = overridable(0.0, le=1, description="1 minus the weight of the rate.")
    mmd_weight: float = overridable(1000.0, ge=0, description="lambda.")
    kernel: KernelConfig = overridable(Imq())
    deterministic: bool = Field(False, description="An encoder without a variance; where alpha is 1.")

    @model_validator(mode="after")
    def _weights_fit(self) -> Config:
        if self.alpha + self.mmd_weight < 1:
            raise ValueError(
                f"the MMD's weight alpha + mmd_weight - 1 is negative ({self.alpha:g} + {self.mmd_weight:g} - 1): "
                "raise mmd_weight"
            )
        if self.deterministic and self.alpha != 1:
            raise ValueError(
                f"a deterministic encoder has no KL term, which alpha {self.alpha:g} would weigh by "
                f"{1 - self.alpha:g}: set alpha to 1, or deterministic to false"
            )
        return self
