"""Settings of `vaedist.nets.conditioning`, importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vaedist.config.settings import Strict


class Condition(Strict):
    """How labels enter a model."""

    label: Literal["embedding", "one_hot"] = "embedding"
    size: int | None = Field(None, ge=1, description="Numbers in an embedding; default: 16.")
    factor: float = Field(1.0, gt=0, description="On the code.")
    how: Literal["film", "concat"] = "film"
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of labels dropped in training.")
    prior: Literal["standard", "per_class"] = "standard"

    @model_validator(mode="after")
    def _one_hot_has_its_size(self) -> Condition:
        if self.label == "one_hot" and self.size is not None:
            raise ValueError("size is for `label: embedding`; a one-hot code is as long as there are classes")
        return self
