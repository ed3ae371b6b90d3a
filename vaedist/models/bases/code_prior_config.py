"""Settings that priors over codes share, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vaedist.config.model_section import ModelConfig
from vaedist.config.settings import Strict, free, overridable


class Tokenizer(Strict):
    """What a tokenizer's run is, without its weights. vaedist-train writes it."""

    run: str = free(description="Run or checkpoint; may move as long as its weights are the same.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of its chosen weights.")
    model: ModelConfig = Field(description="Its `model` section.")
    codes: int = Field(ge=1, description="How many different codes there are, K.")
    grid: tuple[int, int] = Field(description="Codes per image, (h, w).")
    binarise: Literal["none", "static", "dynamic", "threshold"] = Field(
        "none", description="Its `data.binarise`."
    )
    seed: int = Field(0, ge=0, description="Its job's, for images binarised statically.")


TokenizerConfig = str | Tokenizer
"""A run, as a person writes it; or what `vaedist-train` makes of it."""


class PriorConfig(Strict):
    """Settings that all priors have."""

    kind: str
    tokenizer: TokenizerConfig = Field(description="The run whose codes are modelled.")
    conditional: bool = Field(False, description="Whether the network gets the class.")
    label_dropout: float = overridable(
        0.1,
        ge=0,
        lt=1,
        description="Part of the labels hidden in training, for samples without a class and for guidance.",
    )
