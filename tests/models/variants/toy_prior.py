"""A variant only for tests: the simplest prior over frozen codes, one distribution for each place of the grid.

It proves the plumbing of `reads == "codes"`: a borrowed tokenizer, code shards, sampling without the tokenizer's run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.config.job import Spec
from vaedist.config.settings import Strict
from vaedist.core.context import Batch, Context, generator
from vaedist.models.bases.code_prior_config import Tokenizer, TokenizerConfig
from vaedist.models.bases.frozen_tokenizer import frozen_tokenizer
from vaedist.models.contract import Variant


class Config(Strict):
    kind: Literal["toy_prior"] = "toy_prior"
    tokenizer: TokenizerConfig
    jitter: float = 0.0


class Model(Variant):
    reads = "codes"
    latent = "codes"
    reconstructs = True
    samples = True
    compiled = ()
    units: ClassVar[Mapping[str, str]] = {"loss": "nats", "nats_per_token": "nats"}

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.tokenizer = frozen_tokenizer(config.tokenizer, spec)
        assert isinstance(config.tokenizer, Tokenizer)
        self.num_codes, self.latent_shape = config.tokenizer.codes, config.tokenizer.grid
        self.logits = nn.Parameter(torch.zeros(*self.latent_shape, self.num_codes))

    @property
    def pretrained(self) -> Mapping[str, str]:
        assert isinstance(self.config.tokenizer, Tokenizer)
        return {"tokenizer": self.config.tokenizer.run}

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        codes = batch["codes"]
        logits = self.logits.expand(len(codes), *self.logits.shape)
        if self.config.jitter and ctx.training:
            logits = logits + self.config.jitter * ctx.noise("jitter", logits.shape).to(logits)
        loss = functional.cross_entropy(logits.permute(0, 3, 1, 2), codes, reduction="none").flatten(1).sum(1)
        return {"loss": loss, "nats_per_token": loss.detach() / codes[0].numel()}

    def codes(self, image: Tensor) -> Tensor:
        codes: Tensor = self.tokenizer.codes(image)  # type: ignore[operator]
        return codes

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        image_: Tensor = self.tokenizer.reconstruct(image)  # type: ignore[operator]
        return image_

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        probabilities = (self.logits / temperature).softmax(-1).flatten(0, 1).cpu()
        drawn = [
            torch.multinomial(probabilities, 1, generator=generator("sample", seed, i)).view(
                self.latent_shape
            )
            for i in range(first, first + n)
        ]
        codes = torch.stack(drawn).to(self.logits.device)
        image: Tensor = self.tokenizer.decode_codes(codes).mean  # type: ignore[operator]
        return image
