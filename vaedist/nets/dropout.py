"""Dropout whose masks belong to the sample.

torch's dropout draws from a global generator, so that a mask depends on how many processes there are and on what
ran before. Here a hash of (the sample's seed, the layer, the element's position), computed on the device, decides
whether an element is kept: the same on every world size, under `torch.compile` and after a resume, and without state
to save.

The hash is a 32-bit multiply-xorshift finaliser (two multiplications, three shifts; the constants are those of C.
Wellons' "hash-prospector", chosen below 2^31 so that every product fits in int64). One hash decides two elements,
16 bits each, so that a rate is exact to 2^-16; kept elements are divided by the probability to be kept
(Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting").
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaedist.core.context import Context

_WORD = (1 << 32) - 1


def sample_seeds(ctx: Context, rows: int) -> Tensor:
    """(rows,) int64 in [0, 2^32): one seed per sample of this process, of this step."""
    # 24 bits are what a uniform number in fp32 carries.
    bits = (ctx.uniform("dropout", (rows, 2)).double() * (1 << 24)).long()
    return _hash(bits[:, 0] ^ _hash(bits[:, 1]))


def dropout(x: Tensor, rate: float, seeds: Tensor | None, layer: int) -> Tensor:
    """`x` (B, ...) with a share `rate` of its elements set to 0 and the others divided by 1 - rate.

    Args:
        x: Features.
        rate: In [0, 1), rounded to a multiple of 2^-16.
        seeds: (B,) from `sample_seeds`; None: nothing is dropped (evaluation).
        layer: Number of this use in the network: uses with different numbers drop independently.
    """
    threshold = round(rate * (1 << 16))
    if seeds is None or threshold == 0:
        return x
    count = x[0].numel()
    half = (count + 1) // 2
    state = _hash((seeds + 0x632BE5AB * (layer + 1)) & _WORD)
    positions = _hash(torch.arange(half, device=x.device))
    word = _hash(positions ^ state[:, None])
    draw = torch.cat([word & 0xFFFF, word >> 16], 1)[:, :count].view(x.shape)
    return torch.where(draw >= threshold, x / (1 - threshold / (1 << 16)), x.new_zeros(()))


def _hash(x: Tensor) -> Tensor:
    """A bijection on [0, 2^32), held in int64."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)
