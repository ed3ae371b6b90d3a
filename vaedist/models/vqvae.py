"""Autoencoder with a discrete latent map (VQ-VAE).

    loss = -log p(x | q) + commitment * P * mean((z - sg(q))^2)   [ + P * mean((sg(z) - q)^2) ]

z is the encoder's map, q its nearest code vectors, sg stops the gradient, P = C*H*W is the number of values in an
image: the reconstruction is summed over pixels, so a per-element mean times P keeps the published meaning of
`commitment: 0.25`. The bracket trains the code vectors where `codebook.kind` is `gradient`; running means (`ema`) and
fixed grids (`fsq`) have no such term. van den Oord et al., "Neural discrete representation learning". Cosine codes,
residual levels and the rotation of gradients are the codebook's own: see `vaedist.nets.quantizers`.

`dssim` adds structural dissimilarity to what is minimised, as its own term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from vaedist.config.job import Spec
from vaedist.core.context import Batch, Context
from vaedist.models.contract import Likelihood, Variant
from vaedist.models.vqvae_config import Config
from vaedist.nets.bodies import decoder, encoder, matching_grid
from vaedist.nets.kmeans import sample_initial_vectors
from vaedist.nets.likelihoods import ObservationModel, check_dssim
from vaedist.nets.quantizers import quantizer


class Model(Variant):
    """See the module."""

    latent = "codes"
    reconstructs = True
    units: ClassVar[Mapping[str, str]] = {
        "loss": "nats",
        "distortion": "nats",
        "commitment": "squared latent value per element",
        "codebook": "squared latent value per element",
        "dssim": "pixels * (1 - SSIM) / 2",
        "mse": "squared grey value in [0, 1], per pixel",
    }
    why_not: ClassVar[Mapping[str, str]] = {
        "sample": "this run has no prior over its codes: train a variant that does, such as pixelcnn or transformer, "
        "with model.tokenizer naming this run, and sample from that",
        "encode": "the latent is a map of codes: see `codes`",
        "decode": "the latent is a map of codes: see `decode_codes`",
    }
    prepare_batches: ClassVar[int] = 4

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        check_dssim(config.dssim, spec)
        self.config, self.spec = config, spec
        mirrored = config.decoder or config.encoder
        self.grid = matching_grid(config.encoder, mirrored, spec)
        self.quantizer = quantizer(config.codebook)
        self.num_codes = self.quantizer.num_codes
        self.latent_shape = (self.quantizer.depth * self.grid[0], self.grid[1])
        self.encoder = encoder(config.encoder, spec, self.quantizer.dim, vector=False)
        self.observation = ObservationModel(config.likelihood, spec)
        self.batch_statistics = self.observation.batch_statistics
        self.decoder = decoder(
            mirrored, spec, self.quantizer.dim, vector=False, channels=self.observation.outputs
        )

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        self.observation.prepare(first_batches, ctx)
        if self.quantizer.initialized_from_data:
            maps = [self.encoder(self.to_network(batch["image"])) for batch in first_batches]
            self.quantizer.initialize_codebook(
                *sample_initial_vectors(maps, ctx, count=min(64 * self.num_codes, 1 << 16))
            )

    def averaged(self, name: str) -> bool:
        return not name.startswith("quantizer.")

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        quantized = self.quantizer(self.encoder(self.to_network(batch["image"])), ctx)
        image = batch.get("target", batch["image"])
        decoded = self.observation(self.decoder(quantized.values), image, ctx)
        distortion = -decoded.log_prob(image)
        terms = {"distortion": distortion, "mse": decoded.mse(image).detach()}
        loss = distortion
        if quantized.commitment is not None:
            terms["commitment"] = quantized.commitment
            loss = loss + self.config.commitment * self.spec.pixels * quantized.commitment
        if quantized.codebook is not None:
            terms["codebook"] = quantized.codebook
            loss = loss + self.spec.pixels * quantized.codebook
        if self.config.dssim > 0:
            terms["dssim"] = decoded.dssim(image)
            loss = loss + self.config.dssim * terms["dssim"]
        return {"loss": loss, **terms}

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        return {**self.quantizer.after_step(ctx), **self.observation.after_step(ctx)}

    def codes(self, image: Tensor) -> Tensor:
        codes: Tensor = self.quantizer.encode(self.encoder(self.to_network(image)))
        return codes

    def decode_codes(self, codes: Tensor) -> Likelihood:
        """p(x | codes) of int64 codes (B, *latent_shape)."""
        values = self.quantizer.embed(codes).to(next(self.parameters()).dtype)
        decoded: Likelihood = self.observation(self.decoder(values))
        return decoded

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.decode_codes(self.codes(image)).mean
