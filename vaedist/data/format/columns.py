"""Columns: what is known of every sample of one shard, in a compact binary file beside its tar.

The file, version 1: little-endian, n samples, m distinct subjects. Sections follow each other without
gaps; all the 8-byte ones come first, so that each is aligned:

| section | type | meaning |
|---|---|---|
| magic | 8 bytes | `vaecols1` |
| n, m, K, S | 4 x u64 | samples, distinct subjects, bytes of the key text, bytes of the subject text |
| offset | n x u64 | first byte, in the tar, of the image's data (for npy: past its header, the raw C-order bytes) |
| size | n x u64 | bytes of that data |
| label | n x i64 | class number; -1: none |
| key ends | n x u64 | end of each key in the key text |
| subject ends | m x u64 | end of each subject in the subject text |
| crc | n x u32 | CRC-32 (zlib) of the image's data |
| lead | (n + 1) x u32 | CRC-32 of the bytes from the image before (or the tar's start) to this image (below) |
| subject | n x u32 | row of the subject table |
| pixels | n x 32 bytes | SHA-256 of the decoded image, uint8, (C, H, W) in C order |
| key text, subject text | K + S bytes | UTF-8 |

Rows are in the order of the tar. What lies between two images is tar headers, padding and other members; the last
`lead` is that of the bytes after the last image. `crc` and `lead` together cover every byte of the tar once, so a
reader that checks them as it goes notices any damage and can say at which sample it is.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import DataError
from vaedist.core.files import replace_file

MAGIC = b"vaecols1"
_HEAD = len(MAGIC) + 4 * 8


class SampleRow(NamedTuple):
    """One row of a shard's columns (see the module's table)."""

    key: str
    offset: int
    size: int
    crc: int
    label: int
    subject: str
    digest: bytes
    """SHA-256 of the decoded image, as `pixel_digest` makes it."""


class StringColumn(Sequence[str]):
    """The strings of one column, decoded when they are asked for."""

    def __init__(self, ends: NDArray[np.uint64], text: memoryview, where: str) -> None:
        self._ends, self._text, self._where = ends, text, where

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return self.take(np.arange(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.take(np.array([i % len(self)]))[0]

    @classmethod
    def concatenate(cls, parts: Sequence[StringColumn]) -> StringColumn:
        """Several columns as one; at least one."""
        firsts = np.cumsum([0, *(len(part._text) for part in parts[:-1])], dtype=np.uint64)
        ends = np.concatenate([part._ends + first for part, first in zip(parts, firsts, strict=True)])
        return cls(ends, memoryview(b"".join(part._text for part in parts)), parts[0]._where)

    def take(self, rows: NDArray[np.integer]) -> list[str]:
        """The strings of many rows at once."""
        starts = np.where(rows > 0, self._ends[rows - 1], 0).tolist() if len(rows) else []
        try:
            ends = self._ends[rows].tolist()
            return [str(self._text[a:b], "utf-8") for a, b in zip(starts, ends, strict=True)]
        except UnicodeDecodeError:
            raise DataError(f"{self._where}: a text in it is not UTF-8; pack the data again") from None


class LazyStrings(Sequence[str]):
    """Some strings of a column, decoded at the first access: few training steps read the keys.

    Args:
        strings: The column.
        rows: Which of it.
    """

    def __init__(self, strings: StringColumn, rows: NDArray[np.integer]) -> None:
        self._strings, self._rows = strings, rows

    @functools.cached_property
    def _texts(self) -> list[str]:
        return self._strings.take(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> LazyStrings: ...
    def __getitem__(self, i: int | slice) -> str | LazyStrings:
        return LazyStrings(self._strings, self._rows[i]) if isinstance(i, slice) else self._texts[i]


class Columns:
    """Per-sample columns of one shard.

    Attributes:
        keys: n sample keys.
        offset, size: (n,) uint64; where the image's data lie in the tar.
        crc: (n,) uint32; CRC-32 of those bytes.
        lead: (n + 1,) uint32; CRC-32 of the bytes between images (see the module's table).
        label: (n,) int64; -1: no class.
        pixels: (n, 32) uint8; SHA-256 of the decoded image.
    """

    def __init__(self, data: bytes, where: str) -> None:
        """Check and cut `data`, a whole columns file; `where` is its path, for messages.

        Raises:
            DataError: the bytes are not a columns file.
        """
        broken = DataError(f"{where}: this is not a sound columns file; pack or index the data again")
        if len(data) < _HEAD or data[: len(MAGIC)] != MAGIC:
            raise broken
        n, m, key_bytes, subject_bytes = (int(x) for x in np.frombuffer(data, "<u8", 4, len(MAGIC)))
        if len(data) != _HEAD + n * (4 * 8 + 3 * 4 + 32) + 4 + m * 8 + key_bytes + subject_bytes:
            raise broken
        position = _HEAD

        def take(dtype: str, count: int) -> NDArray[Any]:
            nonlocal position
            column = np.frombuffer(data, dtype, count, position)
            position += column.nbytes
            return column

        self.offset: NDArray[np.uint64] = take("<u8", n)
        self.size: NDArray[np.uint64] = take("<u8", n)
        self.label: NDArray[np.int64] = take("<i8", n)
        key_ends, subject_ends = take("<u8", n), take("<u8", m)
        self.crc: NDArray[np.uint32] = take("<u4", n)
        self.lead: NDArray[np.uint32] = take("<u4", n + 1)
        self._subject: NDArray[np.uint32] = take("<u4", n)
        self.pixels: NDArray[np.uint8] = take("u1", n * 32).reshape(n, 32)
        for ends, total in ((key_ends, key_bytes), (subject_ends, subject_bytes)):
            if (np.diff(ends.astype(np.int64)) < 0).any() or (int(ends[-1]) if len(ends) else 0) != total:
                raise broken
        if n and int(self._subject.max()) >= m:
            raise broken
        ends = self.offset + self.size
        if (ends < self.offset).any() or (self.offset[1:] < ends[:-1]).any():
            raise broken
        text = memoryview(data)[position:]
        self.keys = StringColumn(key_ends, text[:key_bytes], where)
        self._subjects = StringColumn(subject_ends, text[key_bytes:], where)

    def __len__(self) -> int:
        return len(self.offset)

    def subject(self, i: int) -> str:
        """Subject of sample `i`; an empty string where the source does not say."""
        return self._subjects[int(self._subject[i])]

    def row(self, i: int) -> SampleRow:
        """Sample `i` as `write_columns` takes it."""
        offset, size, crc, label = map(int, (self.offset[i], self.size[i], self.crc[i], self.label[i]))
        return SampleRow(self.keys[i], offset, size, crc, label, self.subject(i), self.pixels[i].tobytes())

    @classmethod
    def read(cls, path: Path, sha256: str | None = None) -> Columns:
        """Read a columns file, and check it against the hash that the index holds.

        Raises:
            DataError: missing, unreadable, or not the file that was indexed.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read {path} ({error.strerror}): the packed folder is incomplete; copy or pack it again"
            ) from None
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(
                f"{path}: its {len(data)} bytes are not those that index.json was written for (SHA-256 differs); "
                "copy the packed folder again, or pack it again"
            )
        return cls(data, str(path))


def write_columns(path: Path, tar: Path, rows: Iterable[SampleRow]) -> str:
    """Write the columns of one shard, atomically; the bytes are a function of the arguments alone.

    Args:
        path: Where to.
        tar: The finished tar (its name may still be a temporary one): read back and checked against the CRCs.
        rows: In the order of the tar.

    Returns:
        SHA-256 of the file, for the index.

    Raises:
        DataError: the tar does not hold what the rows say.
    """
    rows = list(rows)
    assert all(len(row.digest) == 32 for row in rows), "a pixel digest has 32 bytes"
    table = {subject: number for number, subject in enumerate(dict.fromkeys(row.subject for row in rows))}
    keys, subjects = [row.key.encode() for row in rows], [subject.encode() for subject in table]
    key_ends = np.cumsum([len(key) for key in keys], dtype="<u8")
    subject_ends = np.cumsum([len(subject) for subject in subjects], dtype="<u8")
    sections = [
        np.asarray((len(rows), len(table), sum(map(len, keys)), sum(map(len, subjects))), "<u8"),
        np.asarray([row.offset for row in rows], "<u8"),
        np.asarray([row.size for row in rows], "<u8"),
        np.asarray([row.label for row in rows], "<i8"),
        key_ends,
        subject_ends,
        np.asarray([row.crc for row in rows], "<u4"),
        np.asarray(_lead_crcs(tar, rows), "<u4"),
        np.asarray([table[row.subject] for row in rows], "<u4"),
    ]
    digests = [row.digest for row in rows]
    data = b"".join([MAGIC, *(section.tobytes() for section in sections), *digests, *keys, *subjects])
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _lead_crcs(tar: Path, rows: Sequence[SampleRow]) -> list[int]:
    """The `lead` column; checks each image's CRC on the way."""
    leads, position = [], 0
    with open(tar, "rb") as file:
        for row in rows:
            assert row.offset >= position, f"sample {row.key!r}: rows are not in the order of the tar"
            leads.append(zlib.crc32(file.read(row.offset - position)))
            data = file.read(row.size)
            position = row.offset + row.size
            if len(data) != row.size or zlib.crc32(data) != row.crc:
                sample = f"sample {row.key!r} at byte {row.offset}"
                raise DataError(f"{tar}: {sample} was not written as it should be")
        leads.append(zlib.crc32(file.read()))
    return leads
