"""Settings of `vaedist.nets.transformer`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vaedist.config.settings import Strict, overridable


class Transformer(Strict):
    """Size of a causal transformer."""

    width: int = Field(192, ge=1, description="Of the residual stream.")
    layers: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    expand: int = Field(4, ge=1, description="Units of each MLP / width.")
    positions: Literal["learned", "rotary", "both"] = "both"
    dropout: float = overridable(0.1, ge=0, lt=1, description="Of what attention and MLP add.")

    @model_validator(mode="after")
    def _divides(self) -> Transformer:
        parts = self.heads * (1 if self.positions == "learned" else 4)
        if self.width % parts:
            factors = "heads" if self.positions == "learned" else "4 * heads (rotary pairs along two axes)"
            raise ValueError(f"width ({self.width}) must be a multiple of {factors} = {parts}")
        return self
