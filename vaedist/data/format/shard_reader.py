"""Reading shards: from their bytes to pixels, or to codes, with every byte checked on the way.

A shard is read in one pass into memory, whole (training, which permutes inside it) or a run of rows of it
(evaluation, and filling the memory cache). What lies between the images, which is tar headers and the other
members, is checked as it is read; an image is checked when it is decoded. So each byte is checked once, and no
damage passes silently: a header that webdataset's reader takes for the end of the archive is an error here. A damaged
copy (`vaedist.data.loading.staging`) is replaced by its original.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import DataError
from vaedist.data.format.index import Index
from vaedist.data.format.sample_codec import decode_sample
from vaedist.data.format.split import Shard, Split

_ADVICE = (
    "copy the shard again from a sound packed folder, or take the sample out with "
    "`vaedist-shard --remove-samples`"
)


class ShardReader:
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
        self._split, self._info, self._dtype = split, index.info, index.dtype
        rows = len(self.columns)
        self._first, self._stop = first, rows if stop is None else stop
        assert 0 <= first < self._stop <= rows
        self._base = int(self.columns.offset[first - 1] + self.columns.size[first - 1]) if first else 0
        entry = split.shards[shard]
        try:
            self._load(entry)
        except DataError as error:
            self._load(split.use_original(entry, entry.tar, error))

    def _load(self, entry: Shard) -> None:
        """Read the rows' bytes from one file, and check what lies between the images."""
        columns, rows, first, stop = self.columns, len(self.columns), self._first, self._stop
        ends = (columns.offset[first:stop] + columns.size[first:stop]).tolist()
        starts = columns.offset[first:stop].tolist()
        data = self._read(entry, entry.bytes if stop == rows else ends[-1])
        view, position = data.data, self._base
        leads = columns.lead[first : stop + 1].tolist()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if zlib.crc32(view[position - self._base : start - self._base]) != leads[row]:
                what = f"the {start - position} bytes of tar headers before it changed"
                raise self._damage(entry, first + row, position, what)
            position = end
        if stop == rows and zlib.crc32(view[position - self._base :]) != leads[-1]:
            what = "the bytes after it, at the end of the shard, changed"
            raise self._damage(entry, rows - 1, position, what)
        # Together, and so in one assignment: another thread may be decoding.
        self._loaded = entry, data

    def _read(self, entry: Shard, end: int) -> NDArray[np.uint8]:
        data = np.empty(end - self._base, np.uint8)  # unlike bytearray, not zeroed first
        try:
            with open(entry.tar, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.bytes:
                    raise self._wrong_size(entry, size)
                file.seek(self._base)
                view = data.data
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise self._wrong_size(entry, end - len(view))
                    view = view[got:]
        except OSError as error:
            what = f"the shard cannot be read ({error.strerror})"
            raise self._damage(entry, self._first, self._base, what) from None
        return data

    def _wrong_size(self, entry: Shard, size: int) -> DataError:
        cut = np.flatnonzero(self.columns.offset + self.columns.size > size)
        row = int(cut[0]) if len(cut) else len(self.columns) - 1
        return self._damage(entry, row, size, f"the shard has {size} bytes and the index says {entry.bytes}")

    def _damage(self, entry: Shard, row: int, offset: int, what: str) -> DataError:
        key = self.columns.keys[row]
        return DataError(f"{entry.tar}: sample {key!r} at byte {offset}: {what}; {_ADVICE}")

    def decode(self, row: int, out: NDArray[Any]) -> None:
        """Write the image of `row` into `out`, (C, H, W) uint8; or its codes, (1, h, w) of any type that holds them.

        Raises:
            DataError: its bytes changed, or are not a sample of the declared shape.
        """
        offset = int(self.columns.offset[row])
        start = offset - self._base
        entry, loaded = self._loaded
        data = loaded.data[start : start + int(self.columns.size[row])]
        if zlib.crc32(data) != self.columns.crc[row]:
            changed = self._damage(entry, row, offset, f"its {len(data)} bytes changed (CRC-32 differs)")
            self._load(self._split.use_original(entry, entry.tar, changed))
            self.decode(row, out)
            return
        try:
            pixels = decode_sample(data, self._info.shape, self._info.codec, self._dtype)
        except ValueError as error:
            raise self._damage(entry, row, offset, str(error)) from None
        if pixels.ndim == 2:
            out[0] = pixels
        else:
            out[:] = pixels.transpose(2, 0, 1)
