"""Contact sheets: 64 samples of a split on one page, so that a person sees what was packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vaedist.core.errors import DataError
from vaedist.core.imaging import grid, save_png
from vaedist.data.format.image_files import Picture
from vaedist.data.format.index import DatasetInfo
from vaedist.data.format.resize import resize
from vaedist.data.format.sample_codec import decode_sample
from vaedist.data.format.split import Split

SAMPLES = 64
COLUMNS = 8
_STRIP = 15  # pixels under a picture for the name of its class
_TITLE = 26


def write_contact_sheet(folder: Path, split: Split, info: DatasetInfo) -> Path:
    """Write `contact-<split>.png`: samples evenly spread over the split, in index order.

    Returns:
        Its path.

    Raises:
        DataError: one of them is damaged.
    """
    count, classes = min(SAMPLES, split.count), info.classes
    chosen = [i * split.count // count for i in range(count)]
    cells = []
    for sample in chosen:
        shard, row = split.locate(sample)
        columns = split.columns(shard)
        offset, size = int(columns.offset[row]), int(columns.size[row])
        tar = split.shards[shard].tar
        try:
            with open(tar, "rb") as file:
                file.seek(offset)
                picture = _thumbnail(decode_sample(file.read(size), info.shape, info.codec))
        except (OSError, ValueError) as error:
            key = columns.keys[row]
            raise DataError(f"{tar}: sample {key!r} at byte {offset} cannot be shown: {error}") from None
        label = int(columns.label[row])
        name = classes[label] if 0 <= label < len(classes) else ""
        cells.append(_add_class_name(picture, name) if classes else picture)
    sheet = grid(np.stack(cells), COLUMNS)
    channels, height, width = info.shape
    color = "gray" if channels == 1 else "colour"
    title = f"{split.name}: {split.count:,} images, {width} x {height} {color}"
    title += f", {len(classes)} classes" if classes else ""
    title += f"; every {split.count // count}th is shown" if split.count > 2 * count else ""
    head = np.full((_TITLE, *sheet.shape[1:]), 255, np.uint8)
    path = folder / f"contact-{split.name}.png"
    save_png(path, np.concatenate([_draw_text(head, title, 15, (6, 3)), sheet]))
    return path


def _thumbnail(picture: Picture) -> Picture:
    """Between 96 and 160 pixels on the longer side: whole multiples when small, so that pixels stay visible."""
    longer = max(picture.shape[:2])
    if longer > 160:
        height, width = (max(1, round(side * 128 / longer)) for side in picture.shape[:2])
        return resize(picture, height, width)
    times = max(1, -(-96 // longer))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _add_class_name(picture: Picture, name: str) -> Picture:
    strip = np.full((_STRIP, *picture.shape[1:]), 255, np.uint8)
    return np.concatenate([picture, _draw_text(strip, name, 11, (2, 1))])


def _draw_text(area: NDArray[np.uint8], text: str, size: int, place: tuple[int, int]) -> NDArray[np.uint8]:
    """`area`, (H, W[, C]), with dark text on it."""
    flat = area[..., 0] if area.ndim == 3 and area.shape[2] == 1 else area
    image = Image.fromarray(np.ascontiguousarray(flat))
    dark = 40 if image.mode == "L" else (40, 40, 40)
    shown = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(image).text(place, shown, fill=dark, font=ImageFont.load_default(size))
    return np.array(image).reshape(area.shape)
