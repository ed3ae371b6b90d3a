"""Bringing pictures to the set's size and channels."""

from __future__ import annotations

import numpy as np
import pytest

from vaedist.data.format.image_files import BadImage
from vaedist.data.format.resize import fit_square, to_channels

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def test_channels() -> None:
    assert (to_channels(RAMP, 3, convert=False) == RAMP[..., None]).all()
    assert to_channels(RGB, 3, convert=False) is not None
    luma = 0.299 * RGB[..., 0] + 0.587 * RGB[..., 1] + 0.114 * RGB[..., 2]
    assert np.abs(to_channels(RGB, 1, convert=True) - luma).max() <= 1
    with pytest.raises(BadImage, match="colour"):
        to_channels(RGB, 1, convert=False)


def test_pad_keeps_everything_on_black() -> None:
    picture = np.full((4, 8), 200, np.uint8)
    square = fit_square(picture, 8, "pad")
    assert (square[2:6] == 200).all()
    assert (square[:2] == 0).all()
    assert (square[6:] == 0).all()


def test_crop_takes_the_middle() -> None:
    picture = np.repeat(np.arange(8, dtype=np.uint8)[None] * 10, 4, axis=0)
    assert (fit_square(picture, 4, "crop") == picture[:, 2:6]).all()


def test_stretch_scales_both_sides() -> None:
    picture = np.repeat(np.array([[0, 255]], np.uint8), 4, axis=0).repeat(4, axis=1)
    square = fit_square(picture, 16, "stretch")
    assert square.shape == (16, 16)
    assert square[:, 0].max() < 20
    assert square[:, -1].min() > 235


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 300), (300, 1), (64, 64, 3), (33, 70, 3)])
def test_every_fit_makes_a_square_of_any_shape(fit: str, shape: tuple[int, ...]) -> None:
    square = fit_square(np.full(shape, 9, np.uint8), 16, fit)  # type: ignore[arg-type]
    assert square.shape == (16, 16, *shape[2:])
    assert square.max() == 9


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (16, 16), dtype=np.uint8)
    assert (fit_square(picture, 16, "pad") == picture).all()
