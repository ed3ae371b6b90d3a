"""Settings of `vaedist.models.vaegan`, importable without torch."""

from __future__ import annotations

from typing import Literal

from vaedist.config.loss_weights import Weight
from vaedist.config.settings import overridable
from vaedist.models.bases.gaussian_autoencoder_config import GaussianAutoencoderConfig
from vaedist.nets.adversarial_config import Adversary


class Config(GaussianAutoencoderConfig, Adversary):
    """Settings of `kind: vaegan`."""

    kind: Literal["vaegan"] = "vaegan"
    beta: Weight = overridable(1.0, description="Weight of the rate.")
    style: float = overridable(0.01, ge=0, description="Weight of S against the game, for the decoder.")
    pixel: float = overridable(0.0, ge=0, description="Weight of the distortion.")
