"""The last step of packing, indexing and removing samples: data identity, contact sheets, `index.json`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vaedist.data.format.columns import SampleRow, write_columns
from vaedist.data.format.identity import data_identity, sample_digests
from vaedist.data.format.index import INDEX_NAME, DatasetInfo, Index, write_index
from vaedist.data.format.split import Shard, Split
from vaedist.data.packing.contact_sheet import write_contact_sheet


def publish(folder: Path, splits: Mapping[str, Sequence[Shard]], info: DatasetInfo) -> Index:
    """Make a folder of finished tars and columns a packed folder; folders of codes get no contact sheets.

    Args:
        folder: The folder.
        splits: Shards by split, in index order.
        info: What all samples have in common.

    Raises:
        DataError: the columns or images are not what was written.
    """
    opened = [Split(name, shards) for name, shards in splits.items()]
    identity = data_identity(sample_digests(opened), info.shape)
    images = info.dtype == "uint8"
    for split in opened if images else ():
        make_read_only(write_contact_sheet(folder, split, info))
    write_index(folder, splits, info, identity)
    make_read_only(folder / INDEX_NAME)
    return Index.open(folder, "image" if images else "codes")


def index_shard(tar: Path, columns: Path, rows: Sequence[SampleRow]) -> Shard:
    """Write the columns of a tar that is already there."""
    columns_sha256 = write_columns(columns, tar, rows)
    make_read_only(columns)
    with open(tar, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(tar, columns, len(rows), os.stat(tar).st_size, sha256, columns_sha256)


def make_read_only(path: Path) -> None:
    """Take the write permission off a packed file: it is shared, and never changed in place."""
    os.chmod(path, os.stat(path).st_mode & 0o555)
