"""The discretized logistic likelihood: probabilities of the 256 levels of a byte, and mixtures of them.

On the network's scale the level k of 0..255 is the interval of width w = 2/255 around v = 2k/255 - 1, and a logistic
distribution with mean m and scale s gives it the mass

    P(k) = S((v + w/2 - m) / s) - S((v - w/2 - m) / s),   S = sigmoid,

where level 0 reaches down to minus infinity and level 255 up to infinity, so that the 256 masses add up to 1.
Salimans et al., "PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood and other
modifications".

It is computed without a difference of nearly equal numbers, so it is exact for every mean and scale: for b > a

    log(S(b) - S(a)) = log S(b) + log S(-a) + log(1 - e^(a - b)),   b - a = w / s,

each term of which is stable. (The usual approximation, the density at the middle of the interval, does not sum to 1.)

Mixtures. With weights p_i, log P = logsumexp_i(log p_i + sum over channels of log P_i). A pixel's channels share
their component, and a channel's mean depends on the values of the earlier ones: m_c + sum over j < c of tanh(t_cj) v_j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vaedist.nets.decoder_distribution import DecoderDistribution, clamp_to_open_interval
from vaedist.nets.likelihoods_config import LogisticLikelihood

_WIDTH = 2 / 255
_START = math.log(0.2)  # log-scale of an untrained decoder
_FLOOR = -7.0  # lower bound of the log-scales: a quarter of a level is as sharp as a byte can be


class DiscretizedLogistic(DecoderDistribution):
    """A mixture of I logistics over the C channels of each pixel.

    Args:
        weights: (B, I, H, W) logits.
        means: (B, I, C, H, W) on the network's scale.
        log_scales: The same shape, or one that broadcasts to it.
        couplings: (B, I, C(C-1)/2, H, W): t of the channel pairs (1, 0), (2, 0), (2, 1), ...
    """

    evidence = "discrete"
    name = "discretisedlogistic"

    def __init__(self, weights: Tensor, means: Tensor, log_scales: Tensor, couplings: Tensor) -> None:
        super().__init__(means[:, 0])
        self.weights, self.means, self.log_scales = weights, means, log_scales.expand_as(means)
        self.couplings = couplings
        self._pairs = [(c, j) for c in range(1, means.shape[2]) for j in range(c)]

    @classmethod
    def from_network(
        cls, output: Tensor, channels: int, config: LogisticLikelihood, shared: Tensor | None
    ) -> DiscretizedLogistic:
        """From (B, outputs, H, W) of a decoder.

        Args:
            output: In at least fp32. The means of an untrained decoder are spread over the grey scale.
            channels: C of the images.
            config: Says how `output` is split.
            shared: (C,) trained parameters of the scales, where they do not come from the decoder.
        """
        count = config.components
        batch, _, height, width = output.shape
        weights, means, scales, couplings = output.split(config.sections(channels), dim=1)
        grid = (batch, count, -1, height, width)
        start = (2 * torch.arange(count, dtype=output.dtype, device=output.device) + 1) / count - 1
        raw = scales.reshape(grid) if shared is None else shared.to(output.dtype)[:, None, None]
        return cls(
            weights if count > 1 else output.new_zeros(batch, 1, height, width),
            means.reshape(grid) + start[:, None, None, None],
            _FLOOR + functional.softplus(raw + _START - _FLOOR),
            couplings.reshape(batch, count, math.comb(channels, 2), height, width),
        )

    def _conditional_mean(self, channel: int, values: Sequence[Tensor]) -> Tensor:
        """(B, I, H, W) mean of a channel, given (B, I or 1, H, W) values of the earlier channels."""
        mean = self.means[:, :, channel]
        for number, (later, earlier) in enumerate(self._pairs):
            if later == channel:
                mean = mean + torch.tanh(self.couplings[:, :, number]) * values[earlier]
        return mean

    def log_prob_values(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) log-probabilities of pixels whose channels are levels / 255."""
        values = (2 * x - 1)[:, None].unbind(2)
        inverse = torch.exp(-self.log_scales)
        mean = torch.stack([self._conditional_mean(c, values) for c in range(x.shape[1])], 2)
        # Edges from whole numbers: the upper edge of a level equals the lower edge of the next, bit for bit.
        level = (255 * x).round()[:, None]
        upper = ((2 * level + 1) / 255 - 1 - mean) * inverse
        lower = ((2 * level - 1) / 255 - 1 - mean) * inverse
        # Levels 0 and 255 reach to infinity: the sigmoid on that side is 1, and so is the last factor.
        black, white = level == 0, level == 255
        log_p = torch.where(white, 0.0, functional.logsigmoid(upper))
        log_p = log_p + torch.where(black, 0.0, functional.logsigmoid(-lower))
        log_p = log_p + torch.where(black | white, 0.0, torch.log(-torch.expm1(-_WIDTH * inverse)))
        return torch.logsumexp(self.weights.log_softmax(1) + log_p.sum(2), 1, keepdim=True)

    @property
    def location(self) -> Tensor:
        """(B, C, H, W) mean of the values after they are clamped to the network's scale [-1, 1], on the [0, 1] scale.

        For one logistic it is 1 - integral of its distribution function from -1 to 1, a difference of softplus; the
        mean of the levels differs by less than half a level. A channel's mean depends on the means of the earlier ones.
        """
        means: list[Tensor] = []
        scales = self.log_scales.exp()
        for channel in range(self.means.shape[2]):
            m, s = self._conditional_mean(channel, means), scales[:, :, channel]
            integral = s * (functional.softplus((1 - m) / s) - functional.softplus((-1 - m) / s))
            means.append((1 - integral).clamp(-1, 1))
        return ((self.weights.softmax(1)[:, :, None] * torch.stack(means, 2)).sum(1) + 1) / 2

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) levels / 255, from uniform noise on [0, 1).

        The first channel's noise picks the component; its position within the component's share of [0, 1) is again
        uniform and draws the value.
        """
        shares = self.weights.to(torch.float64).softmax(1)
        ends = shares.cumsum(1)
        u = noise.to(torch.float64)
        component = (u[:, :1] >= ends[:, :-1]).sum(1, keepdim=True)
        share = shares.gather(1, component).clamp_min(torch.finfo(torch.float64).tiny)
        within = (u[:, :1] - (ends.gather(1, component) - share)) / share
        u = clamp_to_open_interval(torch.cat([within, u[:, 1:]], 1), self.output.dtype)
        drawn: list[Tensor] = []
        for channel in range(self.output.shape[1]):
            m = self._conditional_mean(channel, drawn).gather(1, component)
            s = self.log_scales[:, :, channel].exp().gather(1, component)
            level = ((m + s * torch.logit(u[:, channel, None]) + 1) / _WIDTH).round().clamp(0, 255)
            drawn.append(level * _WIDTH - 1)
        return (torch.cat(drawn, 1) + 1) / 2
