"""Settings of `vaedist.models.vaegan`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vaedist.config.loss_weights import Weight
from vaedist.config.settings import OVERRIDE
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig
from vaedist.nets.adversarial_config import Adversary


class Config(GaussianAutoencoderConfig, Adversary):
    """Settings of `kind: vaegan`."""

    kind: Literal["vaegan"] = "vaegan"
    beta: Weight = Field(1.0, description="Weight of the rate.", json_schema_extra=OVERRIDE)
    style: float = Field(
        0.01, ge=0, description="Weight of S against the game, for the decoder.", json_schema_extra=OVERRIDE
    )
    pixel: float = Field(0.0, ge=0, description="Weight of the distortion.", json_schema_extra=OVERRIDE)
