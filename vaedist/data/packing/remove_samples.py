"""Removing samples from a packed folder's index.

No tar is changed. Removing writes new columns without these rows under a new name and then, in one rename, a new
`index.json`, which lists what was removed and has a new data identity. The old columns stay, so that a run that opened
the folder before is not disturbed.

The tar of a shard that lost a sample is entered with its present size and hash, because damage is a common reason to
remove a sample; every image that stays is checked first, so damage cannot get in this way.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vaedist.core.errors import DataError, UserError
from vaedist.data.format.index import Index
from vaedist.data.format.split import Shard, Split
from vaedist.data.packing.publish import index_shard, publish
from vaedist.data.packing.verify import Damage, Progress, sample_damage, verify


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


def remove_damaged_samples(index: Index, progress: Progress | None = None) -> tuple[Index, int]:
    """Verify a packed folder and remove every damaged sample; as `remove_samples`.

    Raises:
        DataError: something is damaged that is not a sample.
    """
    damages = verify(index, progress)
    other = next((damage for damage in damages if damage.key is None), None)
    if other is not None:
        raise DataError(f"{other}; this is not a sample that could be removed: pack or copy the folder again")
    return remove_samples(index, [damage.key for damage in damages if damage.key is not None], "damaged")


def remove_samples(index: Index, keys: Iterable[str], reason: str = "asked for") -> tuple[Index, int]:
    """Take samples out of the index.

    Args:
        index: The packed folder, which must be writable.
        keys: Sample keys. Those removed before are passed over.
        reason: Noted with each.

    Returns:
        The folder opened anew, and how many samples were removed now.

    Raises:
        UserError: a key is not in the index, or nothing would be left.
        DataError: a sample that stays is damaged too; names it.
    """
    before = index.info.removed
    wanted = set(keys) - {entry["key"] for entry in before if isinstance(entry, dict) and "key" in entry}
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)
    missing = set(wanted)
    for split in index.splits.values():
        for number, columns in enumerate(split.all_columns()):
            for row, key in enumerate(columns.keys):
                if key in wanted:
                    rows[split.name, number].append(row)
                    missing.discard(key)
    if missing:
        raise UserError(
            f"{index.folder} has no sample {sorted(missing)[0]!r} ({len(missing)} of the keys are not in it): "
            "vaedist-shard DIR --verify names samples as they are called"
        )
    if not rows:
        return index, 0
    removed: list[Any] = list(before)
    splits: dict[str, list[Shard]] = {}
    for split in index.splits.values():
        numbers = range(len(split.shards))
        kept = [_without(index, split, number, rows[split.name, number]) for number in numbers]
        if not any(kept):
            raise UserError(f"nothing would be left of the split {split.name!r}: pack the data again instead")
        splits[split.name] = [shard for shard in kept if shard is not None]
        for number, shard in enumerate(split.shards):
            for row in rows[split.name, number]:
                key = split.columns(number).keys[row]
                removed.append({"key": key, "split": split.name, "shard": shard.tar.name, "reason": reason})
    opened = publish(index.folder, splits, replace(index.info, removed=removed))
    return opened, len(removed) - len(before)


def _without(index: Index, split: Split, number: int, rows: list[int]) -> Shard | None:
    """The shard less some rows; None if none are left."""
    shard = split.shards[number]
    if not rows:
        return shard
    columns = split.columns(number)
    stay = np.setdiff1d(np.arange(len(columns)), rows)
    if not len(stay):
        return None
    kept = [columns.row(row) for row in stay.tolist()]
    with open(shard.tar, "rb") as file:
        for row, sample in zip(stay.tolist(), kept, strict=True):
            file.seek(sample.offset)
            what = sample_damage(index, columns, row, file.read(sample.size))
            if what is not None:
                raise DataError(
                    f"{Damage(shard.tar.name, sample.key, sample.offset, what)}; remove it as well "
                    "(`--verify --remove-samples` removes all damaged samples)"
                )
    name = hashlib.sha256(columns.pixels[stay].tobytes()).hexdigest()[:8]
    return index_shard(shard.tar, shard.tar.with_name(f"{shard.tar.stem}-{name}.cols"), kept)
