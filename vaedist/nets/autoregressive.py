"""Sampling a map of codes one code after the other.

    p(c | y) = prod_t p(c_t | c_1 .. c_{t-1}, y),     t in raster order: rows from the top, each from the left

For a whole map, as in training, a network gives the logits of all T = h*w codes in one forward. Sampling has no map
yet: by definition it takes one full forward per code and uses one position of each (`UncachedSamplingState`). The state
that a network's own `start_sampling` returns caches what earlier codes gave and computes what the newest one adds: the
same numbers for about 1/T of the work.

`LogitSampler` divides logits by the temperature (0: the most probable code), then truncates: `top_k` keeps the k
largest (Fan et al., "Hierarchical neural story generation"), `top_p` the smallest set whose probability reaches p
(Holtzman et al., "The curious case of neural text degeneration"); codes that tie with the last one kept are kept too.
A code is where a uniform number falls in the cumulative sum of the probabilities, in fp64: one number per code and
sample.

Guidance extrapolates from the network without a label to the one with it, logits = free + g (labelled - free),
after Ho and Salimans, "Classifier-free diffusion guidance"; 1 is the labelled network, 0 the free one.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vaedist.core.errors import UserError


class AutoregressiveNetwork(Protocol):
    """p(codes | label), causal in raster order."""

    grid: tuple[int, int]

    def __call__(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, K, h, w) logits of (B, h, w) codes; those at a position depend only on the codes before it."""

    def start_sampling(self, rows: int, label: Tensor | None = None) -> SamplingState:
        """The state of `rows` maps without any code yet, of (rows,) labels."""


class SamplingState(Protocol):
    """Maps of codes while they are sampled."""

    def logits(self) -> Tensor:
        """(B, K) logits of the next code; to be called once for each code."""

    def append(self, codes: Tensor) -> None:
        """Set the next code of each map, (B,) int64."""


class UncachedSamplingState:
    """`SamplingState` by definition, one full forward per code: the reference for tests and timings of the caches."""

    def __init__(
        self, network: AutoregressiveNetwork, rows: int, label: Tensor | None, device: torch.device | str
    ) -> None:
        self.network, self.label = network, label
        self.codes = torch.zeros((rows, *network.grid), dtype=torch.int64, device=device)
        self.known = 0

    def logits(self) -> Tensor:
        return self.network(self.codes, self.label).flatten(2)[:, :, self.known]

    def append(self, codes: Tensor) -> None:
        self.codes.flatten(1)[:, self.known] = codes
        self.known += 1


class LogitSampler(NamedTuple):
    """Draws codes from their logits."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Check the settings.

        Raises:
            UserError: a setting is out of range; the message says what it may be.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; give a number of at least 0 (1: as trained)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give how many codes stay in the draw, at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}; give the probability that stays in the draw, above 0 and up to 1"
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) fp64, each row summing to 1, of logits (B, K)."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        p = logits.softmax(1)
        if self.top_p is not None and self.top_p < 1:
            descending = p.sort(1, descending=True).values
            larger = descending.cumsum(1) - descending
            smallest = descending.masked_fill(larger >= self.top_p, math.inf).amin(1, keepdim=True)
            p = p.masked_fill(p < smallest, 0.0)
            p = p / p.sum(1, keepdim=True)
        return p

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(B,) int64 codes from logits (B, K) and uniform numbers (B,) on [0, 1)."""
        cumulative = self.probabilities(logits).cumsum(1)
        # The first code whose cumulative sum exceeds the number; a code of probability 0 is never drawn.
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        return (cumulative <= target).sum(1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def generate(
    state: SamplingState, uniform: Tensor, sampler: LogitSampler, guidance: float | None = None
) -> Tensor:
    """(B, T) int64 codes in raster order.

    Args:
        state: Of B maps; with guidance of 2B: first with their labels, then the same without.
        uniform: (B, T) on [0, 1): one number per code.
        sampler: Draws each code.
        guidance: g, or None for no guidance.
    """
    drawn = []
    for numbers in uniform.unbind(1):
        logits = state.logits()
        if guidance is not None:
            labelled, free = logits.chunk(2)
            logits = free + guidance * (labelled - free)
        codes = sampler.draw(logits, numbers)
        state.append(codes if guidance is None else torch.cat([codes, codes]))
        drawn.append(codes)
    return torch.stack(drawn, 1)
