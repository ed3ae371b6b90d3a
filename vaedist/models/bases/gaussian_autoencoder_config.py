"""Settings that autoencoders with a Gaussian latent share, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from vaedist.config.settings import NUMBER, Strict, number_or, overridable
from vaedist.nets.bodies_config import Body, Conv
from vaedist.nets.conditioning_config import Condition
from vaedist.nets.likelihoods_config import BernoulliLikelihood, LikelihoodConfig


class MapLatent(Strict):
    """A latent at each position of the encoder's grid."""

    kind: Literal["map"] = "map"
    channels: int = Field(ge=1)


Latent = Annotated[
    Annotated[Annotated[int, Field(ge=1)], Tag(NUMBER)] | Annotated[MapLatent, Tag("map")], number_or("map")
]


class GaussianAutoencoderConfig(Strict):
    """What the variants share; each adds its `kind` and the weights of its loss."""

    encoder: Body = Conv()
    decoder: Body | None = Field(None, description="Default: as the encoder, mirrored.")
    latent: Latent = Field(32, description="Dimensions of z, or `{kind: map, channels: n}`.")
    likelihood: LikelihoodConfig = BernoulliLikelihood()
    condition: Condition | None = Field(None, description="How class labels enter; none: they do not.")
    start_sigma: float = Field(
        1.0,
        gt=0,
        description="What the standard deviation of q(z | x) starts around; the encoder learns the rest.",
    )
    dssim: float = overridable(0.0, ge=0, description="Weight of pixels * (1 - SSIM) / 2.")
