"""Divergences between distributions over a latent.

Closed form used here, for q = N(mu, diag(s^2)) and the standard normal p, per latent dimension and in nats:

    KL(q || p) = (mu^2 + s^2 - 1) / 2 - log s

Kingma and Welling, "Auto-encoding variational Bayes", appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp of these stays finite and non-zero in fp32, with room for products; a trained posterior is far inside.
_LOG_VARIANCE = (-30.0, 20.0)


class DiagonalGaussian:
    """q(z | x) = N(mean, exp(log_variance)), every dimension on its own.

    Args:
        mean: mu, (B, D) or (B, D, h, w).
        log_variance: log s^2, the same shape; values outside [-30, 20] count as the nearer end.
    """

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        assert mean.shape == log_variance.shape
        self.mean = mean
        self.log_variance = log_variance.clamp(*_LOG_VARIANCE)

    @classmethod
    def from_network(cls, features: Tensor) -> DiagonalGaussian:
        """From (B, 2D, ...) features: the first half is the mean. Leaves half precision for fp32."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        mean, log_variance = features.chunk(2, dim=1)
        return cls(mean, log_variance)

    @property
    def std(self) -> Tensor:
        return (self.log_variance / 2).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise: a latent per row, with gradient to both."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats per latent dimension, the shape of `mean`."""
        return (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance) / 2
