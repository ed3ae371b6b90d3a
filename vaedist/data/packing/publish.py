"""The last step of packing, indexing and striking: data identity, contact sheets, `index.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vaedist.data.format.index import INDEX_NAME, Index, Shard, Split, identity, write_index
from vaedist.data.packing.contact_sheet import write_contact_sheet

Splits = Mapping[str, Sequence[Shard]]


def publish(
    folder: Path,
    splits: Splits,
    *,
    shape: tuple[int, ...],
    codec: str,
    classes: Sequence[str],
    source: Mapping[str, Any],
    struck: Sequence[Any] = (),
    codes: Literal["uint16", "uint32"] | None = None,
) -> Index:
    """Make a folder of finished tars and columns a packed folder.

    Args:
        folder: The folder.
        splits: Shards by split, in index order.
        shape: (C, H, W) of every image.
        codec: `png` or `npy`.
        classes: Names in the order of their numbers.
        source, struck: Provenance, JSON values.
        codes: The samples are code grids of this dtype, not images, and there is nothing to look at.

    Raises:
        DataError: the columns or images are not what was written.
    """
    opened = [Split(name, tuple(shards)) for name, shards in splits.items()]
    samples = (
        (split.name, key, label, digest.tobytes())
        for split in opened
        for columns in (split.columns(shard) for shard in range(len(split.shards)))
        for key, label, digest in zip(columns.keys, columns.label.tolist(), columns.pixels, strict=True)
    )
    digest = identity(samples, shape)
    for split in opened if codes is None else ():
        read_only(write_contact_sheet(folder, split, classes, shape, codec))
    write_index(
        folder,
        identity=digest,
        shape=shape,
        codec=codec,
        classes=classes,
        splits=splits,
        source=source,
        struck=struck,
        codes=codes,
    )
    read_only(folder / INDEX_NAME)
    return Index.open(folder, "image" if codes is None else "codes")


def twins(index: Index) -> int:
    """How many images of the other splits have exactly the pixels of an image of `train`."""
    if "train" not in index.splits:
        return 0
    known = np.unique(_digests(index.splits["train"]))
    others = [_digests(split) for name, split in index.splits.items() if name != "train"]
    return int(sum(np.isin(digests, known).sum() for digests in others))


def _digests(split: Split) -> NDArray[Any]:
    rows = [split.columns(shard).pixels for shard in range(len(split.shards))]
    return np.concatenate(rows).view("S32")[:, 0]


def read_only(path: Path) -> None:
    """Take the write permission off a packed file: it is shared, and never changed in place."""
    os.chmod(path, os.stat(path).st_mode & 0o555)
