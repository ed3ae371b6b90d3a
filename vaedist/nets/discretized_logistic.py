"""The discretised logistic likelihood: probabilities of the 256 levels of a byte, and mixtures of them.

On the network's scale the level k of 0..255 is the interval of width w = 2/255 around v = 2k/255 - 1, and a logistic
distribution with mean m and scale s gives it the mass

    P(k) = S((v + w/2 - m) / s) - S((v - w/2 - m) / s),   S = sigmoid,

where level 0 reaches down to minus infinity and level 255 up to infinity, so that the 256 masses add up to 1.
Salimans et al., "PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood and other
modifications".

Computed without a difference of nearly equal numbers, exactly for every mean and scale: for b > a

    log(S(b) - S(a)) = log S(b) + log S(-a) + log(1 - e^(a - b)),   b - a = w / s,

each term of which is stable. (The density at the middle of the interval, the usual way out, does not sum to 1.)

Mixtures. With weights p_i, log P = logsumexp_i(log p_i + sum over channels of log P_i). A pixel's channels share
their component, and the mean of a later channel leans on the values before it: m_c + sum over j < c of tanh(t_cj) v_j.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vaedist.nets.decoder_distribution import DecoderDistribution, clamp_to_open_interval
from vaedist.nets.likelihoods_config import LogisticLikelihood

_WIDTH = 2 / 255
_START = math.log(0.2)  # log-scale of an untrained decoder
_FLOOR = -7.0  # log-scales stay above: a quarter of a level is as sharp as a byte can be


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
        later = range(1, means.shape[2])
        self._pairs = list(itertools.chain.from_iterable(((c, j) for j in range(c)) for c in later))

    @classmethod
    def from_network(
        cls, output: Tensor, channels: int, config: LogisticLikelihood, shared: Tensor | None
    ) -> DiscretizedLogistic:
        """From (B, outputs, H, W) of a decoder.

        Args:
            output: In at least fp32. The means of an untrained decoder are spread over the grey scale.
            channels: C of the images.
            config: Says how `output` is cut.
            shared: (C,) trained numbers behind the scales, where they do not come from the decoder.
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

    def _leaning(self, channel: int, before: Sequence[Tensor]) -> Tensor:
        """(B, I, H, W) mean of a channel, given (B, I or 1, H, W) values of those before it."""
        mean = self.means[:, :, channel]
        for place, (later, earlier) in enumerate(self._pairs):
            if later == channel:
                mean = mean + torch.tanh(self.couplings[:, :, place]) * before[earlier]
        return mean

    def values(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) log-probabilities of pixels whose channels are levels / 255."""
        before = (2 * x - 1)[:, None].unbind(2)
        inverse = torch.exp(-self.log_scales)
        mean = torch.stack([self._leaning(c, before) for c in range(x.shape[1])], 2)
        # Edges from whole numbers: the upper one of a level is the lower one of the next, bit for bit.
        level = (255 * x).round()[:, None]
        upper = ((2 * level + 1) / 255 - 1 - mean) * inverse
        lower = ((2 * level - 1) / 255 - 1 - mean) * inverse
        # An end level reaches to infinity: the sigmoid on that side is 1, and so is the last factor.
        black, white = level == 0, level == 255
        inner = torch.log(-torch.expm1(-_WIDTH * inverse))
        each = torch.where(white, 0.0, functional.logsigmoid(upper))
        each = each + torch.where(black, 0.0, functional.logsigmoid(-lower))
        each = each + torch.where(black | white, 0.0, inner)
        return torch.logsumexp(self.weights.log_softmax(1) + each.sum(2), 1, keepdim=True)

    @property
    def location(self) -> Tensor:
        return (self._mean + 1) / 2

    @property
    def _mean(self) -> Tensor:
        """(B, C, H, W) mean of the values cut to [-1, 1].

        For one logistic it is 1 - integral of its distribution function from -1 to 1, a difference of softplus; the
        mean of the levels differs by less than half a level. A channel leans on the means of those before it.
        """
        found: list[Tensor] = []
        scales = self.log_scales.exp()
        for channel in range(self.means.shape[2]):
            m, s = self._leaning(channel, found), scales[:, :, channel]
            reach = s * (functional.softplus((1 - m) / s) - functional.softplus((-1 - m) / s))
            found.append((1 - reach).clamp(-1, 1))
        return (self.weights.softmax(1)[:, :, None] * torch.stack(found, 2)).sum(1)

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) levels / 255, from uniform noise on [0, 1).

        The first channel's noise picks the component, and what is left of it within the component's share is
        uniform again.
        """
        shares = self.weights.to(torch.float64).softmax(1)
        ends = shares.cumsum(1)
        u = noise.to(torch.float64)
        pick = (u[:, :1] >= ends[:, :-1]).sum(1, keepdim=True)
        share = shares.gather(1, pick).clamp_min(torch.finfo(torch.float64).tiny)
        rest = (u[:, :1] - (ends.gather(1, pick) - share)) / share
        u = clamp_to_open_interval(torch.cat([rest, u[:, 1:]], 1), self.output.dtype)
        drawn: list[Tensor] = []
        for channel in range(self.output.shape[1]):
            m = self._leaning(channel, drawn).gather(1, pick)
            s = self.log_scales[:, :, channel].exp().gather(1, pick)
            level = ((m + s * torch.logit(u[:, channel, None]) + 1) / _WIDTH).round().clamp(0, 255)
            drawn.append(level * _WIDTH - 1)
        return (torch.cat(drawn, 1) + 1) / 2
