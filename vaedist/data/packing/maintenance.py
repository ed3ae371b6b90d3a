"""Care of a packed folder: read all of it and say what is damaged; take samples out of its index.

Striking never touches a tar. It writes new columns without the struck rows under a new name and then, in one
rename, a new `index.json`, which lists what was struck and has a new data identity. Columns that are no longer
named stay, so that a run that opened the folder before goes on undisturbed.

The tar of a shard that lost a sample is entered as it now is, size and hash, because damage is a common reason to
strike; every image that stays is checked first, so this can never let damage in.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vaedist.core.errors import DataError, UserError
from vaedist.data.format.columns import Columns, write_columns
from vaedist.data.format.image_files import channels_first
from vaedist.data.format.index import Index, Shard, Split, identity, pixel_digest
from vaedist.data.packing.contact_sheet import picture_of
from vaedist.data.packing.publish import publish, read_only

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a packed folder."""

    shard: str
    key: str | None
    """The sample, where it is one; striking it mends the folder."""
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
            found = list(_shard_damage(index, shard, columns))
            damages += found
            done += shard.count
            if progress:
                progress(done, total)
    if not damages and identity(index.samples(), index.shape) != index.identity:
        damages.append(Damage("index.json", None, 0, "the data identity does not fit the columns"))
    return damages


def _shard_damage(index: Index, shard: Shard, columns: Columns) -> Iterator[Damage]:
    name = shard.tar.name
    if not shard.tar.is_file():
        for key, offset in zip(columns.keys, columns.offset.tolist(), strict=True):
            yield Damage(name, key, offset, "the shard is missing")
        return
    bad = 0
    with open(shard.tar, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest, place = hashlib.sha256(), 0
        for row, key in enumerate(columns.keys):
            offset, length = int(columns.offset[row]), int(columns.size[row])
            between = file.read(offset - place)
            digest.update(between)
            try:
                data = file.read(length)
            except OSError as error:
                yield Damage(name, key, offset, f"it cannot be read ({error.strerror})")
                return
            digest.update(data)
            place = offset + length
            what = _sample_damage(index, columns, row, data)
            if zlib.crc32(between) != int(columns.lead[row]) and what is None:
                what = "the tar headers or other members before it changed"
            if what is not None:
                bad += 1
                yield Damage(name, key, offset, what)
        while rest := file.read(2**20):
            digest.update(rest)
    if not bad and size != shard.bytes:
        yield Damage(
            name, None, min(size, shard.bytes), f"it has {size} bytes and the index says {shard.bytes}"
        )
    elif not bad and digest.hexdigest() != shard.sha256:
        yield Damage(name, None, place, "bytes after the last image changed (SHA-256 differs)")


def _sample_damage(index: Index, columns: Columns, row: int, data: bytes) -> str | None:
    """What is wrong with the image of one row, whose bytes are `data`; None: nothing."""
    length = int(columns.size[row])
    if len(data) != length:
        return f"the shard ends after {len(data)} of its {length} bytes"
    if zlib.crc32(data) != int(columns.crc[row]):
        zeros = ", all zero" if not any(data) else ""
        return f"its {length} bytes changed (CRC-32 differs{zeros})"
    try:
        picture = picture_of(data, index.shape, index.codec)
    except ValueError as error:
        return f"its {length} bytes are not the image declared: {error}"
    if pixel_digest(channels_first(picture)) != columns.pixels[row].tobytes():
        return "it decodes to other pixels than were packed"
    return None


# Striking ----------------------------------------------------------------------------------------------------


def read_keys(path: Path) -> list[str]:
    """Keys, one per line; empty lines and lines that begin with `#` are passed over."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"cannot read the keys in {path}: {reason}; give a text file with a key on each line"
        ) from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def strike(index: Index, keys: Iterable[str], reason: str = "asked for") -> tuple[Index, int]:
    """Take samples out of the index.

    Args:
        index: The packed folder, which must be writable.
        keys: Sample keys. Those struck before are passed over.
        reason: Noted with each.

    Returns:
        The folder opened anew, and how many samples were struck now.

    Raises:
        UserError: a key is not in the index, or nothing would be left.
        DataError: a sample that stays is damaged too; names it.
    """
    wanted = set(keys) - {
        entry["key"] for entry in index.struck if isinstance(entry, dict) and "key" in entry
    }
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    missing = set(wanted)
    for split in index.splits.values():
        for number in range(len(split.shards)):
            for row, key in enumerate(split.columns(number).keys):
                if key in wanted:
                    found[split.name, number].append(row)
                    missing.discard(key)
    if missing:
        raise UserError(
            f"{index.folder} has no sample {sorted(missing)[0]!r} ({len(missing)} of the keys are not in it): "
            "vaedist-shard DIR --verify names samples as they are called"
        )
    if not found:
        return index, 0
    struck: list[Any] = list(index.struck)
    splits: dict[str, list[Shard]] = {}
    for split in index.splits.values():
        kept = [
            _without(index, split, number, found.get((split.name, number), []))
            for number in range(len(split.shards))
        ]
        if not any(kept):
            raise UserError(f"nothing would be left of the split {split.name!r}: pack the data again instead")
        splits[split.name] = [shard for shard in kept if shard is not None]
        for number, shard in enumerate(split.shards):
            for row in found.get((split.name, number), []):
                key = split.columns(number).keys[row]
                struck.append({"key": key, "split": split.name, "shard": shard.tar.name, "reason": reason})
    opened = publish(
        index.folder,
        splits,
        shape=index.shape,
        codec=index.codec,
        classes=index.classes,
        source=index.source,
        struck=struck,
    )
    return opened, len(struck) - len(index.struck)


def _without(index: Index, split: Split, number: int, rows: list[int]) -> Shard | None:
    """The shard less some rows; None if none are left."""
    shard = split.shards[number]
    if not rows:
        return shard
    columns = split.columns(number)
    stay = np.setdiff1d(np.arange(len(columns)), rows)
    if not len(stay):
        return None
    with open(shard.tar, "rb") as file:
        for row in stay.tolist():
            file.seek(int(columns.offset[row]))
            what = _sample_damage(index, columns, row, file.read(int(columns.size[row])))
            if what is not None:
                damage = Damage(shard.tar.name, columns.keys[row], int(columns.offset[row]), what)
                raise DataError(
                    f"{damage}; strike it as well (`--verify --strike` strikes all damaged samples)"
                )
        file.seek(0)
        tar_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
    chosen = hashlib.sha256(columns.pixels[stay].tobytes()).hexdigest()[:8]
    path = shard.tar.with_name(f"{shard.tar.stem}-{chosen}.cols")
    columns_sha256 = write_columns(
        path,
        tar=shard.tar,
        keys=[columns.keys[row] for row in stay.tolist()],
        offsets=columns.offset[stay],
        sizes=columns.size[stay],
        crcs=columns.crc[stay],
        labels=columns.label[stay],
        subjects=[columns.subject(row) for row in stay.tolist()],
        pixels=columns.pixels[stay],
    )
    read_only(path)
    return Shard(shard.tar, path, len(stay), size, tar_sha256, columns_sha256)
