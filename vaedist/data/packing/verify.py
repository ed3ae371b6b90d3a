"""Checking a packed folder: all of it is read, and everything that is damaged is listed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vaedist.core.errors import DataError
from vaedist.data.format.columns import Columns
from vaedist.data.format.identity import data_identity, pixel_digest, sample_digests
from vaedist.data.format.index import Index
from vaedist.data.format.sample_codec import channels_first, decode_sample
from vaedist.data.format.split import Shard

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a packed folder."""

    shard: str
    key: str | None
    """The sample, where it is one; removing it repairs the folder."""
    offset: int
    what: str

    def __str__(self) -> str:
        sample = f"sample {self.key!r} " if self.key is not None else ""
        return f"{self.shard}: {sample}at byte {self.offset}: {self.what}"


def verify(index: Index, progress: Progress | None = None) -> list[Damage]:
    """Everything that is not as it was packed: tars byte for byte, columns, pixels, data identity.

    Args:
        index: A packed folder.
        progress: Called with (samples read, samples in all).
    """
    damages: list[Damage] = []
    total, done = sum(split.count for split in index.splits.values()), 0
    for split in index.splits.values():
        for number, shard in enumerate(split.shards):
            try:
                columns = split.columns(number)
            except DataError as error:
                damages.append(Damage(shard.columns_path.name, None, 0, str(error)))
                continue
            damages += _shard_damage(index, shard, columns)
            done += shard.count
            if progress:
                progress(done, total)
    if not damages and data_identity(sample_digests(index.splits.values()), index.shape) != index.identity:
        damages.append(Damage("index.json", None, 0, "the data identity does not fit the columns"))
    return damages


def damage_error(folder: str, damages: Sequence[Damage]) -> DataError:
    """One message for all damages that `verify` found: the number, the first, and what to do."""
    more = f" ({len(damages) - 20} more)" if len(damages) > 20 else ""
    advice = "copy the folder again, or pack it again"
    if all(damage.key is not None for damage in damages):
        advice = f"copy the folder again, or take them out: vaedist-shard {folder} --verify --remove-samples"
    return DataError(f"{folder}: {len(damages)} damages{more}; first: {damages[0]}; {advice}")


def _shard_damage(index: Index, shard: Shard, columns: Columns) -> Iterator[Damage]:
    name = shard.tar.name
    if not shard.tar.is_file():
        for key, offset in zip(columns.keys, columns.offset.tolist(), strict=True):
            yield Damage(name, key, offset, "the shard is missing")
        return
    bad = 0
    with open(shard.tar, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest, position = hashlib.sha256(), 0
        for row, key in enumerate(columns.keys):
            offset, length = int(columns.offset[row]), int(columns.size[row])
            between = file.read(offset - position)
            digest.update(between)
            try:
                data = file.read(length)
            except OSError as error:
                yield Damage(name, key, offset, f"it cannot be read ({error.strerror})")
                return
            digest.update(data)
            position = offset + length
            what = sample_damage(index, columns, row, data)
            if zlib.crc32(between) != int(columns.lead[row]) and what is None:
                what = "the tar headers or other members before it changed"
            if what is not None:
                bad += 1
                yield Damage(name, key, offset, what)
        while rest := file.read(2**20):
            digest.update(rest)
    if not bad and size != shard.bytes:
        what = f"it has {size} bytes and the index says {shard.bytes}"
        yield Damage(name, None, min(size, shard.bytes), what)
    elif not bad and digest.hexdigest() != shard.sha256:
        yield Damage(name, None, position, "bytes after the last image changed (SHA-256 differs)")


def sample_damage(index: Index, columns: Columns, row: int, data: bytes) -> str | None:
    """What is wrong with `data`, the bytes of the image of one row; None: nothing."""
    length = int(columns.size[row])
    if len(data) != length:
        return f"the shard ends after {len(data)} of its {length} bytes"
    if zlib.crc32(data) != int(columns.crc[row]):
        zeros = ", all zero" if not any(data) else ""
        return f"its {length} bytes changed (CRC-32 differs{zeros})"
    try:
        picture = decode_sample(data, index.shape, index.info.codec)
    except ValueError as error:
        return f"its {length} bytes are not the image declared: {error}"
    if pixel_digest(channels_first(picture)) != columns.pixels[row].tobytes():
        return "it decodes to other pixels than were packed"
    return None
