from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vaedist.errors import UserError
from vaedist.pictures import channels_last, grid, png_bytes, save_png, to_uint8, write_whole


def test_to_uint8_rounds_to_nearest_and_clips() -> None:
    levels = np.array([0.0, 0.49 / 255, 0.51 / 255, 127.4 / 255, 1.0, 1.7, -0.2, np.nan])
    expected = [0, 0, 1, 127, 255, 255, 0, 0]
    assert to_uint8(levels).tolist() == expected
    assert to_uint8(torch.tensor(levels)).tolist() == expected
    everything = np.arange(256, dtype=np.uint8)
    assert (to_uint8(everything / 255) == everything).all()
    assert (to_uint8(torch.tensor(everything / 255, dtype=torch.float32)) == everything).all()


def test_to_uint8_takes_bfloat16_and_keeps_uint8_but_no_other_integers() -> None:
    assert to_uint8(torch.ones(2, dtype=torch.bfloat16)).tolist() == [255, 255]
    assert to_uint8(torch.tensor([7], dtype=torch.uint8)).tolist() == [7]
    with pytest.raises(AssertionError):
        to_uint8(np.array([1, 2]))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_puts_each_image_where_it_belongs(channels: int) -> None:
    images = np.arange(5 * channels * 4 * 6, dtype=np.uint8).reshape(5, channels, 4, 6)
    sheet = grid(channels_last(images), columns=3, pad=2)
    assert sheet.shape == (2 * 6 + 2, 3 * 8 + 2, channels)
    for i in range(5):
        top, left = 2 + (i // 3) * 6, 2 + (i % 3) * 8
        assert (sheet[top : top + 4, left : left + 6] == images[i].transpose(1, 2, 0)).all()
    assert (sheet[:2] == 128).all()
    assert (sheet[8:12, 18:24] == 0).all()  # the empty place


def test_grid_is_no_wider_than_its_images_and_needs_no_border() -> None:
    images = np.arange(2 * 9, dtype=np.uint8).reshape(2, 3, 3)
    assert grid(images, columns=8).shape == (7, 12, 1)
    assert (grid(images, columns=2, pad=0)[..., 0] == np.hstack(list(images))).all()


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_png_is_lossless_and_its_bytes_are_a_function_of_its_pixels(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    save_png(tmp_path / "new" / "a.png", pixels)
    read = np.asarray(Image.open(tmp_path / "new" / "a.png"))
    assert (read.reshape(shape) == pixels).all()
    assert (tmp_path / "new" / "a.png").read_bytes() == png_bytes(pixels) == png_bytes(pixels.copy())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    mask = os.umask(0o077)
    try:
        write_whole(tmp_path / "private", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken"):
        write_whole(tmp_path / "taken", b"x")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(path / "below-a-file.png", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "private", "taken"]
