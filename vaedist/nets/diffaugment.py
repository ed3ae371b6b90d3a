"""Differentiable augmentation of what a discriminator sees, real and generated alike.

    D sees T(x) and T(G(z)),   T differentiable, drawn anew for every image

A discriminator soon memorizes a small set of images. Augmenting the real images alone would teach the generator the
augmentations; augmenting both sides, with a gradient through T, does not. Zhao et al., "Differentiable augmentation
for data-efficient GAN training", equations 4 to 6. On images in [-1, 1], with u uniform on [0, 1):

| kind | definition |
|---|---|
| `color` | brightness: x + u - 1/2; saturation: distance from a pixel's mean over channels times 2u; |
| | contrast: distance from the image's mean times u + 1/2 |
| `translation` | by a whole number of pixels, uniform up to an eighth of each side; pixels from outside are 0 |
| `cutout` | a rectangle of half of each side is 0; its centre lies anywhere in the image |

The random numbers come from the context under the caller's `name` and belong to the sample: two calls with the same
name augment two images of a row alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vaedist.core.context import Context
from vaedist.nets.adversarial_config import Augmentation

_LARGEST_SHIFT = 1 / 8
_HOLE = 1 / 2


def augment(image: Tensor, kinds: Sequence[Augmentation], ctx: Context, name: str) -> Tensor:
    """(B, C, H, W) in [-1, 1] augmented by `kinds` in their order, with gradient to `image`.

    Args:
        image: One process's rows of a batch.
        kinds: If empty, the image is returned as it is.
        ctx: The source of the noise.
        name: Of the noise.
    """
    for kind in kinds:
        image = {"color": _color, "translation": _translation, "cutout": _cutout}[kind](image, ctx, name)
    return image


def _color(image: Tensor, ctx: Context, name: str) -> Tensor:
    rows = (image.shape[0], 3, 1, 1, 1)
    brightness, saturation, contrast = ctx.uniform(f"{name}.color", rows).to(image.dtype).unbind(1)
    image = image + (brightness - 0.5)
    grey = image.mean(1, keepdim=True)
    image = grey + (image - grey) * (2 * saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + (image - mean) * (contrast + 0.5)


def _translation(image: Tensor, ctx: Context, name: str) -> Tensor:
    rows, _, height, width = image.shape
    uniform = ctx.uniform(f"{name}.translation", (rows, 2))
    sources = []
    for axis, side in enumerate((height, width)):
        largest = round(side * _LARGEST_SHIFT)
        shift = (uniform[:, axis] * (2 * largest + 1)).long() - largest
        # Indices in the padded image, whose border is 0: a pixel from outside is read there.
        source = torch.arange(side, device=image.device) + 1 - shift[:, None]
        sources.append(source.clamp(0, side + 1))
    padded = functional.pad(image, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    row = torch.arange(rows, device=image.device)[:, None, None]
    return padded[row, sources[0][:, :, None], sources[1][:, None, :]].permute(0, 3, 1, 2)


def _cutout(image: Tensor, ctx: Context, name: str) -> Tensor:
    rows, _, height, width = image.shape
    uniform = ctx.uniform(f"{name}.cutout", (rows, 2))
    inside = []
    for axis, side in enumerate((height, width)):
        size = round(side * _HOLE)
        start = (uniform[:, axis] * (side + 1 - size % 2)).long() - size // 2
        position = torch.arange(side, device=image.device)
        inside.append((position >= start[:, None]) & (position < start[:, None] + size))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return image.masked_fill(hole, 0)
