"""Differentiable augmentation of what a discriminator sees, real and generated alike.

    D sees T(x) and T(G(z)),   T differentiable, drawn anew for every image

A small set of images is soon learnt by heart by a discriminator. Augmenting the real images alone would teach the
generator the augmentations; augmenting both sides, with a gradient through T, does not. Zhao et al., "Differentiable
augmentation for data-efficient GAN training", equations 4 to 6. On images in [-1, 1], with u uniform on [0, 1):

| kind | law |
|---|---|
| `color` | brightness: x + u - 1/2; saturation: distance from a pixel's mean over channels times 2u; |
| | contrast: distance from the image's mean times u + 1/2 |
| `translation` | by up to an eighth of each side, evenly, in whole pixels; what comes in is 0 |
| `cutout` | a rectangle of half of each side is 0; its centre lies anywhere in the image |

The draws come from the context under the caller's `name`, so they belong to the sample: two calls with one name
augment two images of a row alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vaedist.core.context import Context
from vaedist.nets.adversarial_config import Augmentation

_REACH = 1 / 8
_CUT = 1 / 2


def augment(image: Tensor, kinds: Sequence[Augmentation], ctx: Context, name: str) -> Tensor:
    """(B, C, H, W) in [-1, 1] augmented by `kinds` in their order, with gradient to `image`.

    Args:
        image: One process's rows of a batch.
        kinds: None: the image itself.
        ctx: Whose noise is used.
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
    level = image.mean((1, 2, 3), keepdim=True)
    return level + (image - level) * (contrast + 0.5)


def _translation(image: Tensor, ctx: Context, name: str) -> Tensor:
    rows, _, height, width = image.shape
    drawn = ctx.uniform(f"{name}.translation", (rows, 2))
    places = []
    for axis, side in enumerate((height, width)):
        reach = round(side * _REACH)
        shift = (drawn[:, axis] * (2 * reach + 1)).long() - reach
        # Place 0 of the padded image is 0: there goes whatever lies outside.
        source = torch.arange(side, device=image.device) + 1 - shift[:, None]
        places.append(source.clamp(0, side + 1))
    padded = functional.pad(image, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    row = torch.arange(rows, device=image.device)[:, None, None]
    return padded[row, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)


def _cutout(image: Tensor, ctx: Context, name: str) -> Tensor:
    rows, _, height, width = image.shape
    drawn = ctx.uniform(f"{name}.cutout", (rows, 2))
    inside = []
    for axis, side in enumerate((height, width)):
        size = round(side * _CUT)
        start = (drawn[:, axis] * (side + 1 - size % 2)).long() - size // 2
        place = torch.arange(side, device=image.device)
        inside.append((place >= start[:, None]) & (place < start[:, None] + size))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return image.masked_fill(hole, 0)
