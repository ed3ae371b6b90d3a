"""Decoding an image file of unknown origin to a uint8 array, by the rules below.

Decoding is bounded before it starts: the file's bytes, and the pixels its header announces. Only raster
formats that run no other program are opened (no EPS, no PDF). A file that breaks a rule is a `BadImage` with
one sentence; nothing is repaired silently. `vaedist.data.format.resize` brings the result to the set's size and
channels.

| input | becomes |
|---|---|
| 8-bit gray, 8-bit RGB | itself |
| bilevel | gray, 0 and 255 |
| palette | the palette's colors, RGB |
| alpha (RGBA, LA, transparent palette) | laid over black, the color that `--fit pad` pads with |
| CMYK, YCbCr, LAB, HSV | RGB by Pillow's conversion, color profiles ignored |
| 16-bit gray | value / 257, rounded: the type's full range, never stretched per image |
| 16-bit RGB | the high byte of each value |
| 32-bit integers | as 16-bit gray where they fit 0..65535, else refused; floating point is refused |
| several frames | the first |
| EXIF orientation | applied |
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""(H, W) gray or (H, W, 3) RGB."""

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX")
MAX_PIXELS = 2**26
MAX_BYTES = 2**28


class BadImage(Exception):
    """This image cannot be used; the message completes the sentence `FILE ...`."""


@dataclass(frozen=True)
class Limits:
    """What one input file may ask for; the checks raise BadImage."""

    pixels: int = MAX_PIXELS
    bytes: int = MAX_BYTES

    def check_pixels(self, width: int, height: int) -> None:
        if width * height > self.pixels:
            raise BadImage(f"announces {width} x {height} pixels, more than {self.pixels:,} (--max-pixels)")

    def check_bytes(self, size: int) -> None:
        if size > self.bytes:
            raise BadImage(f"has more than {self.bytes:,} bytes (--max-bytes)")


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
    limits.check_bytes(len(data))
    return data


def read_picture(path: str | Path, limits: Limits | None = None) -> Picture:
    """Read and decode one image file.

    Raises:
        BadImage: as `read_file` and `decode` raise it.
    """
    return decode(read_file(path, limits or Limits()), limits)


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
            limits.check_pixels(*image.size)
            image.load()
            return _to_uint8(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadImage("is not an image that can be decoded here") from None
    except Image.DecompressionBombError:
        raise BadImage(f"announces more than {limits.pixels:,} pixels (--max-pixels)") from None
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("needs more memory to decode than there is") from None
    except Exception as error:  # noqa: BLE001 - a damaged file can make a decoder raise anything
        raise BadImage(f"is damaged: {str(error) or type(error).__name__}") from None


def _to_uint8(image) -> Picture:  # type: ignore[no-untyped-def]
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
