"""Settings of `vaedist.models.gan`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vaedist.models.bases.gaussian_autoencoder_config import Latent
from vaedist.nets.adversarial_config import Adversary
from vaedist.nets.bodies_config import Body, Conv


class Config(Adversary):
    """Settings of `kind: gan`."""

    kind: Literal["gan"] = "gan"
    generator: Body = Conv()
    latent: Latent = Field(32, description="Dimensions of z, or `{kind: map, channels: n}`.")
    output: Literal["tanh", "sigmoid_logits", "linear"] = Field(
        "tanh", description="How the generator's numbers are read as an image."
    )
