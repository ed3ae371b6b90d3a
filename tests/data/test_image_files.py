"""Decoding: every rule of the table in vaedist/data/format/image_files.py, and every limit."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.data.format.image_files import BadImage, Limits, decode, read_file

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb() -> np.ndarray:
    return np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)


def test_gray_and_rgb_are_themselves() -> None:
    assert (decode(file_of(Image.fromarray(RAMP))) == RAMP).all()
    assert (decode(file_of(Image.fromarray(rgb()))) == rgb()).all()
    assert (decode(file_of(Image.fromarray(rgb()), "BMP")) == rgb()).all()


def test_bilevel_becomes_0_and_255() -> None:
    picture = decode(file_of(Image.fromarray(RAMP > 100)))
    assert (picture == np.where(RAMP > 100, 255, 0)).all()


def test_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert decode(file_of(image)).tolist() == [[[200, 100, 50], [10, 20, 30]]]


def test_palette_with_a_transparent_colour_is_laid_over_black() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert decode(file_of(image, transparency=1)).tolist() == [[[0, 0, 0], [10, 20, 30]]]


def test_alpha_is_laid_over_black() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 100, 0, 255), (255, 100, 0, 0), (200, 100, 50, 128)])
    opaque, hidden, half = decode(file_of(image))[0].tolist()
    assert opaque == [255, 100, 0]
    assert hidden == [0, 0, 0]
    assert np.abs(np.array(half) - np.array([100, 50, 25])).max() <= 1


def test_gray_with_alpha_stays_gray() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(200, 255), (200, 0)])
    assert decode(file_of(image)).tolist() == [[200, 0]]


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    picture = decode(file_of(image, "TIFF"))
    assert picture.shape == (1, 1, 3)
    assert picture[0, 0].tolist() == [255, 0, 0]


def test_16_bit_gray_keeps_the_types_full_range() -> None:
    values = np.array([[0, 128, 257, 32768, 65535, 65406]], np.uint16)
    picture = decode(file_of(Image.fromarray(values)))
    assert picture.tolist() == [[0, 0, 1, 128, 255, 254]]  # round(value / 257), the same for every image


def test_floating_point_and_wide_integers_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point"):
        decode(file_of(Image.fromarray(RAMP.astype(np.float32)), "TIFF"))
    with pytest.raises(BadImage, match=r"outside 0\.\.65535"):
        decode(file_of(Image.fromarray(RAMP.astype(np.int32) * 10000), "TIFF"))


def test_the_first_frame_counts() -> None:
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
    picture = decode(file_of(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert (picture == 10).all()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right-hand side
    assert (decode(file_of(Image.fromarray(RAMP), exif=exif)) == np.rot90(RAMP, -1)).all()


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_truncated_files_are_refused(kept: float) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, 64), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "BMP"):
        data = file_of(Image.fromarray(noise), kind)
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * kept)])


def test_flipped_bytes_in_a_png_are_refused() -> None:
    data = bytearray(file_of(Image.fromarray(np.tile(RAMP, (8, 8)))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage, match="damaged"):
        decode(bytes(data))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(BadImage, match="not an image"):
        decode(b"key,subject\n1,2\n")
    with pytest.raises(BadImage, match="0 bytes"):
        decode(b"")
    # A format whose reader would run another program is never opened.
    with pytest.raises(BadImage, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9000, 16000, 60000])
def test_decompression_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(BadImage, match="--max-pixels"):
        decode(bomb(side, side))


def test_the_pixel_limit_is_the_one_given() -> None:
    with pytest.raises(BadImage, match="announces 8 x 6 pixels, more than 47"):
        decode(file_of(Image.fromarray(RAMP)), Limits(pixels=47))
    assert decode(file_of(Image.fromarray(RAMP)), Limits(pixels=48)).shape == (6, 8)


def test_files_are_read_within_the_byte_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_file(path, Limits(bytes=100)) == b"x" * 100
    with pytest.raises(BadImage, match="--max-bytes"):
        read_file(path, Limits(bytes=99))
    with pytest.raises(BadImage, match="cannot be read"):
        read_file(tmp_path / "b", Limits())
