"""Settings of `vaedist.models.vae`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from vaedist.config.loss_weights import Weight
from vaedist.config.settings import overridable
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig


class Config(GaussianAutoencoderConfig):
    """Settings of `kind: vae`."""

    kind: Literal["vae"] = "vae"
    beta: Weight = overridable(1.0, description="Weight of the rate.")
    free_bits: float = overridable(0.0, ge=0, description="Nats per latent dimension without a price.")
    num_importance: int = overridable(
        1, ge=1, description="Latents drawn per image; more give a tighter bound."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Config:
        if self.free_bits > 0 and self.num_importance > 1:
            raise ValueError(
                "free_bits change the KL term, and the bound of num_importance has none: give one of them"
            )
        return self
