"""Arrays to pictures: uint8 conversion, grids, PNG and GIF files, figures. It loads numpy and Pillow only, and
matplotlib where a figure is drawn.

Every picture and every sample metric, of real and of generated images alike, goes through uint8 (`to_uint8`):
what is measured is what the file shows.

Axes: models speak (N, C, H, W); pictures are (H, W) or (H, W, 3). `channels_last` turns one into the other.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.files import replace_file, writable

Pixels = NDArray[np.uint8]


def figure(**options: Any) -> Any:
    """A `matplotlib.figure.Figure` (with these options) whose canvas needs no screen and no pyplot."""
    with contextlib.ExitStack() as exits:
        if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ and not _home_takes_files():
            # Matplotlib would make a temporary folder for its cache, warn in five lines, and leave it behind where a
            # worker is killed. This one is removed as soon as matplotlib is imported.
            os.environ["MPLCONFIGDIR"] = exits.enter_context(tempfile.TemporaryDirectory())
            exits.callback(os.environ.pop, "MPLCONFIGDIR")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    made = Figure(**options)
    FigureCanvasAgg(made)
    return made


def figure_png(sheet: Any) -> bytes:
    """The PNG file of a matplotlib figure: a function of what is drawn and of matplotlib's version."""
    buffer = io.BytesIO()
    # Without the tag that names the version of matplotlib.
    sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _home_takes_files() -> bool:
    """Whether matplotlib can keep its settings and its cache where it wants to."""
    for variable, default in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache")):
        folder = Path(os.environ.get(variable) or Path.home() / default) / "matplotlib"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return False
        if not os.access(folder, os.W_OK):
            return False
    return True


def as_numpy(images: Any) -> NDArray[Any]:
    """A numpy array of a numpy array or a torch tensor on any device (bfloat16 becomes float32)."""
    if hasattr(images, "detach"):
        tensor = images.detach().cpu()
        return np.asarray((tensor if "bfloat16" not in str(tensor.dtype) else tensor.float()).numpy())
    return np.asarray(images)


def to_uint8(images: Any) -> Pixels:
    """Images in [0, 1] as uint8: round to nearest of 255 levels, values outside clipped, NaN shown as black.

    Args:
        images: float (..., H, W), numpy or torch; uint8 passes through unchanged.

    Returns:
        uint8, same shape.
    """
    array = as_numpy(images)
    if array.dtype == np.uint8:
        return array
    assert np.issubdtype(array.dtype, np.floating), f"images are float in [0, 1] or uint8, not {array.dtype}"
    levels = np.rint(np.clip(array, 0.0, 1.0) * 255.0)
    return np.nan_to_num(levels, nan=0.0).astype(np.uint8)


def channels_last(images: Any) -> Pixels:
    """uint8 (N, C, H, W) as (N, H, W) for one channel and (N, H, W, C) for more: what `grid` and Pillow take."""
    array = to_uint8(images)
    assert array.ndim == 4, f"expected (N, C, H, W), got {array.shape}"
    return np.ascontiguousarray(array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1))


def grid(images: Any, columns: int, pad: int = 2) -> Pixels:
    """Images side by side, row by row.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C), N >= 1.
        columns: Images per row, at least 1; the last row may be short.
        pad: Width in pixels of the border around and between images; mid-gray, so that black images show.

    Returns:
        uint8 (H', W', C): C is 1 for (N, H, W) input.
    """
    array = np.asarray(images)
    if array.ndim == 3:
        array = array[..., None]
    assert array.ndim == 4 and array.dtype == np.uint8, (
        f"uint8 (N, H, W[, C]), got {array.dtype} {array.shape}"
    )
    count, height, width, channels = array.shape
    assert count >= 1 and columns >= 1 and pad >= 0
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 128 if pad else 0, np.uint8
    )
    for i in range(rows * columns):
        top, left = pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad)
        sheet[top : top + height, left : left + width] = array[i] if i < count else 0
    return sheet


RED = (220, 40, 40)
GRAY = (128, 128, 128)


def framed(images: Any, color: tuple[int, int, int] = RED) -> Pixels:
    """Images with a frame around them, so that originals and a model's images can be told apart.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C), C = 1 or 3.
        color: Of the frame; gray, which `grid` fills with, for images that only have to match framed ones in size.

    Returns:
        uint8 (N, H + 2 w, W + 2 w, 3), w = 1 to 4 pixels, growing with the image.
    """
    array = np.asarray(images)
    array = array[..., None] if array.ndim == 3 else array
    count, height, width, _ = array.shape
    edge = min(4, max(1, min(height, width) // 28))
    result = np.empty((count, height + 2 * edge, width + 2 * edge, 3), np.uint8)
    result[:] = color
    result[:, edge:-edge, edge:-edge] = array
    return result


def png_bytes(array: Any) -> bytes:
    """A PNG file of uint8 (H, W), (H, W, 1) or (H, W, 3)."""
    from PIL import Image

    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    assert pixels.dtype == np.uint8, f"pictures are uint8, not {pixels.dtype}"
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def gif_bytes(frames: Any, *, milliseconds: int = 80, least: int = 128) -> bytes:
    """An animated GIF that repeats for ever, forwards and backwards.

    Args:
        frames: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), N >= 1.
        milliseconds: That each frame is shown.
        least: Small images are enlarged by a whole number, until they have so many pixels on their shorter side.
    """
    from PIL import Image

    array = np.asarray(frames)
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    assert array.dtype == np.uint8 and array.ndim in (3, 4), f"uint8 frames, got {array.dtype} {array.shape}"
    factor = max(1, -(-least // min(array.shape[1:3])))
    array = array.repeat(factor, axis=1).repeat(factor, axis=2)
    pictures = [Image.fromarray(frame) for frame in [*array, *array[-2:0:-1]]]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
    )
    return buffer.getvalue()


def code_maps(codes: Any, height: int, width: int) -> Pixels:
    """Grids of codes as pictures: a code has the same color at each position and in every picture.

    Args:
        codes: integers (N, h, w), at least 0.
        height, width: Of a picture; a code becomes a rectangle.

    Returns:
        uint8 (N, height, width, 3).
    """
    array = np.asarray(codes)
    assert array.ndim == 3 and np.issubdtype(array.dtype, np.integer)
    rows = np.arange(height) * array.shape[1] // height
    columns = np.arange(width) * array.shape[2] // width
    return _code_colors(array[:, rows[:, None], columns[None, :]])


def _code_colors(codes: NDArray[Any]) -> Pixels:
    """Hues a golden angle apart, so that neighboring numbers look different; three levels of saturation and value."""
    hue = (codes * 0.6180339887498949) % 1.0
    value = np.choose(codes % 3, [1.0, 0.8, 0.6])
    saturation = np.choose(codes // 3 % 3, [0.85, 0.6, 0.4])
    shade = np.stack([np.abs((hue * 6 + shift) % 6 - 3) - 1 for shift in (0.0, 4.0, 2.0)], axis=-1).clip(0, 1)
    color = value[..., None] * (1 - saturation[..., None] * (1 - shade))
    return to_uint8(color)


def save_png(path: str | Path, array: Any) -> None:
    """Write a PNG whole or not at all (temporary file in the same folder, then renamed).

    Args:
        path: Where; the folder is made if it is missing.
        array: uint8 (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        UserError: the file cannot be written.
    """
    write_atomic(path, png_bytes(array))


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary file in the same folder, fsync, rename.

    Raises:
        UserError: the file cannot be written (no permission, no space, the path is a folder).
    """
    path = Path(path)
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
