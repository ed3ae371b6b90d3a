"""The discriminator of an adversarial game: its network, the losses of both sides, and its regularization.

D scores images, high for real ones x ~ data, low for generated ones y = G(z). With s+(a) = log(1 + e^a):

| gan_loss | discriminator minimises | generator minimises |
|---|---|---|
| `ns` | s+(-D(x)) + s+(D(y)) | s+(-D(y)) |
| `bce` | half the cross-entropies of D(x) with 1 - smoothing and of D(y) with 0 | s+(-D(y)) |
| `wgan_clip` | D(y) - D(x), every weight of D clipped to +-`weight_clip` after each step | -D(y) |
| `relativistic` | s+(D(y) - D(x)) | s+(D(x) - D(y)) |

`ns` is the non-saturating game of Goodfellow et al., "Generative adversarial nets". `bce` is the same with half the
discriminator's loss and one-sided label smoothing (Salimans et al., "Improved techniques for training GANs", section
3.4). `wgan_clip`: Arjovsky et al., "Wasserstein GAN". `relativistic` pairs the rows of the batch:
Jolicoeur-Martineau, "The relativistic discriminator", as in Huang et al., "The GAN is dead; long live the GAN!".

R1 (Mescheder et al., "Which training methods for GANs do actually converge?", equation 9) adds

    gamma / 2 * |grad_x D(x)|^2

on the real images as D sees them. It is lazy (Karras et al., "Analyzing and improving the image quality of StyleGAN",
appendix B): computed at every `r1_every`-th turn of the discriminator and then multiplied by `r1_every`. It needs a
gradient of a gradient, which compiled networks do not have and half precision cannot resolve, so it runs uncompiled and
in fp32.

Spectral normalisation (Miyato et al., "Spectral normalization for generative adversarial networks") divides each weight
matrix W by its largest singular value, u^T W v. The vectors u and v are updated by one power iteration after each step,
not in forward, which writes no state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from vaedist.config.job import Spec
from vaedist.core.context import Context
from vaedist.nets.adversarial_config import Adversary
from vaedist.nets.bodies import encoder
from vaedist.nets.diffaugment import augment

softplus = functional.softplus


class Discriminator(nn.Module):
    """(B, C, H, W) in [-1, 1] to scores.

    Args:
        config: The game's settings.
        spec: Of the data.
    """

    def __init__(self, config: Adversary, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.body = encoder(config.discriminator, spec, 1, vector=True, where="model.discriminator")
        if not self.scores_are_logits:
            *_, last = (layer for layer in self.body.modules() if isinstance(layer, nn.Linear))
            last.register_parameter(
                "bias", None
            )  # it cancels in differences of scores, so it has no gradient
        if config.spectral_norm:
            for layer in list(self.body.modules()):
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    if not layer.weight.any():
                        nn.init.orthogonal_(
                            layer.weight
                        )  # a residual block's last layer is 0: it has no norm
                    parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def forward(self, image: Tensor) -> Tensor:
        """(B,) scores, in at least fp32."""
        scores: Tensor = self.body(image).squeeze(1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) scores and the (B, F) features that the last block computes them from, in at least fp32."""
        *trunk, head = self.body.children()
        for block in trunk:
            image = block(image)
        exact = torch.promote_types(image.dtype, torch.float32)
        return head(image).squeeze(1).to(exact), image.flatten(1).to(exact)

    def scores_and_squared_gradient(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) scores and (B,) |grad_x D(x)|^2, both with gradient to the weights."""
        with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
            image = image.detach().requires_grad_()
            scores = self(image)
            (gradient,) = torch.autograd.grad(scores.sum(), image, create_graph=True)
        return scores, gradient.square().flatten(1).sum(1)

    def augment_input(self, image: Tensor, ctx: Context, name: str) -> Tensor:
        """The image augmented for the discriminator, with noise of that `name`."""
        return augment(image, self.config.diffaugment, ctx, name)

    def real_scores(self, image: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """(B,) scores of augmented images, and the (B,) R1 terms of the loss: 0 where not due, None without R1."""
        config = self.config
        if config.r1 > 0 and ctx.training and ctx.turn % config.r1_every == 0:
            scores, squared_gradient = self.scores_and_squared_gradient(image)
            return scores, 0.5 * config.r1 * config.r1_every * squared_gradient
        scores = self(image)
        return scores, torch.zeros_like(scores) if config.r1 > 0 and ctx.training else None

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """(B,) the discriminator's loss, from (B,) scores."""
        config = self.config
        if config.gan_loss == "ns":
            return softplus(-real) + softplus(fake)
        if config.gan_loss == "bce":
            # Cross-entropy of a score a with the label t: s+(-a) + (1 - t) a.
            return 0.5 * (softplus(-real) + config.label_smoothing * real + softplus(fake))
        if config.gan_loss == "wgan_clip":
            return fake - real
        return softplus(fake - real)

    def generator_loss(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """(B,) the generator's loss, from (B,) scores; `real` is needed where `relativistic`."""
        if self.relativistic:
            assert real is not None
            return softplus(real - fake)
        return -fake if self.config.gan_loss == "wgan_clip" else softplus(-fake)

    @property
    def relativistic(self) -> bool:
        """Whether the generator's loss compares with real images."""
        return self.config.gan_loss == "relativistic"

    @property
    def scores_are_logits(self) -> bool:
        """Whether a score is a logit, 0 between real and generated; otherwise only differences mean something."""
        return self.config.gan_loss in ("ns", "bce")

    def score_statistics(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Scores and accuracies of the discriminator: by the sign of logits, otherwise of pairs, in which the real
        image should have the higher score."""
        terms = {"real_score": real, "fake_score": fake}
        if self.scores_are_logits:
            terms |= {"real_accuracy": (real > 0).to(real.dtype), "fake_accuracy": (fake < 0).to(real.dtype)}
        else:
            terms["pair_accuracy"] = (real > fake).to(real.dtype)
        return {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """After a step of its weights: clip them, or update the vectors of spectral normalisation."""
        if self.config.gan_loss == "wgan_clip":
            for parameter in self.parameters():
                parameter.clamp_(-self.config.weight_clip, self.config.weight_clip)
        if self.config.spectral_norm:
            for module in self.modules():
                if isinstance(module, parametrize.ParametrizationList):
                    norm, weight = module[0], module.original
                    assert isinstance(norm, SpectralNorm) and isinstance(weight, Tensor)
                    norm.power_iteration(weight)


UNITS = {
    "real_score": "score",
    "fake_score": "score",
    "real_accuracy": "share of images",
    "fake_accuracy": "share of images",
    "pair_accuracy": "share of pairs",
    "r1": "share in the loss; 0 where it is not due, so that its mean counts",
}
"""Of the discriminator's terms."""


class SpectralNorm(nn.Module):
    """W to W / (u^T W v), for W (out, ...) flattened to a matrix.

    Args:
        weight: W, not zero.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.register_buffer("u", functional.normalize(torch.randn(rows, dtype=weight.dtype), dim=0))
        self.register_buffer("v", torch.zeros(columns, dtype=weight.dtype))
        for _ in range(30):
            self.power_iteration(weight)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            return weight / torch.dot(self.u, torch.mv(matrix, self.v))

    @torch.no_grad()
    def power_iteration(self, weight: Tensor) -> None:
        """One power iteration."""
        matrix = weight.flatten(1)
        self.v.copy_(functional.normalize(torch.mv(matrix.T, self.u), dim=0))
        self.u.copy_(functional.normalize(torch.mv(matrix, self.v), dim=0))
