"""Settings of `vaedist.models.vae`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vaedist.config.loss_weights import Weight
from vaedist.config.settings import OVERRIDE
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig


class Config(GaussianAutoencoderConfig):
    """Settings of `kind: vae`."""

    kind: Literal["vae"] = "vae"
    beta: Weight = Field(1.0, description="Weight of the rate.", json_schema_extra=OVERRIDE)
    free_bits: float = Field(
        0.0, ge=0, description="Nats per latent dimension without a price.", json_schema_extra=OVERRIDE
    )
    num_importance: int = Field(
        1, ge=1, description="Latents drawn per image; more give a tighter bound.", json_schema_extra=OVERRIDE
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Config:
        if self.free_bits > 0 and self.num_importance > 1:
            raise ValueError(
                "free_bits change the KL term, and the bound of num_importance has none: give one of them"
            )
        return self
