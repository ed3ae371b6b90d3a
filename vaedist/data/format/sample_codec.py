"""The image member of a sample in a shard, png or npy: encoding and decoding, both lossless.

Only these two decoders can run, whatever the bytes say, and a PNG whose size or mode is not what the index declares
is refused before it is decompressed.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from vaedist.data.format.image_files import Picture

Codec = Literal["png", "npy"]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def encode(picture: Picture, codec: Codec) -> tuple[bytes, int]:
    """A tar member, and how many of its first bytes come before the data that the index points at.

    A PNG is its own data; of an npy file the raw C-order bytes past its header are.
    """
    buffer = io.BytesIO()
    if codec == "npy":
        np.lib.format.write_array(buffer, np.ascontiguousarray(picture), version=(1, 0))
        member = buffer.getvalue()
        return member, len(member) - picture.nbytes
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue(), 0


def decode_sample(
    data: bytes | memoryview, shape: tuple[int, ...], codec: str, dtype: DTypeLike = np.uint8
) -> NDArray[Any]:
    """The sample whose data (as the index points at them) are `data`, (H, W) or (H, W, C).

    Raises:
        ValueError: they are not a sample of that shape.
    """
    channels, height, width = shape
    expected = (height, width) if channels == 1 else (height, width, channels)
    if codec == "npy":
        stored = np.dtype(dtype).newbyteorder("<")
        if len(data) != channels * height * width * stored.itemsize:
            raise ValueError(f"{len(data)} bytes are not a sample of shape {shape}")
        return np.frombuffer(data, stored).reshape(expected)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size == (width, height) and image.mode == _MODES.get(channels):
                return np.asarray(image)
            found = f"a {image.size[0]}x{image.size[1]} image of mode {image.mode}"
    except Exception as error:  # noqa: BLE001 - a damaged file can make a decoder raise anything
        raise ValueError(f"the png does not decode ({type(error).__name__}: {error})") from None
    raise ValueError(f"it is {found}, and the index says {shape}")


def channels_first(picture: Picture) -> Picture:
    """(C, H, W) of (H, W) or (H, W, 3)."""
    return picture[None] if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(2, 0, 1))
