"""Divergences between distributions over a latent: KL in closed form, and MMD between samples.

For q = N(mu, diag(s^2)) and a prior p = N(m, diag(t^2)), per latent dimension and in nats:

    KL(q || p) = ((mu - m)^2 + s^2 - t^2) / (2 t^2) - log s + log t

For the standard normal p this is (mu^2 + s^2 - 1) / 2 - log s. Kingma and Welling, "Auto-encoding variational Bayes",
appendix B. A prior with a mean and a variance for each class, p(z | y), is another `DiagonalGaussian`, with a row for
each label of the batch: Sohn et al., "Learning structured output representation using deep conditional
generative models".

The squared maximum mean discrepancy of two distributions, from samples x_1..x_n and y_1..y_m and a kernel k,

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

is unbiased: 0 on average where the distributions are equal, so single values may be negative. Gretton et al., "A kernel
two-sample test", lemma 6. With r = |x - y| and D dimensions:

| kernel | k(x, y) | |
|---|---|---|
| `imq` | sum over scales s of C / (C + r^2), C = 2 D w^2 s | the default |
| `rbf` | exp(-r^2 / (2 D w^2)) | |
| `legacy` | exp(-r^2 / D^2), and the means run over i = j too | of earlier systems, to compare with |

2 D is the mean r^2 of two standard normal vectors, so w = 1 suits that prior at every D. Several scales detect
differences at small and large distances, and the inverse multiquadratic's tail leaves a gradient to vectors far away
(Tolstikhin et al., "Wasserstein auto-encoders", section 4; the seven scales are those of its published code). `legacy`
is nearly constant at D = 32 and more: its biased diagonal outweighs the rest and rewards too narrow posteriors.

`block: b` splits both samples into blocks of b rows, or one more, and takes the mean of their MMD^2: still unbiased, in
time n * b instead of n^2, with more variance (Zaremba et al., "B-test: a non-parametric, low variance kernel two-sample
test"; b = 2 is almost the linear-time estimator of Gretton et al., section 6).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaedist.core.errors import NotDefined
from vaedist.nets.divergences_config import Imq, KernelConfig, Legacy

# exp of these stays finite and non-zero in fp32, products too; a trained posterior lies far inside.
_LOG_VARIANCE = (-30.0, 20.0)

_TILE = 1 << 18
"""Values of a kernel computed at once: a few tensors of this size fit into a core's cache."""


class DiagonalGaussian:
    """q(z | x) = N(mean, exp(log_variance)) with independent dimensions; also a prior p(z) or p(z | y).

    Args:
        mean: mu, (B, D) or (B, D, h, w).
        log_variance: log s^2, the same shape; clamped to [-30, 20].
        prior: p of `kl`, of a shape that broadcasts to q's; None: the standard normal.
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
        """From (B, 2D, ...) features, in at least fp32: mean, and log-variance relative to that of `sigma`."""
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
        distance = (self.mean - self.prior.mean).square() * (-self.prior.log_variance).exp()
        return (distance + ratio.exp() - 1 - ratio) / 2


class PointMass:
    """q(z | x) of a deterministic encoder: all mass at `mean`, so neither a density nor a rate.

    Args:
        mean: (B, D) or (B, D, h, w); half precision becomes fp32.
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


def mmd(x: Tensor, y: Tensor, kernel: KernelConfig = Imq()) -> Tensor:  # noqa: B008 - frozen
    """MMD^2 of two samples, a scalar in fp32 (fp64 for fp64 samples), outside autocast, with gradient to both.

    In a loss it takes the rows of the global batch: `mmd(ctx.gather(z), ctx.gather(prior_samples), kernel)`.

    Args:
        x: (n, D) or (n, D, h, w): n latents.
        y: (m, ...) of the same dimensions; m = n where the kernel has blocks.
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
        split = longer * (size + 1)
        total = x.new_zeros(())
        for rows, part in ((size + 1, slice(0, split)), (size, slice(split, None))):
            if len(x[part]):
                shape = (-1, rows, x.shape[1])
                total = total + _mmd(x[part].view(shape), y[part].view(shape), kernel).sum() / blocks
        return total


def _mmd(x: Tensor, y: Tensor, kernel: KernelConfig) -> Tensor:
    """(G,) MMD^2 of G pairs of samples (G, n, D) and (G, m, D)."""

    def within(z: Tensor) -> Tensor:
        n = z.shape[1]
        return _kernel_sum(z, None, kernel) / (n * n if isinstance(kernel, Legacy) else n * (n - 1))

    return within(x) + within(y) - 2 * _kernel_sum(x, y, kernel) / (x.shape[1] * y.shape[1])


def _kernel_sum(x: Tensor, y: Tensor | None, kernel: KernelConfig) -> Tensor:
    total: Tensor = _KernelSum.apply(x, y, kernel)  # type: ignore[no-untyped-call]
    return total


class _KernelSum(torch.autograd.Function):
    """(G,) sums of k(x_i, y_j) over all pairs; without y of x with itself, and i = j is left out where unbiased.

    k depends only on r^2, so with w = dk/dr^2 the gradient to x_i is 2 sum_j w_ij (x_i - y_j), two matrix products. It
    is computed with the sum, some rows at a time: neither the n x m values nor what autograd would save for each scale
    are ever in memory as a whole.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, y: Tensor | None, kernel: KernelConfig) -> Tensor:
        other = x if y is None else y
        to_x, to_y = context.needs_input_grad[0], y is not None and context.needs_input_grad[1]
        gradient = torch.zeros_like(x) if to_x else None
        gradient_y = torch.zeros_like(other) if to_y else None
        norms, others = x.square().sum(2)[:, :, None], other.square().sum(2)[:, None, :]
        sums = x.new_zeros(len(x), dtype=torch.float64)
        rows = max(1, _TILE // (len(x) * other.shape[1]))
        for start in range(0, x.shape[1], rows):
            part = x[:, start : start + rows]
            squares = norms[:, start : start + rows] + others
            distances = torch.baddbmm(squares, part, other.transpose(1, 2), alpha=-2).clamp_min_(0)
            if y is None and not isinstance(kernel, Legacy):
                distances.diagonal(start, 1, 2).fill_(math.inf)  # where every kernel and its derivative are 0
            total, slopes = _values_and_slopes(distances, x.shape[2], kernel, slopes=to_x or to_y)
            sums += total
            if slopes is not None and gradient is not None:
                step = slopes.sum(2)[:, :, None] * part - slopes @ other
                gradient[:, start : start + rows] = 2 * step
            if slopes is not None and gradient_y is not None:
                gradient_y += 2 * (slopes.sum(1)[:, :, None] * other - slopes.transpose(1, 2) @ part)
        if y is None and gradient is not None:
            gradient *= 2  # each row is x_i in one half of the pairs and x_j in the other
        context.save_for_backward(gradient, gradient_y)
        return sums.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(context: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x, to_y = (None if g is None else outer[:, None, None] * g for g in context.saved_tensors)
        return to_x, to_y, None


def _values_and_slopes(
    distances: Tensor, d: int, kernel: KernelConfig, *, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """(G,) fp64 sums of the kernel over (G, n, m) squared `distances`, which are overwritten, and (G, n, m) slopes."""
    if not isinstance(kernel, Imq):
        width = float(d**2) if isinstance(kernel, Legacy) else 2 * d * kernel.bandwidth**2
        values = distances.div_(-width).exp_()
        return values.sum((1, 2)).double(), values.div(-width) if slopes else None
    sums = distances.new_zeros(len(distances), dtype=torch.float64)
    slope = torch.zeros_like(distances) if slopes else None
    buffer = torch.empty_like(distances)
    for scale in kernel.scales:
        width = 2 * d * kernel.bandwidth**2 * scale
        values = torch.add(distances, width, out=buffer).reciprocal_().mul_(width)
        sums += values.sum((1, 2)).double()
        if slope is not None:
            slope.addcmul_(values, values, value=-1 / width)
    return sums, slope
