"""The image member of a sample: what is encoded is decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest

from vaedist.data.format.image_files import decode
from vaedist.data.format.sample_codec import encode

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


@pytest.mark.parametrize("picture", [RAMP, RGB])
def test_both_codecs_are_lossless(picture: np.ndarray) -> None:
    member, skip = encode(picture, "png")
    assert skip == 0
    assert (decode(member) == picture).all()
    member, skip = encode(picture, "npy")
    assert (np.frombuffer(member[skip:], np.uint8).reshape(picture.shape) == picture).all()
    assert (np.load(io.BytesIO(member)) == picture).all()
