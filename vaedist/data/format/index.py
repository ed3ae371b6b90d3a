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
        "columns_sha256": of the columns}, ...]}, ...}, "source": {free}, "struck": [free]}

A png or npy member stores (H, W) for one channel and (H, W, C) otherwise.

A folder of code grids is the same, made by training from a folder of images (`vaedist.data.packing.code_shards`):
its samples are `<key>.npy`, and its first field is {"name": "codes", "dtype": "uint16" | "uint32", "shape": [h, w],
"codec": "npy"}. Its keys, labels, splits, shards and rows are those of the images.

The data identity is a hash over (split, key, label, pixels) of all samples in sorted order and the image shape:
it does not change with the codec, the shard size or the order of packing, and it changes with any pixel.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field as Setting
from pydantic import model_validator

from vaedist.config.job import Spec
from vaedist.config.settings import Strict, parse
from vaedist.core.errors import DataError, UserError, did_you_mean
from vaedist.core.files import replace_file
from vaedist.data.format.columns import Columns, write_columns

__all__ = ["Columns", "Index", "Shard", "Split", "identity", "pixel_digest", "write_columns", "write_index"]

_log = logging.getLogger("vaedist")

FORMAT = 1
INDEX_NAME = "index.json"
_COLUMNS_KEPT = 64  # columns of so many shards stay in memory per split: about 20 MB at 3,000 samples each


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """SHA-256 of a decoded image, (C, H, W) uint8: the `pixels` column."""
    assert image.dtype == np.uint8 and image.ndim == 3
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def identity(samples: Iterable[tuple[str, str, int, bytes]], shape: tuple[int, ...]) -> str:
    """The data identity: 64 hex digits, whatever the codec, the shards and the order of `samples`.

    Args:
        samples: (split, key, label, pixel digest) of every sample. 32 bytes of memory each.
        shape: (C, H, W) of the images.
    """
    rows = bytearray()
    for split, key, label, digest in samples:
        rows += hashlib.sha256(f"{split}\0{key}\0{label}\0".encode() + digest).digest()
    ordered = np.sort(np.frombuffer(bytes(rows), "S32"))
    return hashlib.sha256(f"vaedist {tuple(shape)} {len(ordered)}\0".encode() + ordered.tobytes()).hexdigest()


# The index ---------------------------------------------------------------------------------------------------

_Hex = Setting(pattern="^[0-9a-f]{64}$")


class _FieldEntry(Strict):
    name: str
    dtype: Literal["uint8", "uint16", "uint32", "int64"]
    shape: tuple[int, ...]
    codec: Literal["png", "npy", "column"]


class _ShardEntry(Strict):
    tar: str
    columns: str
    count: int = Setting(ge=1)
    bytes: int = Setting(ge=1)
    sha256: str = _Hex
    columns_sha256: str = _Hex

    @model_validator(mode="after")
    def _inside(self) -> _ShardEntry:
        for path in (self.tar, self.columns):
            parts = path.split("/")
            if not all(parts) or {".", ".."} & set(parts) or "\0" in path:
                raise ValueError(f"the path {path!r} is not a plain path inside the folder")
        return self


class _SplitEntry(Strict):
    count: int = Setting(ge=0)
    shards: tuple[_ShardEntry, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> _SplitEntry:
        if self.count != sum(shard.count for shard in self.shards):
            raise ValueError("the counts of the shards do not add up to the split's")
        return self


class _Document(Strict):
    format: Literal[1]
    identity: str = _Hex
    fields: tuple[_FieldEntry, ...]
    classes: tuple[str, ...]
    splits: dict[str, _SplitEntry]
    source: dict[str, Any] = Setting(default_factory=dict)
    struck: tuple[Any, ...] = ()

    @property
    def content(self) -> _FieldEntry:
        """What a sample is: an image, or the codes of one."""
        return next(field for field in self.fields if field.name in ("image", "codes"))

    @model_validator(mode="after")
    def _has_images_or_codes(self) -> _Document:
        contents = [field for field in self.fields if field.name in ("image", "codes")]
        if len(contents) != 1:
            raise ValueError("expected one field `image`, or one field `codes`")
        content, shape = contents[0], contents[0].shape
        if content.name == "image" and (content.dtype != "uint8" or content.codec == "column"):
            raise ValueError("expected one field `image` of dtype uint8 and codec png or npy")
        if content.name == "codes" and (content.dtype not in ("uint16", "uint32") or content.codec != "npy"):
            raise ValueError("expected a field `codes` of dtype uint16 or uint32 and codec npy")
        axes = 3 if content.name == "image" else 2
        if len(shape) != axes or min(shape) < 1 or max(shape) > 65536 or np.prod(shape, dtype=float) > 2**28:
            wanted = "[C, H, W]" if axes == 3 else "[h, w]"
            raise ValueError(f"the {content.name} shape {list(shape)} is not a sensible {wanted}")
        return self


@dataclass(frozen=True)
class Shard:
    """One tar and its columns."""

    tar: Path
    columns_path: Path
    count: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    columns_sha256: str
    original: Shard | None = None
    """What the two files are copies of, if they are (`vaedist.data.loading.staging`)."""


class Split:
    """The samples of one split, numbered in index order: shard after shard, row after row.

    Attributes:
        name: `train`, `validate`, ...
        shards: In index order.
        count: Samples, N.
        counts: (shards,) int64 samples per shard.
        starts: (shards + 1,) int64; the first sample number of each shard, then N.
    """

    def __init__(self, name: str, shards: tuple[Shard, ...]) -> None:
        self.name, self.shards = name, shards
        self.counts = np.array([shard.count for shard in shards], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        self.count = int(self.starts[-1])
        self._held: OrderedDict[int, Columns] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, shard: int) -> Columns:
        """Columns of shard number `shard`, read and checked at the first use.

        Raises:
            DataError: the file is missing or damaged.
        """
        with self._lock:
            held = self._held.get(shard)
            if held is not None:
                self._held.move_to_end(shard)
                return held
        entry = self.shards[shard]
        try:
            columns = Columns.read(entry.columns_path, entry.columns_sha256)
        except DataError as error:
            entry = self.without(entry, entry.columns_path, error)
            columns = Columns.read(entry.columns_path, entry.columns_sha256)
        if len(columns) != entry.count or columns.offset[-1] + columns.size[-1] > entry.bytes:
            raise DataError(
                f"{entry.columns_path} does not fit {entry.tar.name}; pack or index the data again"
            )
        with self._lock:
            self._held[shard] = columns
            while len(self._held) > _COLUMNS_KEPT:
                self._held.popitem(last=False)
        return columns

    def without(self, copied: Shard, file: Path, why: DataError) -> Shard:
        """The original of a copy that is not sound; from now on this split reads originals.

        Args:
            copied: One of our shards.
            file: The one of its two that is damaged or gone; removed, so that the next start copies it anew.
            why: What is wrong.

        Raises:
            DataError: `why`, as it is no copy.
        """
        if copied.original is None:
            raise why
        with self._lock:
            told = any(shard.original for shard in self.shards)
            self.shards = tuple(shard.original or shard for shard in self.shards)
        if told:
            what = str(why).partition(";")[0]
            _log.warning("staging: %s; reading %s itself", what, copied.original.tar.parent)
        with contextlib.suppress(OSError):
            file.unlink()
        return copied.original

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, row in the shard) of a sample number."""
        if not 0 <= sample < self.count:
            raise IndexError(sample)
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return self.columns(shard).keys[row]

    def subject(self, sample: int) -> str:
        """Whose image it is; an empty string where the source does not tell."""
        shard, row = self.locate(sample)
        return self.columns(shard).subject(row)

    def label(self, sample: int) -> int:
        """Class number; -1 where the sample has none."""
        shard, row = self.locate(sample)
        return int(self.columns(shard).label[row])


class Index:
    """A packed folder, opened.

    Attributes:
        folder: Where it lies.
        identity: Data identity, 64 hex digits.
        classes: Class names; empty where the data have none.
        content: What a sample is, `image` or `codes`.
        dtype: Of its values.
        channels, height, width: Of every image; of codes 1, h, w.
        codec: How the tars store samples, `png` or `npy`.
        splits: By name.
        source: What `vaedist-shard` noted about where the data came from.
        struck: Samples taken out by `vaedist-shard --strike`.
    """

    def __init__(self, folder: Path, document: _Document) -> None:
        self.folder = folder
        self.identity = document.identity
        self.classes = document.classes
        content = document.content
        self.content: Literal["image", "codes"] = "image" if content.name == "image" else "codes"
        self.dtype = np.dtype(content.dtype)
        self.channels, self.height, self.width = (
            content.shape if len(content.shape) == 3 else (1, *content.shape)
        )
        self.codec = content.codec
        self.source, self.struck = document.source, document.struck
        self.splits: Mapping[str, Split] = {
            name: Split(
                name,
                tuple(
                    Shard(folder / s.tar, folder / s.columns, s.count, s.bytes, s.sha256, s.columns_sha256)
                    for s in entry.shards
                ),
            )
            for name, entry in document.splits.items()
        }

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
            told = json.loads(path.read_bytes())
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
        written = told.get("format") if isinstance(told, dict) else None
        if isinstance(written, int) and written > FORMAT:
            raise UserError(
                f"{path} has format {written}, and this vaedist reads up to {FORMAT}: install a newer vaedist, "
                "or pack the folder again with this one"
            )
        index = cls(folder, parse(_Document, told, where=str(path)))
        if index.content != content:
            raise UserError(
                f"{folder} holds codes of images, which only a prior's training reads: give the folder of the images"
                if content == "image"
                else f"{folder} holds images, not codes: remove it, and training makes the codes anew"
            )
        return index

    def reading(self, splits: Mapping[str, Split]) -> Index:
        """The same data with other files: `splits` hold sound copies of the shards."""
        moved = copy.copy(self)
        moved.splits = splits
        return moved

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W); of codes (1, h, w)."""
        return self.channels, self.height, self.width

    @property
    def sample_bytes(self) -> int:
        """Of one decoded sample."""
        return self.channels * self.height * self.width * self.dtype.itemsize

    @property
    def spec(self) -> Spec:
        return Spec(self.channels, (self.height, self.width), len(self.classes))

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

    def samples(self) -> Iterator[tuple[str, str, int, bytes]]:
        """(split, key, label, pixel digest) of every sample: what `identity` hashes."""
        for split in self.splits.values():
            for shard in range(len(split.shards)):
                columns = split.columns(shard)
                rows = zip(columns.keys, columns.label.tolist(), columns.pixels, strict=True)
                for key, label, digest in rows:
                    yield split.name, key, label, digest.tobytes()


def write_index(
    folder: Path,
    *,
    identity: str,
    shape: tuple[int, ...],
    codec: str,
    classes: Sequence[str],
    splits: Mapping[str, Sequence[Shard]],
    source: Mapping[str, Any] | None = None,
    struck: Sequence[Any] = (),
    codes: Literal["uint16", "uint32"] | None = None,
) -> None:
    """Write `index.json`, atomically: the step that makes a folder of tars a packed folder.

    Args:
        folder: Where the tars and columns lie.
        identity: As `identity` returns it.
        shape: (C, H, W).
        codec: `png` or `npy`.
        classes: Class names, in the order of their numbers.
        splits: Shards by split, in index order; their paths lie inside `folder`.
        source, struck: Free provenance, kept as given (JSON values).
        codes: The samples are code grids of this dtype, and `shape` is (1, h, w).
    """
    image = {"name": "image", "dtype": "uint8", "shape": list(shape), "codec": codec}
    content = {
        "format": FORMAT,
        "identity": identity,
        "fields": [
            {"name": "codes", "dtype": codes, "shape": list(shape[1:]), "codec": codec} if codes else image,
            {"name": "label", "dtype": "int64", "shape": [], "codec": "column"},
        ],
        "classes": list(classes),
        "splits": {
            name: {
                "count": sum(shard.count for shard in shards),
                "shards": [
                    {
                        "tar": shard.tar.relative_to(folder).as_posix(),
                        "columns": shard.columns_path.relative_to(folder).as_posix(),
                        "count": shard.count,
                        "bytes": shard.bytes,
                        "sha256": shard.sha256,
                        "columns_sha256": shard.columns_sha256,
                    }
                    for shard in shards
                ],
            }
            for name, shards in splits.items()
        },
        "source": dict(source or {}),
        "struck": list(struck),
    }
    parse(_Document, content, where=str(folder / INDEX_NAME))  # what we write, we can read
    replace_file(folder / INDEX_NAME, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
