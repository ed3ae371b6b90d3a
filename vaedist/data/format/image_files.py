"""From a stranger's image file to one uint8 array of the set's size and channels, by rules written here.

Decoding is bounded before it starts: the file's bytes, and the pixels its header announces. Only raster
formats that run no other program are opened (no EPS, no PDF). A file that breaks a rule is a `BadImage` with
one sentence; nothing is mended silently.

| input | becomes |
|---|---|
| 8-bit gray, 8-bit RGB | itself |
| bilevel | gray, 0 and 255 |
| palette | the palette's colours, RGB |
| alpha (RGBA, LA, transparent palette) | laid over black, the colour that `--fit pad` pads with |
| CMYK, YCbCr, LAB, HSV | RGB by Pillow's conversion, colour profiles ignored |
| 16-bit gray | value / 257, rounded: the type's full range, never stretched per image |
| 16-bit RGB | the high byte of each value |
| 32-bit integers | as 16-bit gray where they fit 0..65535, else refused; floating point is refused |
| several frames | the first |
| EXIF orientation | applied |
| colour in a gray set | luma, 0.299 R + 0.587 G + 0.114 B, when `--gray` was said; else refused |
| gray in an RGB set | three equal channels |

Fitting to a square of S pixels: `pad` scales the longer side to S and centres the picture on black, `crop`
scales the shorter side to S and cuts the middle, `stretch` scales both sides. Scaling is bicubic,
with Pillow's anti-aliasing when it shrinks. A picture that has the size already is not touched.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError

Picture = NDArray[np.uint8]
"""(H, W) gray or (H, W, 3) RGB."""

Fit = Literal["pad", "crop", "stretch"]
Codec = Literal["png", "npy"]

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX")
MAX_PIXELS = 2**26
MAX_BYTES = 2**28


class BadImage(Exception):
    """This image cannot be used; the message completes the sentence `FILE ...`."""


@dataclass(frozen=True)
class Limits:
    """What one input file may ask for."""

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES


def read_file(path: str | Path, limits: Limits) -> bytes:
    """A whole file, if it is one and not too large.

    Raises:
        BadImage: unreadable, empty or over the limit.
    """
    try:
        # O_NONBLOCK: a pipe that took the file's place since it was listed must not hang the run.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limits.bytes + 1)
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    if not data:
        raise BadImage("is empty (0 bytes)")
    if len(data) > limits.bytes:
        raise BadImage(f"has more than {limits.bytes:,} bytes (--max-bytes)")
    return data


def decode(data: bytes, limits: Limits | None = None) -> Picture:
    """An image file's bytes as (H, W) or (H, W, 3) uint8, by the module's table.

    Raises:
        BadImage: not an image, damaged, of an unknown range, or larger than the limits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    limits = limits or Limits()
    if not data:
        raise BadImage("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > limits.pixels:
                raise BadImage(
                    f"announces {width} x {height} pixels, more than {limits.pixels:,} (--max-pixels)"
                )
            image.load()
            return _to_bytes(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadImage("is not an image that can be decoded here") from None
    except Image.DecompressionBombError:
        raise BadImage(f"announces more than {limits.pixels:,} pixels (--max-pixels)") from None
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("needs more memory to decode than there is") from None
    except Exception as error:  # noqa: BLE001 - a hostile file can make a decoder raise anything
        raise BadImage(f"is damaged: {str(error) or type(error).__name__}") from None


def _to_bytes(image) -> Picture:  # type: ignore[no-untyped-def]
    from PIL import Image

    mode = image.mode
    if mode == "F":
        raise BadImage("holds floating-point pixels, whose range nobody knows: save it as 8 or 16 bits")
    if mode == "I" or mode.startswith("I;"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("holds integer pixels outside 0..65535: save it as 8 or 16 bits")
        return np.asarray((values * 2 + 257) // 514, np.uint8)  # value / 257, rounded
    if mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA")
    elif mode == "L" and "transparency" in image.info:
        image = image.convert("LA")
    elif mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        gray = image.mode == "LA"
        image = Image.alpha_composite(black, image.convert("RGBA")).convert("L" if gray else "RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return np.array(image, np.uint8)


def to_channels(picture: Picture, channels: int, convert: bool) -> Picture:
    """`picture` as (H, W) for one channel or (H, W, 3) for three.

    Args:
        picture: (H, W) or (H, W, 3).
        channels: 1 or 3.
        convert: Whether colour may become gray.

    Raises:
        BadImage: colour in a gray set, and `convert` is false.
    """
    from PIL import Image

    if channels == 3 and picture.ndim == 2:
        return np.repeat(picture[..., None], 3, axis=2)
    if channels == 1 and picture.ndim == 3:
        if not convert:
            raise BadImage("is in colour and the set is gray: say --gray to convert it or --rgb for all")
        return np.asarray(Image.fromarray(picture).convert("L"))
    return picture


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


def resize(picture: Picture, height: int, width: int) -> Picture:
    """Bicubic, anti-aliased when shrinking."""
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def open_fitting(path: str | Path, shape: tuple[int, ...], fit: Fit) -> Picture:
    """One of the user's files as uint8 (C, H, W) of a model's shape, by the rules that packing follows.

    Raises:
        UserError: it cannot be read or is no image.
    """
    channels, height, width = shape
    limits = Limits()
    try:
        picture = to_channels(decode(read_file(path, limits), limits), channels, convert=True)
    except BadImage as error:
        raise UserError(f"{path} {error}: give an image file (png, jpg, ...)") from None
    if height == width:
        return channels_first(fit_square(picture, height, fit))
    return channels_first(resize(picture, height, width))


def encode(picture: Picture, codec: Codec) -> tuple[bytes, int]:
    """A tar member, and how many of its first bytes come before the data that the index points at.

    Both codecs are lossless. A PNG is its own data; of an npy file the raw C-order bytes past its header are.
    """
    buffer = io.BytesIO()
    if codec == "npy":
        np.lib.format.write_array(buffer, np.ascontiguousarray(picture), version=(1, 0))
        return buffer.getvalue(), buffer.tell() - picture.nbytes
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue(), 0


def channels_first(picture: Picture) -> Picture:
    """(C, H, W) of (H, W) or (H, W, 3)."""
    return picture[None] if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(2, 0, 1))
