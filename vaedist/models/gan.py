"""Generative adversarial network, whose generator may start as a VAE's decoder.

The generator makes y = G(z) from z ~ N(0, 1), and the discriminator scores real images x against y. The losses, the
gradient penalty and the normalization are those of `vaedist.nets.adversarial`. Each step is one turn of the
discriminator, then one of the generator; `train.optim.generator.start` lets the discriminator warm up, and
`train.optim.generator.every` gives it several turns for one. `diffaugment` is for small sets.

From a VAE to a GAN. The generator is the very network that a VAE's decoder is (`nets.bodies.decoder`), so with equal
`generator` and `latent` settings

    init_from: {run: VAE, map: {decoder: generator}}

copies it tensor by tensor. In the VAE the likelihood turns the decoder's numbers a into a mean; the discriminator sees
images in [-1, 1], so `output` says how to read the numbers here:

| output | image in [-1, 1] | the decoder of a VAE with |
|---|---|---|
| `sigmoid_logits` | 2 s(a) - 1 = tanh(a / 2), s = sigmoid | `bernoulli`: a are logits |
| `linear` | a, cut to [-1, 1] in finished pictures only | `gaussian`, `laplace`, `logistic`: a is the mean |
| `tanh` | tanh(a) | none: the usual start from nothing |

With the first two the generator's first pictures are the VAE's own samples for the same z; exactly so for all but
`logistic` (with one output per channel, on gray images), whose mean bends a little where its tails are cut. A mismatch
is refused, and so is a decoder with more outputs per channel (a predicted sigma, a mixture), which are no picture.

The losses compare the two networks and do not measure the pictures, so a GAN's monitor is a measure of its samples,
such as `kid`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.settings import Strict
from vaedist.core.context import Batch, Context, generator
from vaedist.core.errors import UserError
from vaedist.models.bases.gaussian_autoencoder_config import MapLatent
from vaedist.models.contract import Variant
from vaedist.models.gan_config import Config
from vaedist.nets.adversarial import UNITS, Discriminator
from vaedist.nets.bodies import decoder, grid
from vaedist.nets.likelihoods import ObservationModel

OUTPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid_logits": lambda a: torch.tanh(a / 2),
    "linear": lambda a: a,
}
"""`output` to the reading of a network's numbers as an image in [-1, 1]."""


class Model(Variant):
    """See the module."""

    phases = ("discriminator", "generator")
    samples = True
    units: ClassVar[Mapping[str, str]] = {"loss": "who is ahead, not how good", **UNITS}
    adversarial_terms: ClassVar[frozenset[str]] = frozenset(units)
    why_not: ClassVar[Mapping[str, str]] = {
        "encode": "a GAN has no encoder (a VAE-GAN has one: kind vaegan)",
        "reconstruct": "a GAN has no encoder (a VAE-GAN has one: kind vaegan)",
        "decode": "a GAN's generator paints one image for a latent and gives none a probability",
        "prior": "a GAN gives no latent to an image; its samples are drawn by `sample`",
        "codes": "it has no codes",
    }

    config: Config

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        vector = not isinstance(config.latent, MapLatent)
        self.noise_shape: tuple[int, ...]
        if isinstance(config.latent, MapLatent):
            self.noise_shape = (config.latent.channels, *grid(config.generator, spec, "model.generator"))
        else:
            self.noise_shape = (config.latent,)
        where = "model.generator"
        self.generator = decoder(config.generator, spec, self.noise_shape[0], vector=vector, where=where)
        self.discriminator = Discriminator(config, spec)

    @property
    def compiled(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in ("generator", "discriminator") if name not in self.uncompiled)

    @property
    def uncompiled(self) -> Mapping[str, str]:
        why = "its R1 penalty needs the gradient of a gradient"
        return {"discriminator": why} if self.config.r1 > 0 else {}

    def parameters_of(self, phase: str) -> Iterable[nn.Parameter]:
        network: nn.Module = getattr(self, phase)
        return network.parameters()

    def averaged(self, name: str) -> bool:
        return name.startswith("generator.")

    def generate(self, z: Tensor) -> Tensor:
        """(B, C, H, W) on the scale where [-1, 1] is black to white, of latents (B, *noise_shape)."""
        numbers: Tensor = self.generator(z)
        return OUTPUTS[self.config.output](numbers.to(torch.promote_types(numbers.dtype, torch.float32)))

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        disc = self.discriminator
        real = self.to_network(batch["target"] if "target" in batch else batch["image"])
        z = ctx.noise("z", (len(real), *self.noise_shape)).to(real.dtype)
        if ctx.phase == "discriminator":
            with torch.no_grad():
                fake = self.generate(z)
            real_score, penalty = disc.real_scores(disc.augment_input(real, ctx, "real"), ctx)
            fake_score = disc(disc.augment_input(fake, ctx, "fake"))
            terms = {
                "loss": disc.loss(real_score, fake_score),
                **disc.score_statistics(real_score, fake_score),
            }
            if penalty is not None:
                terms |= {"loss": terms["loss"] + penalty, "r1": penalty.detach()}
            return terms
        fake_score = disc(disc.augment_input(self.generate(z), ctx, "fake"))
        compared = disc(disc.augment_input(real, ctx, "real")) if disc.relativistic else None
        return {"loss": disc.generator_loss(compared, fake_score), "fake_score": fake_score.detach()}

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        if ctx.phase == "discriminator":
            self.discriminator.after_step()
        return {}

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """As the contract says; number i has the latent that a VAE's number i has."""
        noise = [
            torch.randn(self.noise_shape, generator=generator("sample", seed, i))
            for i in range(first, first + n)
        ]
        weight = next(self.parameters())
        z = temperature * torch.stack(noise).to(weight.device, weight.dtype)
        return torch.cat([((self.generate(part) + 1) / 2).clamp(0, 1) for part in z.split(64)])

    def check_source(self, source: Strict, mapping: Mapping[str, str], where: str) -> None:
        if mapping and "generator" not in mapping.values():
            return
        likelihood = getattr(source, "likelihood", None)
        if likelihood is None:
            fitting = getattr(source, "output", self.config.output)
        else:
            observation = ObservationModel(likelihood, self.spec)
            if observation.outputs != self.spec.channels:
                raise UserError(
                    f"{where}: its decoder emits {observation.outputs} numbers for the {self.spec.channels} of each "
                    "pixel, so it is no generator: train the VAE with one output per channel (likelihood bernoulli, "
                    "laplace, or gaussian with another sigma than `predicted`)"
                )
            fitting = reading(observation)
        if fitting != self.config.output:
            raise UserError(
                f"{where}: its decoder's numbers are read as images by model.output={fitting}, and this job says "
                f"{self.config.output}, which would start from other pictures: set model.output={fitting}"
            )


@torch.no_grad()
def reading(observation: ObservationModel) -> str:
    """The `output` that reads a generator's numbers as the mean that this likelihood makes of a decoder's."""
    numbers = torch.linspace(-1, 1, 21).view(-1, 1, 1, 1).expand(-1, observation.outputs, 1, 1)
    mean = 2 * observation(numbers).mean - 1
    apart = {
        name: float((OUTPUTS[name](numbers) - mean).abs().max()) for name in ("sigmoid_logits", "linear")
    }
    return min(apart, key=lambda name: apart[name])
