"""Exponential moving average of the weights, with its memory stated in images.

After a step on B images the average moves by `a <- d*a + (1 - d)*w` with `d = 2**(-B / h)`: a weight that is h
images old counts half. The half-life ramps up with training, h = min(half_life, 0.05 * images seen), so that a
young run is not held back by its random start (Karras et al., "Analyzing and Improving the Image Quality of
StyleGAN", 2020, section B; the same rule in "Elucidating the Design Space of Diffusion-Based Generative
Models", 2022). Being a function of images, it means the same at every batch size.

Buffers (codebook counts, data variance) and parameters that the variant excludes are copied, never averaged:
the mean of two codebooks is no codebook. What the variant borrows is frozen; the average holds the same tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vaedist.models.contract import Variant

RAMP = 0.05


class WeightAverage:
    """The averaged copy of a model.

    Args:
        model: The trained model; the average starts as a copy of it.
        half_life: In images.
    """

    def __init__(self, model: Variant, half_life: float) -> None:
        self.half_life = half_life
        borrowed = {id(module): module for name in model.pretrained for module in [model.get_submodule(name)]}
        self.model = copy.deepcopy(model, borrowed).requires_grad_(False).eval()
        named = zip(self.model.named_parameters(), model.parameters(), strict=True)
        pairs: list[tuple[str, Tensor, Tensor]] = [
            (name, average, source) for (name, average), source in named if average is not source
        ]
        buffers = zip(self.model.buffers(), model.buffers(), strict=True)
        self._averaged = [(average, source) for name, average, source in pairs if model.averaged(name)]
        self._copied = [(average, source) for name, average, source in pairs if not model.averaged(name)]
        self._copied += [(average, source) for average, source in buffers if average is not source]

    def decay(self, images: int, batch_size: int) -> float:
        """d for a step of `batch_size` images that brings the total to `images`."""
        return float(0.5 ** (batch_size / max(min(self.half_life, RAMP * images), 1e-8)))

    @torch.no_grad()
    def update(self, images: int, batch_size: int) -> None:
        """After an accepted step; `images` counts this step's."""
        averages, sources = (
            [average for average, _ in self._averaged],
            [source for _, source in self._averaged],
        )
        torch._foreach_lerp_(averages, sources, 1 - self.decay(images, batch_size))
        for average, source in self._copied:
            average.copy_(source)
