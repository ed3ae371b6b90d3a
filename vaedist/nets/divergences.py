"""Divergences between distributions over a latent: KL in closed form, and MMD between samples.

For q = N(mu, diag(s^2)) and a prior p = N(m, diag(t^2)), per latent dimension and in nats:

    KL(q || p) = ((mu - m)^2 + s^2 - t^2) / (2 t^2) - log s + log t

For the standard normal p this is (mu^2 + s^2 - 1) / 2 - log s. Kingma and Welling, "Auto-encoding variational Bayes",
appendix B. A prior with a mean and a spread for each class, p(z | y), is another `DiagonalGaussian`, whose rows are
those of the batch's labels: Sohn et al., "Learning structured output representation using deep conditional
generative models".

The squared maximum mean discrepancy of two laws, from samples x_1..x_n and y_1..y_m and a kernel k,

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

is unbiased: 0 on average where the laws are equal, so single values may be negative. Gretton et al., "A kernel
two-sample test", lemma 6. With r = |x - y| and D dimensions:

| kernel | k(x, y) | |
|---|---|---|
| `imq` | sum over scales s of C / (C + r^2), C = 2 D w^2 s | the default |
| `rbf` | exp(-r^2 / (2 D w^2)) | |
| `legacy` | exp(-r^2 / D^2), and the means run over i = j too | of earlier systems, to compare with |

2 D is the mean r^2 of two standard normal vectors, so w = 1 suits that prior at every D; several scales see faults near
and far, and the inverse multiquadratic's tail leaves a gradient to vectors far away (Tolstikhin et al., "Wasserstein
auto-encoders", section 4; the seven scales are those of its published code). `legacy` is nearly flat at D = 32 and
more: its biased diagonal outweighs all that it can see of a posterior that is too narrow, and rewards it.

`block: b` cuts both samples into blocks of b rows, or one more, and takes the mean of their MMD^2: still unbiased, in
time n * b instead of n^2, with more variance (Zaremba et al., "B-test: a non-parametric, low variance kernel two-sample
test"; b = 2 is all but the linear-time estimator of Gretton et al., section 6).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vaedist.errors import NotDefined
from vaedist.settings import Strict

# exp of these stays finite and non-zero in fp32, with room for products; a trained posterior is far inside.
_LOG_VARIANCE = (-30.0, 20.0)


class DiagonalGaussian:
    """q(z | x) = N(mean, exp(log_variance)), every dimension on its own; also a prior p(z) or p(z | y).

    Args:
        mean: mu, (B, D) or (B, D, h, w).
        log_variance: log s^2, the same shape; values outside [-30, 20] count as the nearer end.
        prior: What `kl` measures against, of a shape that broadcasts to it; None: the standard normal.
    """

    def __init__(self, mean: Tensor, log_variance: Tensor, prior: DiagonalGaussian | None = None) -> None:
        assert mean.shape == log_variance.shape
        self.mean = mean
        self.log_variance = log_variance.clamp(*_LOG_VARIANCE)
        self.prior = prior

    @classmethod
    def from_network(
        cls, features: Tensor, prior: DiagonalGaussian | None = None, sigma: float = 1.0
    ) -> DiagonalGaussian:
        """From (B, 2D, ...) features: mean, and log-variance around that of `sigma`. Leaves half precision for fp32."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        mean, log_variance = features.chunk(2, dim=1)
        return cls(mean, log_variance + 2 * math.log(sigma), prior)

    @property
    def std(self) -> Tensor:
        return (self.log_variance / 2).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise: a latent per row, with gradient to both."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats of latents of the shape of `mean`, summed over dimensions."""
        scaled = (z - self.mean).square() * (-self.log_variance).exp()
        return -0.5 * (scaled + self.log_variance + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self) -> Tensor:
        """KL(q || prior) in nats per latent dimension, the shape of `mean`."""
        if self.prior is None:
            return (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance) / 2
        ratio = self.log_variance - self.prior.log_variance
        apart = (self.mean - self.prior.mean).square() * (-self.prior.log_variance).exp()
        return (apart + ratio.exp() - 1 - ratio) / 2


class Point:
    """q(z | x) of a deterministic encoder: all mass at `mean`. It has no density, so no rate either.

    Args:
        mean: (B, D) or (B, D, h, w); leaves half precision for fp32.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean.to(torch.promote_types(mean.dtype, torch.float32))

    def sample(self, noise: Tensor) -> Tensor:
        """`mean`, whatever the noise."""
        return self.mean

    def kl(self) -> Tensor:
        raise NotDefined("the rate is not defined, because the encoder is deterministic")

    def log_prob(self, z: Tensor) -> Tensor:
        raise NotDefined("the density of a latent is not defined, because the encoder is deterministic")


# Maximum mean discrepancy -------------------------------------------------------------------------------------


class _Kernel(Strict):
    block: int | None = Field(
        None,
        ge=2,
        description="Compare in blocks of so many rows, in linear time; none: every row with every other.",
    )


class Imq(_Kernel):
    """Inverse multiquadratics of several scales."""

    kind: Literal["imq"] = "imq"
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.1, 0.2, 0.5, 1, 2, 5, 10), min_length=1)
    bandwidth: float = Field(1.0, gt=0, description="w: 1 suits a standard normal prior.")


class Rbf(_Kernel):
    """A Gaussian kernel."""

    kind: Literal["rbf"] = "rbf"
    bandwidth: float = Field(1.0, gt=0, description="w: 1 suits a standard normal prior.")


class Legacy(_Kernel):
    """The biased kernel of earlier systems, for comparison only."""

    kind: Literal["legacy"] = "legacy"


KernelConfig = Annotated[Imq | Rbf | Legacy, Field(discriminator="kind")]


def mmd(x: Tensor, y: Tensor, kernel: Imq | Rbf | Legacy = Imq()) -> Tensor:  # noqa: B008 - frozen
    """MMD^2 of two samples, a scalar in fp32 (fp64 for fp64 samples), outside autocast, with gradient to both.

    A term of a loss takes the rows of the global batch: `mmd(ctx.gather(z), ctx.gather(drawn), kernel)`.

    Args:
        x: (n, D) or (n, D, h, w): n latents.
        y: (m, ...) of as many dimensions each; m = n where the kernel has blocks.
        kernel: See the module. Unbiased ones need n and m of at least 2.
    """
    assert x.shape[1:] == y.shape[1:] and min(len(x), len(y)) >= (1 if isinstance(kernel, Legacy) else 2)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.flatten(1).to(dtype), y.flatten(1).to(dtype)
        # Distances do not change, but |x|^2 + |y|^2 - 2 xy keeps its digits where the latents lie far from 0.
        centre = torch.cat([x, y]).detach().mean(0)
        x, y = x - centre, y - centre
        if kernel.block is None:
            return _mmd(x[None], y[None], kernel).squeeze(0)
        assert len(x) == len(y), "blocks need samples of one size"
        blocks = max(1, len(x) // kernel.block)
        size, longer = divmod(len(x), blocks)
        at = longer * (size + 1)
        total = x.new_zeros(())
        for rows, start, stop in ((size + 1, 0, at), (size, at, len(x))):
            if stop > start:
                shape = (-1, rows, x.shape[1])
                each = _mmd(x[start:stop].view(shape), y[start:stop].view(shape), kernel)
                total = total + each.sum() / blocks
        return total


def _mmd(x: Tensor, y: Tensor, kernel: Imq | Rbf | Legacy) -> Tensor:
    """(G,) MMD^2 of G pairs of samples (G, n, D) and (G, m, D)."""

    def within(z: Tensor) -> Tensor:
        values, n = _similarity(z, z, kernel), z.shape[1]
        if isinstance(kernel, Legacy):
            return values.mean((1, 2))
        own = torch.eye(n, dtype=torch.bool, device=z.device)
        return values.masked_fill(own, 0.0).sum((1, 2)) / (n * (n - 1))

    return within(x) + within(y) - 2 * _similarity(x, y, kernel).mean((1, 2))


def _similarity(x: Tensor, y: Tensor, kernel: Imq | Rbf | Legacy) -> Tensor:
    """(G, n, m) values of the kernel."""
    d = x.shape[2]
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
    apart = torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp_min(0)
    if isinstance(kernel, Legacy):
        return (-apart / d**2).exp()
    if isinstance(kernel, Rbf):
        return (-apart / (2 * d * kernel.bandwidth**2)).exp()
    widths = [2 * d * kernel.bandwidth**2 * scale for scale in kernel.scales]
    total = torch.zeros_like(apart)
    for width in widths:
        total = total + width / (width + apart)
    return total
