"""The frozen tokenizer inside a prior over codes: the settings that describe it, and the module made from them.

A prior (`reads == "codes"`) says `tokenizer: RUN` in its settings, where RUN is a run of a variant whose `latent` is
`codes`. Before a prior is built, `vaedist.training.tokenizer_codes.resolve_tokenizer` reads that run once, on rank 0,
and replaces its name by what the run is: its settings, how many codes and on which grid, and the sha256 of its
weights. That section is kept in the saved job and the weights travel in the prior's own checkpoint, so a trained
prior opens and samples without the tokenizer's folder; only training reads that folder again, for the codes of the
images.

    class Config(Strict):
        kind: Literal["my_prior"] = "my_prior"
        tokenizer: TokenizerConfig

    class Model(Variant):
        reads = "codes"
        def __init__(self, config, spec):                     # spec: of the images
            self.tokenizer = frozen_tokenizer(config.tokenizer, spec)   # .codes(image), .decode_codes(codes).mean
            self.num_codes, self.latent_shape = config.tokenizer.codes, config.tokenizer.grid
        @property
        def pretrained(self):
            return {"tokenizer": self.config.tokenizer.run}   # filled by the loop when a new run starts
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from vaedist.config.job import Spec
from vaedist.config.settings import FREE, Strict
from vaedist.core.errors import UserError
from vaedist.models.contract import Variant, build, model_config


class Tokenizer(Strict):
    """What a tokenizer's run is: everything but its weights. vaedist-train writes it."""

    run: str = Field(
        description="Run or checkpoint; may move as long as its weights are the same.", json_schema_extra=FREE
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of its chosen weights.")
    model: dict[str, Any] = Field(description="Its `model` section.")
    codes: int = Field(ge=1, description="How many different codes there are, K.")
    grid: tuple[int, int] = Field(description="Codes per image, (h, w).")
    binarise: Literal["none", "static", "dynamic", "threshold"] = Field(
        "none", description="Its `data.binarise`."
    )
    seed: int = Field(0, ge=0, description="Its job's, for images binarised statically.")

    @field_validator("model")
    @classmethod
    def _every_default_filled_in(cls, section: dict[str, Any]) -> dict[str, Any]:
        """So that the same tokenizer compares equal, whatever was left to the defaults."""
        return model_config(section, "the tokenizer's settings").model_dump(mode="json")


TokenizerConfig = str | Tokenizer
"""A run, as a person writes it; or what `vaedist-train` makes of it."""


def frozen_tokenizer(config: TokenizerConfig, spec: Spec) -> Variant:
    """The tokenizer's module, with `codes` and `decode_codes`: not trained, and without its run's weights yet.

    Args:
        config: Settled.
        spec: Of the images.

    Raises:
        UserError: only the run's name is known.
    """
    if isinstance(config, str):
        raise UserError(
            f"model.tokenizer names the run {config}, and what that run is has not been read: train with "
            "vaedist-train, which does"
        )
    return build(model_config(config.model), spec, seed=0).requires_grad_(False).eval()
