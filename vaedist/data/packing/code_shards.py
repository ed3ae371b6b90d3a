"""Code shards: the codes that a frozen tokenizer gives to every image of a packed folder.

The folder is a packed folder itself (`vaedist.data.format.index`) that lies beside the tokenizer's weights: plain
WebDataset tars whose samples are `<key>.npy` (the code grid, (h, w) uint16, or uint32 for more than 65,536 codes),
`<key>.cls` and `<key>.json`. Splits, shards and rows are those of the images, so a sample has the same number in
both and a step of training takes the same samples.

`source` of its index is the stamp: which weights made it, of which data. The index is written last; until then the
finished shards have a receipt each under `.making/`, and the next start makes only the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError
from vaedist.data.format.index import DatasetInfo, Index
from vaedist.data.format.sample_codec import encode
from vaedist.data.format.split import Shard
from vaedist.data.packing.preparation import Prepared
from vaedist.data.packing.publish import publish
from vaedist.data.packing.shard_writer import ShardWriter
from vaedist.data.sources import Item

WORKSPACE = ".making"


def codes_folder(home: Path, stamp: Mapping[str, Any]) -> Path:
    """Where the codes with this stamp lie below a tokenizer's run folder."""
    text = json.dumps(stamp, sort_keys=True)
    return home / "codes" / hashlib.sha256(text.encode()).hexdigest()[:16]


def open_codes(folder: Path, stamp: Mapping[str, Any], images: Index) -> Index:
    """Finished codes of `images`.

    Raises:
        UserError: they are not finished, or another tokenizer or other images made them.
    """
    index = Index.open(folder, "codes")
    wrong = [name for name, value in stamp.items() if index.source.get(name) != value]
    if wrong:
        raise UserError(
            f"the codes in {folder} do not come from this tokenizer and these images ({', '.join(wrong)} differs): "
            "remove that folder, and training makes the codes anew"
        )
    for name, split in images.splits.items():
        if name not in index.splits or index.splits[name].counts.tolist() != split.counts.tolist():
            raise UserError(
                f"the codes in {folder} are not those of {images.folder} (split {name!r} differs): remove that "
                "folder, and training makes the codes anew"
            )
    return index


class CodeWriter:
    """Writes the codes of one packed folder, shard by shard; a later start continues after the last whole shard.

    Args:
        folder: Made if missing (0700: codes show what their images show).
        images: The packed folder that the codes are of.
        num_codes: K; decides how wide a code is stored.
        stamp: JSON values that say what made them.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, images: Index, num_codes: int, stamp: Mapping[str, Any]) -> None:
        self.folder, self.images, self.stamp = folder, images, dict(stamp)
        self.dtype = "uint16" if num_codes <= 1 << 16 else "uint32"
        self.workspace = folder / WORKSPACE
        self.workspace.mkdir(mode=0o700, exist_ok=True)
        self._writer = ShardWriter(folder, self.workspace, "npy", images.classes)
        self._writer.remove_temporary_files()

    def missing(self) -> Iterator[tuple[str, int]]:
        """(split, shard number) of what is still to be written, in order."""
        for name, split in self.images.splits.items():
            for shard in range(len(split.shards)):
                if self._writer.receipt(_shard_name(name, shard)) is None:
                    yield name, shard

    def write(self, split: str, shard: int, codes: NDArray[np.integer[Any]]) -> None:
        """The codes of one shard of images, (n, h, w), in the order of its rows."""
        columns = self.images.split(split).columns(shard)
        assert len(codes) == len(columns), "one grid of codes for each image"
        stored = codes.astype(self.dtype)

        def samples() -> Iterator[Prepared]:
            for row, grid in enumerate(stored):
                key, label = columns.keys[row], int(columns.label[row])
                name = self.images.classes[label] if label >= 0 else None
                item = Item(key, split, name, columns.subject(row), key)
                member, skip = encode(grid, "npy")
                data = memoryview(member)[skip:]
                yield Prepared(item, member, skip, zlib.crc32(data), hashlib.sha256(data).digest())

        name = _shard_name(split, shard)
        receipt = self._writer.write(name, samples())
        self._writer.record(name, receipt | {"grid": list(codes.shape[1:])})

    def finish(self) -> Index:
        """Write the index, which makes the shards a packed folder, and remove the receipts."""
        splits: dict[str, list[Shard]] = {}
        grid = (0, 0)
        for split in self.images.splits.values():
            splits[split.name] = []
            for shard in range(len(split.shards)):
                name = _shard_name(split.name, shard)
                receipt = self._writer.receipt(name)
                assert receipt is not None, f"{name} was never written"
                splits[split.name].append(self._writer.shard(name, receipt))
                grid = (receipt["grid"][0], receipt["grid"][1])
        info = DatasetInfo((1, *grid), "npy", self.images.classes, self.stamp, dtype=self.dtype)
        publish(self.folder, splits, info)
        shutil.rmtree(self.workspace, ignore_errors=True)
        return open_codes(self.folder, self.stamp, self.images)


def _shard_name(split: str, shard: int) -> str:
    """As the shard of images is named."""
    return f"{split}-{shard:06d}"
