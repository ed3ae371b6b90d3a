"""Bringing a picture to the set's size and channels.

Fitting to a square of S pixels: `pad` scales the longer side to S and centers the picture on black, `crop`
scales the shorter side to S and cuts out the middle, `stretch` scales both sides. Scaling is bicubic, with Pillow's
anti-aliasing when it shrinks. A picture that has the size already is not changed.

Color in a gray set becomes luma, 0.299 R + 0.587 G + 0.114 B, when `--gray` was said, and is refused otherwise; gray
in an RGB set becomes three equal channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import BadImage, Picture, read_picture
from vaedist.data.format.sample_codec import channels_first

Fit = Literal["pad", "crop", "stretch"]


def resize(picture: Picture, height: int, width: int) -> Picture:
    """Bicubic, anti-aliased when shrinking."""
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def fit_square(picture: Picture, size: int, fit: Fit) -> Picture:
    """`picture` as a square of `size` pixels, by the module's rule; (S, S) or (S, S, 3)."""
    height, width = picture.shape[:2]
    if (height, width) == (size, size):
        return picture
    if fit == "stretch":
        return resize(picture, size, size)
    longer = max(height, width) if fit == "pad" else min(height, width)
    rows, columns = max(1, round(height * size / longer)), max(1, round(width * size / longer))
    scaled = resize(picture, rows, columns)
    if fit == "crop":
        top, left = (rows - size) // 2, (columns - size) // 2
        return np.ascontiguousarray(scaled[top : top + size, left : left + size])
    square = np.zeros((size, size, *picture.shape[2:]), np.uint8)
    top, left = (size - rows) // 2, (size - columns) // 2
    square[top : top + rows, left : left + columns] = scaled
    return square


def to_channels(picture: Picture, channels: int, convert: bool) -> Picture:
    """`picture` as (H, W) for one channel or (H, W, 3) for three.

    Args:
        picture: (H, W) or (H, W, 3).
        channels: 1 or 3.
        convert: Whether color may become gray.

    Raises:
        BadImage: color in a gray set, and `convert` is false.
    """
    from PIL import Image

    if channels == 3 and picture.ndim == 2:
        return np.repeat(picture[..., None], 3, axis=2)
    if channels == 1 and picture.ndim == 3:
        if not convert:
            raise BadImage("is in colour and the set is gray: say --gray to convert it or --rgb for all")
        return np.asarray(Image.fromarray(picture).convert("L"))
    return picture


def open_fitting(path: str | Path, shape: tuple[int, ...], fit: Fit) -> Picture:
    """One of the user's files as uint8 (C, H, W) of a model's shape, by the rules that packing follows.

    Raises:
        UserError: it cannot be read or is no image.
    """
    channels, height, width = shape
    try:
        picture = to_channels(read_picture(path), channels, convert=True)
    except BadImage as error:
        raise UserError(f"{path} {error}: give an image file (png, jpg, ...)") from None
    square = height == width
    return channels_first(fit_square(picture, height, fit) if square else resize(picture, height, width))
