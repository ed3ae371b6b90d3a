"""The shards of one split, and the samples in them by number."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaedist.core.errors import DataError
from vaedist.data.format.columns import Columns

_log = logging.getLogger("vaedist")

FACTS = ("count", "bytes", "sha256", "columns_sha256")
"""What `index.json` and receipts say of a shard besides the names of its files."""
_COLUMNS_CACHED = 64  # shards per split whose columns stay in memory: about 20 MB at 3,000 samples each


@dataclass(frozen=True)
class Shard:
    """One tar and its columns."""

    tar: Path
    columns_path: Path
    count: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    columns_sha256: str
    original: Shard | None = None
    """The shard in the shared folder of which the two files are copies (`vaedist.data.loading.staging`)."""

    @classmethod
    def of(cls, tar: Path, columns: Path, facts: Mapping[str, Any]) -> Shard:
        return cls(tar, columns, **{name: facts[name] for name in FACTS})

    @property
    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FACTS}


class Split:
    """The samples of one split, numbered in index order: shard after shard, row after row.

    Attributes:
        name: `train`, `validate`, ...
        shards: In index order.
        count: Samples, N.
        counts: (shards,) int64 samples per shard.
        starts: (shards + 1,) int64; the first sample number of each shard, then N.
    """

    def __init__(self, name: str, shards: Sequence[Shard]) -> None:
        self.name, self.shards = name, tuple(shards)
        self.counts = np.array([shard.count for shard in self.shards], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        self.count = int(self.starts[-1])
        self._cached: OrderedDict[int, Columns] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, shard: int) -> Columns:
        """Columns of shard number `shard`, read and checked at the first use.

        Raises:
            DataError: the file is missing or damaged.
        """
        with self._lock:
            cached = self._cached.get(shard)
            if cached is not None:
                self._cached.move_to_end(shard)
                return cached
        entry = self.shards[shard]
        try:
            columns = Columns.read(entry.columns_path, entry.columns_sha256)
        except DataError as error:
            entry = self.use_original(entry, entry.columns_path, error)
            columns = Columns.read(entry.columns_path, entry.columns_sha256)
        if len(columns) != entry.count or columns.offset[-1] + columns.size[-1] > entry.bytes:
            path, tar = entry.columns_path, entry.tar.name
            raise DataError(f"{path} does not fit {tar}; pack or index the data again")
        with self._lock:
            self._cached[shard] = columns
            while len(self._cached) > _COLUMNS_CACHED:
                self._cached.popitem(last=False)
        return columns

    def all_columns(self) -> Iterator[Columns]:
        """The columns of each shard, in order."""
        return (self.columns(shard) for shard in range(len(self.shards)))

    def use_original(self, copied: Shard, file: Path, error: DataError) -> Shard:
        """The original of a damaged copy; from now on this split reads originals only.

        Args:
            copied: One of our shards.
            file: The one of its two files that is damaged or gone; removed, so that the next start copies it anew.
            error: What is wrong.

        Raises:
            DataError: `error`, where the shard is no copy.
        """
        if copied.original is None:
            raise error
        with self._lock:
            first = any(shard.original for shard in self.shards)
            self.shards = tuple(shard.original or shard for shard in self.shards)
        if first:
            what = str(error).partition(";")[0]
            _log.warning("staging: %s; reading %s itself", what, copied.original.tar.parent)
        with contextlib.suppress(OSError):
            file.unlink()
        return copied.original

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, row in the shard) of a sample number."""
        if not 0 <= sample < self.count:
            raise IndexError(sample)
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return self.columns(shard).keys[row]

    def subject(self, sample: int) -> str:
        """Subject of a sample; an empty string where the source does not say."""
        shard, row = self.locate(sample)
        return self.columns(shard).subject(row)

    def label(self, sample: int) -> int:
        """Class number; -1 where the sample has none."""
        shard, row = self.locate(sample)
        return int(self.columns(shard).label[row])

    def subjects(self) -> set[str]:
        """All named subjects."""
        return {columns.subject(row) for columns in self.all_columns() for row in range(len(columns))} - {""}
