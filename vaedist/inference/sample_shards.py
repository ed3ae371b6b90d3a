"""A model's samples as a packed folder: plain WebDataset tars with an index, which every command reads.

The folder has one split, `train`, whose keys are `sample-<seed>-<number>`. Where samples have a class, it is their
label. The folder is made under a temporary name beside its path and renamed when it is whole.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.core.files import temporary, writable
from vaedist.core.imaging import Pixels
from vaedist.data.format.identity import pixel_digest
from vaedist.data.format.index import DatasetInfo, Index
from vaedist.data.format.sample_codec import encode
from vaedist.data.format.split import Shard
from vaedist.data.packing.packing_plan import samples_per_shard
from vaedist.data.packing.preparation import Prepared
from vaedist.data.packing.publish import publish
from vaedist.data.packing.shard_writer import ShardWriter
from vaedist.data.sources import Item

SPLIT = "train"


@dataclass(eq=False)
class SampleShards:
    """Writes samples shard by shard; memory holds one shard. A context manager: unfinished, it leaves nothing behind.

    Args:
        folder: A new or empty folder.
        shape: (C, H, W) of the images.
        classes: Class names, where samples have classes.
        source: JSON values that say where the samples come from.
        seed: Of the samples, for their keys.
        per_shard: Samples in a shard; default: as many as keep it within 64 MB.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """

    folder: Path
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    source: Mapping[str, Any]
    seed: int
    per_shard: int | None = None

    def __post_init__(self) -> None:
        self._per_shard = self.per_shard or samples_per_shard(math.prod(self.shape))
        self._waiting: list[Prepared] = []
        self._shards: list[Shard] = []
        with writable(self.folder):
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise UserError(f"{self.folder} is there already and not empty: give a new folder")
            self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._scratch = temporary(self.folder.absolute())
            # Images of a medical model are as private as those it was trained on.
            self._scratch.mkdir(mode=0o700)

    def add(self, images: Pixels, first: int, labels: Sequence[int] | None = None) -> None:
        """Append samples first, first + 1, ...

        Args:
            images: uint8 (n, C, H, W).
            first: Number of the first one.
            labels: Class number of each, -1 for none.
        """
        for i, image in enumerate(images):
            picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            member, skip = encode(picture, "png")
            label = -1 if labels is None else labels[i]
            item = Item(
                key=f"sample-{self.seed}-{first + i:09d}",
                split=SPLIT,
                label=None if label < 0 else self.classes[label],
                subject="",
                origin=f"sample {first + i} of seed {self.seed}",
            )
            self._waiting.append(Prepared(item, member, skip, zlib.crc32(member), pixel_digest(image)))
            if len(self._waiting) == self._per_shard:
                self._write()

    def finish(self) -> Index:
        """Write the last shard and the index, and move the folder to its path."""
        with writable(self.folder):
            if self._waiting:
                self._write()
            info = DatasetInfo(self.shape, "png", self.classes, self.source)
            publish(self._scratch, {SPLIT: self._shards}, info)
            os.replace(self._scratch, self.folder)
        return Index.open(self.folder)

    def _write(self) -> None:
        name = f"{SPLIT}-{len(self._shards):06d}"
        writer = ShardWriter(self._scratch, self._scratch, "png", self.classes)
        with writable(self.folder):
            receipt = writer.write(name, self._waiting)
        self._shards.append(writer.shard(name, receipt))
        self._waiting = []

    def __enter__(self) -> SampleShards:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
