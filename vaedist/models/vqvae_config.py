"""Settings of `vaedist.models.vqvae`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vaedist.config.settings import Strict, overridable
from vaedist.nets.bodies_config import Body, Resnet
from vaedist.nets.likelihoods_config import GaussianLikelihood, LikelihoodConfig
from vaedist.nets.quantizers_config import EmaCodebook, QuantizerConfig


class Config(Strict):
    """Settings of `kind: vqvae`."""

    kind: Literal["vqvae"] = "vqvae"
    encoder: Body = Resnet()
    decoder: Body | None = Field(None, description="Default: as the encoder, mirrored.")
    codebook: QuantizerConfig = EmaCodebook()
    likelihood: LikelihoodConfig = GaussianLikelihood()
    commitment: float = overridable(0.25, ge=0, description="Weight of the commitment term.")
    dssim: float = overridable(0.0, ge=0, description="Weight of pixels * (1 - SSIM) / 2.")
