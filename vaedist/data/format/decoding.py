"""From bytes of a shard to pixels, or to codes, checking every byte on the way.

A shard is read in one pass into memory, whole (training, which permutes inside it) or a run of rows of it
(evaluation, and filling the memory cache). What lies between the images, which is tar headers and the other
members, is checked as it is read; an image is checked when it is decoded. So each byte is checked once, and no
damage passes silently: a header that webdataset's reader takes for the end of the archive is an error here. Where
what was read is a copy (`vaedist.data.loading.staging`), the original is read in its place.

Images are png or npy members. Only these decoders can run, whatever the bytes say, and an image whose size or
mode is not what the index declares is refused before it is decompressed.
"""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vaedist.core.errors import DataError
from vaedist.data.format.index import Index, Shard, Split

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WAY_OUT = (
    "copy the shard again from a sound packed folder, or take the sample out with `vaedist-shard --strike`"
)


class Rows:
    """Rows `first` to `stop` of one shard, in memory.

    Args:
        index: The packed folder.
        split: One of its splits.
        shard: Shard number in that split.
        first, stop: Rows; default: all.

    Raises:
        DataError: the shard is missing, has another size than the index says, or the bytes between its images
            changed; names sample, shard and offset.
    """

    def __init__(
        self, index: Index, split: Split, shard: int, first: int = 0, stop: int | None = None
    ) -> None:
        self.columns = split.columns(shard)
        self._split = split
        self._shape, self._dtype, self._bytes = index.shape, index.dtype.newbyteorder("<"), index.sample_bytes
        self._png = index.codec == "png"
        rows = len(self.columns)
        self._first, self._stop = first, rows if stop is None else stop
        assert 0 <= first < self._stop <= rows
        before = self.columns.offset[first - 1] + self.columns.size[first - 1] if first else 0
        self._base = int(before)
        entry = split.shards[shard]
        try:
            self._load(entry)
        except DataError as error:
            self._load(split.without(entry, entry.tar, error))

    def _load(self, entry: Shard) -> None:
        """Read the rows' bytes from one file, and check what lies between the images."""
        columns, rows, first, stop = self.columns, len(self.columns), self._first, self._stop
        ends = (columns.offset[first:stop] + columns.size[first:stop]).tolist()
        starts = columns.offset[first:stop].tolist()
        data = self._read(entry, entry.bytes if stop == rows else ends[-1])
        view, place = data.data, self._base
        leads = columns.lead[first : stop + 1].tolist()
        for row, (start, after) in enumerate(zip(starts, ends, strict=True)):
            if zlib.crc32(view[place - self._base : start - self._base]) != leads[row]:
                raise self._damage(
                    entry.tar,
                    first + row,
                    place,
                    f"the {start - place} bytes of tar headers before it changed",
                )
            place = after
        if stop == rows and zlib.crc32(view[place - self._base :]) != leads[-1]:
            raise self._damage(
                entry.tar, rows - 1, place, "the bytes after it, at the end of the shard, changed"
            )
        # Together, and so in one assignment: another thread may be decoding.
        self._loaded = entry, data

    def _read(self, entry: Shard, end: int) -> NDArray[np.uint8]:
        start, expected, first = self._base, entry.bytes, self._first
        data = np.empty(end - start, np.uint8)  # unlike bytearray, not zeroed first
        try:
            with open(entry.tar, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected:
                    raise self._wrong_size(entry, size)
                file.seek(start)
                view = data.data
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise self._wrong_size(entry, end - len(view))
                    view = view[got:]
        except OSError as error:
            raise self._damage(
                entry.tar, first, start, f"the shard cannot be read ({error.strerror})"
            ) from None
        return data

    def _wrong_size(self, entry: Shard, size: int) -> DataError:
        cut = np.flatnonzero(self.columns.offset + self.columns.size > size)
        row = int(cut[0]) if len(cut) else len(self.columns) - 1
        return self._damage(
            entry.tar, row, size, f"the shard has {size} bytes and the index says {entry.bytes}"
        )

    def _damage(self, tar: Path, row: int, place: int, what: str) -> DataError:
        return DataError(f"{tar}: sample {self.columns.keys[row]!r} at byte {place}: {what}; {_WAY_OUT}")

    def decode(self, row: int, out: NDArray[Any]) -> None:
        """Write the image of `row` into `out`, (C, H, W) uint8; or its codes, (1, h, w) of any type that holds them.

        Raises:
            DataError: its bytes changed, or are not a sample of the declared shape.
        """
        place = int(self.columns.offset[row])
        start = place - self._base
        stop = start + int(self.columns.size[row])
        entry, held = self._loaded
        data = held.data[start:stop]
        if zlib.crc32(data) != self.columns.crc[row]:
            changed = self._damage(entry.tar, row, place, f"its {len(data)} bytes changed (CRC-32 differs)")
            self._load(self._split.without(entry, entry.tar, changed))
            self.decode(row, out)
            return
        channels, height, width = self._shape
        if self._png:
            pixels: NDArray[Any] = self._decode_png(entry.tar, row, place, data)
        elif len(data) == self._bytes:
            pixels = np.frombuffer(data, self._dtype)
        else:
            raise self._damage(
                entry.tar, row, place, f"{len(data)} bytes are not a sample of shape {self._shape}"
            )
        if channels == 1:
            out[0] = pixels.reshape(height, width)
        else:
            out[:] = pixels.reshape(height, width, channels).transpose(2, 0, 1)

    def _decode_png(self, tar: Path, row: int, place: int, data: memoryview) -> NDArray[np.uint8]:
        channels, height, width = self._shape
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.size != (width, height) or image.mode != _MODES.get(channels):
                    what = f"a {image.size[0]}x{image.size[1]} image of mode {image.mode}"
                    raise self._damage(tar, row, place, f"it is {what}, and the index says {self._shape}")
                return np.asarray(image)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a stranger's bytes can make a decoder raise anything
            raise self._damage(
                tar, row, place, f"the png does not decode ({type(error).__name__}: {error})"
            ) from None
