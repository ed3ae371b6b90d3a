"""The packed folder: plain WebDataset tars, and beside them what lets a reader jump to any sample.

| file | what it is |
|---|---|
| `<split>-000000.tar` | samples as WebDataset writes them: `<key>.png` or `<key>.npy`, `<key>.cls`, `<key>.json` |
| `<split>-000000.cols` | the per-sample columns of that tar, binary (`vaedist.data.format.columns`) |
| `index.json` | splits, shards, fields, classes, data identity; written last: without it a folder is unfinished |
| `contact-<split>.png` | 64 samples for a person to look at |

`index.json` grows with the number of shards only; what grows with the number of samples lies in the columns,
which are read shard by shard when first needed. Every path in it is relative and stays inside the folder.

    {"format": 1, "identity": "<hex>",
     "fields": [{"name": "image", "dtype": "uint8", "shape": [C, H, W], "codec": "png" | "npy"},
                {"name": "label", "dtype": "int64", "shape": [], "codec": "column"}],
     "classes": ["..."], "splits": {"train": {"count": N, "shards": [{"tar": "train-000000.tar",
        "columns": "train-000000.cols", "count": n, "bytes": size of the tar, "sha256": of the tar,
        "columns_sha256": of the columns}, ...]}, ...}, "source": {free}, "struck": [samples that were removed]}

A png or npy member stores (H, W) for one channel and (H, W, C) otherwise.

A folder of code grids is the same, made by training from a folder of images (`vaedist.data.packing.code_shards`):
its samples are `<key>.npy`, and its first field is {"name": "codes", "dtype": "uint16" | "uint32", "shape": [h, w],
"codec": "npy"}. Its keys, labels, splits, shards and rows are those of the images.

The data identity is a hash over (split, key, label, pixels) of all samples in sorted order and the image shape:
it does not change with the codec, the shard size or the order of packing, and it changes with any pixel.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vaedist.config.job import Spec
from vaedist.config.settings import parse
from vaedist.core.errors import DataError, UserError, did_you_mean
from vaedist.core.files import replace_file
from vaedist.data.format.index_schema import FORMAT, IndexDocument
from vaedist.data.format.split import Shard, Split

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class DatasetInfo:
    """What `index.json` says of all samples alike."""

    shape: tuple[int, ...]
    """(C, H, W); of codes (1, h, w)."""
    codec: str
    """How the tars store samples, `png` or `npy`."""
    classes: tuple[str, ...]
    """Class names, in the order of their numbers; empty where the data have none."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the data came from; JSON values."""
    removed: Sequence[Any] = ()
    """Samples that `vaedist-shard --remove-samples` took out (`struck` in the file); JSON values."""
    dtype: str = "uint8"
    """Of the values: uint8 for images, uint16 or uint32 for codes."""


class Index:
    """A packed folder, opened.

    Attributes:
        folder: Where it lies.
        identity: Data identity, 64 hex digits.
        info: What all samples have in common; also as `shape`, `classes` and `source` of the index.
        content: What a sample is, `image` or `codes`.
        dtype: Of its values.
        splits: By name.
    """

    def __init__(self, folder: Path, identity: str, info: DatasetInfo, splits: Mapping[str, Split]) -> None:
        self.folder, self.identity, self.info, self.splits = folder, identity, info, splits
        self.shape, self.classes, self.source = info.shape, info.classes, info.source
        self.content: Literal["image", "codes"] = "image" if info.dtype == "uint8" else "codes"
        self.dtype = np.dtype(info.dtype)

    @classmethod
    def open(cls, folder: str | Path, content: Literal["image", "codes"] = "image") -> Index:
        """Read `index.json`; touches neither tars nor columns.

        Args:
            folder: A packed folder.
            content: What its samples must be.

        Raises:
            UserError: there is none, it is damaged, holds something else, or a newer vaedist wrote it.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        try:
            document = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            what = f"it has no {INDEX_NAME}" if folder.is_dir() else "no such folder"
            if folder.is_file():
                raise UserError(
                    f"{folder} is a file: give the packed folder, which holds {INDEX_NAME}"
                ) from None
            raise UserError(
                f"{folder} is not a packed folder ({what}); make it with `vaedist-shard INPUT --out {folder}`"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise DataError(f"{path} is damaged (not JSON); copy or pack the folder again") from None
        written = document.get("format") if isinstance(document, dict) else None
        if isinstance(written, int) and written > FORMAT:
            raise UserError(
                f"{path} has format {written}, and this vaedist reads up to {FORMAT}: install a newer vaedist, "
                "or pack the folder again with this one"
            )
        index = cls._from_document(folder, parse(IndexDocument, document, where=str(path)))
        if index.content != content:
            raise UserError(
                f"{folder} holds codes of images, which only a prior's training reads: give the folder of the images"
                if content == "image"
                else f"{folder} holds images, not codes: remove it, and training makes the codes anew"
            )
        return index

    @classmethod
    def _from_document(cls, folder: Path, document: IndexDocument) -> Index:
        content = document.content
        shape = content.shape if len(content.shape) == 3 else (1, *content.shape)
        classes, source, removed = document.classes, document.source, document.struck
        info = DatasetInfo(shape, content.codec, classes, source, removed, content.dtype)
        splits = {}
        for name, split in document.splits.items():
            shards = [Shard.of(folder / one.tar, folder / one.columns, vars(one)) for one in split.shards]
            splits[name] = Split(name, shards)
        return cls(folder, document.identity, info, splits)

    def with_splits(self, splits: Mapping[str, Split]) -> Index:
        """The same data in other files: `splits` hold sound copies of the shards."""
        moved = copy.copy(self)
        moved.splits = splits
        return moved

    @property
    def sample_bytes(self) -> int:
        """Of one decoded sample."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def spec(self) -> Spec:
        return Spec(self.shape[0], self.shape[1:], len(self.classes))

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            UserError: there is none, or it is empty; names those that exist.
        """
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}{did_you_mean(name, self.splits)}")
        if not self.splits[name].count:
            raise UserError(f"the split {name!r} of {self.folder} is empty: name another one, or pack again")
        return self.splits[name]


def write_index(
    folder: Path, splits: Mapping[str, Sequence[Shard]], info: DatasetInfo, identity: str
) -> None:
    """Write `index.json`, atomically: the step that makes a folder of tars a packed folder.

    Args:
        folder: Where the tars and columns lie.
        splits: Shards by split, in index order; their paths lie inside `folder`.
        info: What all samples have in common.
        identity: As `data_identity` returns it.
    """

    def entry(shard: Shard) -> dict[str, Any]:
        paths = {"tar": shard.tar, "columns": shard.columns_path}
        return {name: path.relative_to(folder).as_posix() for name, path in paths.items()} | shard.facts

    kind, shape = ("image", info.shape) if info.dtype == "uint8" else ("codes", info.shape[1:])
    content = {
        "format": FORMAT,
        "identity": identity,
        "fields": [
            {"name": kind, "dtype": info.dtype, "shape": list(shape), "codec": info.codec},
            {"name": "label", "dtype": "int64", "shape": [], "codec": "column"},
        ],
        "classes": list(info.classes),
        "splits": {
            name: {
                "count": sum(shard.count for shard in shards),
                "shards": [entry(shard) for shard in shards],
            }
            for name, shards in splits.items()
        },
        "source": dict(info.source),
        "struck": list(info.removed),
    }
    parse(IndexDocument, content, where=str(folder / INDEX_NAME))  # what we write, we can read
    replace_file(folder / INDEX_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
