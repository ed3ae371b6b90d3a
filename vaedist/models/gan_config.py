"""Settings of `vaedist.models.gan`, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from vaedist.config.settings import NUMBER, number_or
from vaedist.models.bases.gaussian_autoencoder_config import MapLatent
from vaedist.nets.adversarial_config import Adversary
from vaedist.nets.bodies_config import Body, Conv


class Config(Adversary):
    """Settings of `kind: gan`."""

    kind: Literal["gan"] = "gan"
    generator: Body = Conv()
    latent: Annotated[
        Annotated[Annotated[int, Field(ge=1)], Tag(NUMBER)] | Annotated[MapLatent, Tag("map")],
        number_or("map"),
    ] = Field(32, description="Dimensions of z, or `{kind: map, channels: n}`.")
    output: Literal["tanh", "sigmoid_logits", "linear"] = Field(
        "tanh", description="How the generator's numbers are read as an image."
    )
