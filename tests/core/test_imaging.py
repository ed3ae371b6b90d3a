from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vaedist.core.errors import UserError
from vaedist.core.imaging import (
    channels_last,
    code_maps,
    gif_bytes,
    grid,
    png_bytes,
    save_png,
    to_uint8,
    write_atomic,
)


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
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    mask = os.umask(0o077)
    try:
        write_atomic(tmp_path / "private", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken"):
        write_atomic(tmp_path / "taken", b"x")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(path / "below-a-file.png", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "private", "taken"]


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_gif_plays_there_and_back(channels: tuple[int, ...]) -> None:
    frames = np.zeros((4, 20, 30, *channels), np.uint8)
    frames[:] = np.array([10, 90, 170, 250]).reshape(4, 1, 1, *[1] * len(channels))
    with Image.open(io.BytesIO(gif_bytes(frames))) as picture:
        assert picture.size == (210, 140)  # 7 times as large: at least 128 on the shorter side
        assert picture.n_frames == 6
        assert picture.info["loop"] == 0
        shown = []
        for number in range(6):
            picture.seek(number)
            shown.append(int(np.asarray(picture.convert("L"))[70, 100]))
    assert shown == pytest.approx([10, 90, 170, 250, 170, 90], abs=1)


def test_a_gif_may_be_one_frame() -> None:
    with Image.open(io.BytesIO(gif_bytes(np.full((1, 128, 128), 7, np.uint8)))) as picture:
        assert picture.size == (128, 128)
        assert picture.n_frames == 1


def test_a_code_has_one_color_everywhere() -> None:
    codes = np.arange(512).reshape(2, 16, 16)
    maps = code_maps(codes, 32, 48)
    assert maps.shape == (2, 32, 48, 3)
    cells = maps.reshape(2, 16, 2, 16, 3, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()
    colours = cells[:, :, 0, :, 0].reshape(512, 3)
    assert len(np.unique(colours, axis=0)) > 500
    other = code_maps(codes[:1, :, ::-1], 16, 16)
    assert (other[0, :, ::-1].reshape(256, 3) == colours[:256]).all()


def test_neighbouring_codes_look_different() -> None:
    colours = code_maps(np.arange(64).reshape(1, 8, 8), 8, 8).reshape(64, 3).astype(int)
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 100
