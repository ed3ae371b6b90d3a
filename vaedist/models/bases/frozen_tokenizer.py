"""The frozen tokenizer inside a prior over codes, made from the settings that describe it.

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

from vaedist.config.job import Spec
from vaedist.core.errors import UserError
from vaedist.models.bases.code_prior_config import TokenizerConfig
from vaedist.models.contract import Variant, build


def frozen_tokenizer(config: TokenizerConfig, spec: Spec) -> Variant:
    """The tokenizer's module, with `codes` and `decode_codes`: not trained, and without its run's weights yet.

    Args:
        config: Resolved.
        spec: Of the images.

    Raises:
        UserError: only the run's name is known.
    """
    if isinstance(config, str):
        raise UserError(
            f"model.tokenizer names the run {config}, and what that run is has not been read: train with "
            "vaedist-train, which does"
        )
    return build(config.model, spec, seed=0).requires_grad_(False).eval()
