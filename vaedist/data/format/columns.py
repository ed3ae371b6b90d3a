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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import DataError
from vaedist.core.files import replace_file

MAGIC = b"vaecols1"
_HEAD = len(MAGIC) + 4 * 8


class Strings(Sequence[str]):
    """Strings of one column, decoded when asked for."""

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
    def joined(cls, parts: Sequence[Strings]) -> Strings:
        """One column of several, one after the other; at least one."""
        firsts = np.cumsum([0, *(len(part._text) for part in parts[:-1])], dtype=np.uint64)
        ends = np.concatenate([part._ends + first for part, first in zip(parts, firsts, strict=True)])
        return cls(ends, memoryview(b"".join(part._text for part in parts)), parts[0]._where)

    def take(self, rows: NDArray[np.integer]) -> list[str]:
        """The strings of many rows at once."""
        starts = np.where(rows > 0, self._ends[rows - 1], 0).tolist() if len(rows) else []
        try:
            return [
                str(self._text[a:b], "utf-8") for a, b in zip(starts, self._ends[rows].tolist(), strict=True)
            ]
        except UnicodeDecodeError:
            raise DataError(f"{self._where}: a text in it is not UTF-8; pack the data again") from None


class Taken(Sequence[str]):
    """Some strings of a column, decoded when the first of them is looked at: few steps of training ever look.

    Args:
        strings: The column.
        rows: Which of it.
    """

    def __init__(self, strings: Strings, rows: NDArray[np.integer]) -> None:
        self._strings, self._rows = strings, rows

    @functools.cached_property
    def _texts(self) -> list[str]:
        return self._strings.take(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Taken: ...
    def __getitem__(self, i: int | slice) -> str | Taken:
        return Taken(self._strings, self._rows[i]) if isinstance(i, slice) else self._texts[i]


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
        place = _HEAD

        def take(dtype: str, count: int) -> NDArray[Any]:
            nonlocal place
            column = np.frombuffer(data, dtype, count, place)
            place += column.nbytes
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
        if (self.offset + self.size < self.offset).any() or (
            self.offset[1:] < (self.offset + self.size)[:-1]
        ).any():
            raise broken
        text = memoryview(data)[place:]
        self.keys = Strings(key_ends, text[:key_bytes], where)
        self._subjects = Strings(subject_ends, text[key_bytes:], where)

    def __len__(self) -> int:
        return len(self.offset)

    def subject(self, i: int) -> str:
        """Whose image sample `i` is; an empty string where the source does not tell."""
        return self._subjects[int(self._subject[i])]

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


def write_columns(
    path: Path,
    *,
    tar: Path,
    keys: Sequence[str],
    offsets: Sequence[int] | NDArray[Any],
    sizes: Sequence[int] | NDArray[Any],
    crcs: Sequence[int] | NDArray[Any],
    labels: Sequence[int] | NDArray[Any],
    subjects: Sequence[str],
    pixels: Sequence[bytes] | NDArray[np.uint8],
) -> str:
    """Write the columns of one shard, atomically; the bytes are a function of the arguments alone.

    Args:
        path: Where to.
        tar: The finished tar (its name may still be a temporary one): read back and checked against `crcs`.
        keys, offsets, sizes, crcs, labels, subjects: n entries each, in the order of the tar (see the module's
            table).
        pixels: n digests of 32 bytes, as `pixel_digest` makes them.

    Returns:
        SHA-256 of the file, for the index.

    Raises:
        DataError: the tar does not hold what it should.
    """
    n = len(keys)
    lengths = {len(keys), len(offsets), len(sizes), len(crcs), len(labels), len(subjects), len(pixels)}
    assert lengths == {n}, f"columns of different lengths: {sorted(lengths)}"
    table = {subject: row for row, subject in enumerate(dict.fromkeys(subjects))}
    key_texts, subject_texts = [key.encode() for key in keys], [subject.encode() for subject in table]
    digests = pixels.tobytes() if isinstance(pixels, np.ndarray) else b"".join(pixels)
    assert len(digests) == 32 * n, "a pixel digest has 32 bytes"

    def ends(texts: list[bytes]) -> NDArray[np.uint64]:
        return np.cumsum([len(text) for text in texts], dtype="<u8")

    counts = (n, len(table), sum(map(len, key_texts)), sum(map(len, subject_texts)))
    leads = _leads(tar, keys, offsets, sizes, crcs)
    sections = (
        np.asarray(counts, "<u8"),
        np.asarray(offsets, "<u8"),
        np.asarray(sizes, "<u8"),
        np.asarray(labels, "<i8"),
        ends(key_texts),
        ends(subject_texts),
        np.asarray(crcs, "<u4"),
        np.asarray(leads, "<u4"),
        np.asarray([table[subject] for subject in subjects], "<u4"),
    )
    data = b"".join(
        [MAGIC, *(section.tobytes() for section in sections), digests, *key_texts, *subject_texts]
    )
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _leads(
    tar: Path,
    keys: Sequence[str],
    offsets: Sequence[int] | NDArray[Any],
    sizes: Sequence[int] | NDArray[Any],
    crcs: Sequence[int] | NDArray[Any],
) -> list[int]:
    leads, place = [], 0
    with open(tar, "rb") as file:
        for key, offset, size, crc in zip(keys, offsets, sizes, crcs, strict=True):
            assert int(offset) >= place, f"sample {key!r}: rows are not in the order of the tar"
            leads.append(zlib.crc32(file.read(int(offset) - place)))
            data = file.read(int(size))
            place = int(offset) + int(size)
            if len(data) != size or zlib.crc32(data) != crc:
                raise DataError(
                    f"{tar}: sample {key!r} at byte {int(offset)} was not written as it should be"
                )
        leads.append(zlib.crc32(file.read()))
    return leads
