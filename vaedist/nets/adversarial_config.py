"""Settings of `vaedist.nets.adversarial`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vaedist.config.settings import Strict, overridable
from vaedist.nets.bodies_config import Body, Resnet

Augmentation = Literal["color", "translation", "cutout"]


class Adversary(Strict):
    """Settings of the game, for a variant's `Config` to inherit."""

    discriminator: Body = Resnet(width=64, depth=1, norm="none")
    gan_loss: Literal["ns", "bce", "wgan_clip", "relativistic"] = "ns"
    label_smoothing: float = overridable(
        0.0, ge=0, lt=0.5, description="Of `bce`: real images count as real by 1 less this."
    )
    weight_clip: float = overridable(
        0.01, gt=0, description="Of `wgan_clip`: largest weight of the discriminator."
    )
    r1: float = overridable(0.1, ge=0, description="Weight gamma of R1; 0: none.")
    r1_every: int = overridable(16, ge=1, description="R1 is taken at every n-th turn of the discriminator.")
    spectral_norm: bool = Field(False, description="Divide the discriminator's weights by their norm.")
    diffaugment: tuple[Augmentation, ...] = overridable(
        (), description="Of all that the discriminator sees; for small sets."
    )

    @model_validator(mode="after")
    def _rules_of_the_game(self) -> Adversary:
        if self.label_smoothing > 0 and self.gan_loss != "bce":
            raise ValueError(
                f"label_smoothing belongs to gan_loss bce: set it to 0 (gan_loss is {self.gan_loss})"
            )
        if self.gan_loss == "wgan_clip" and (self.r1 > 0 or self.spectral_norm):
            other = "spectral_norm=false" if self.spectral_norm else "r1=0"
            raise ValueError(f"gan_loss wgan_clip bounds the discriminator by itself: set model.{other}")
        return self
