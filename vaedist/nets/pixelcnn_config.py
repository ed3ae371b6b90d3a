"""Settings of `vaedist.nets.pixelcnn`, importable without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from vaedist.config.settings import Strict, overridable


class PixelCnn(Strict):
    """Size of a gated PixelCNN."""

    width: int = Field(64, ge=1, description="Channels of each stack.")
    layers: int = Field(12, ge=2, description="Gated layers, the first one (type A) included.")
    first: int = Field(7, ge=3, description="Kernel of the first layer, odd; later ones have 3.")
    dilations: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2, 4), min_length=1, description="Of the layers after the first, over and over."
    )
    hidden: int = Field(128, ge=1, description="Units between the horizontal stack and the logits.")
    dropout: float = overridable(0.1, ge=0, lt=1, description="In both stacks.")

    @field_validator("first")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd (it is {value})")
        return value
