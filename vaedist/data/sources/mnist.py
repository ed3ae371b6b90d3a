"""MNIST and the sets that copy its files (Fashion-MNIST, KMNIST): four idx files, gzipped or plain.

`train-*` is the split `train`, from which the packer takes the validation share; `t10k-*` is `test`. An idx
file is big-endian: two zero bytes, a type (8: uint8), the number of axes, one u32 per axis, then the values
(http://yann.lecun.com/exdb/mnist). Pictures have no subjects. Reading is bounded by what the header announces.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import Limits, Picture
from vaedist.data.sources import Item, Problem, SourceSettings

OPTIONS = frozenset({"fit"})
_NAME = re.compile(r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_SPLITS = {"train": "train", "t10k": "test"}
_IMAGES_PER_FILE = 8  # times --max-bytes: what an unpacked idx file may have, for it holds many images


def recognizes(path: Path) -> int:
    return 10 if _files(path) else 0


def _files(path: Path) -> dict[tuple[str, str], Path]:
    """(`train` or `t10k`, `images` or `labels`) to file, the plain one where both are there."""
    found: dict[tuple[str, str], Path] = {}
    files = path.iterdir() if path.is_dir() else ()
    for file in sorted(files, key=lambda file: len(file.name), reverse=True):
        name = _NAME.fullmatch(file.name)
        if name:
            found[name[1], name[2]] = file
    return found


def read_idx(path: Path, axes: int, limits: Limits) -> NDArray[np.uint8]:
    """The array of an idx file of uint8 with that many axes.

    Raises:
        UserError: unreadable, truncated, too long, or not such a file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes((0, 0, 8, axes)):
                raise UserError(f"{path} is not an idx file of uint8 with {axes} axes")
            shape = struct.unpack(f">{axes}I", head[4:])
            size = int(np.prod(shape, dtype=np.float64))
            if size > limits.bytes * _IMAGES_PER_FILE:
                values = f"{size:,} values {shape}"
                raise UserError(f"{path} announces {values}, more than is allowed (--max-bytes)")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read or is damaged ({error})") from None
    if len(data) != size:
        state = "is truncated" if len(data) < size else "goes on after its data"
        raise UserError(f"{path} {state}: its header announces {size:,} values {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


class MnistSource:
    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._files = _files(path)
        if not any(part == "images" for _, part in self._files):
            raise UserError(f"{path} holds no train-images-idx3-ubyte or t10k-images-idx3-ubyte (.gz or not)")
        self._images: dict[str, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": {}}  # a worker process reads the file itself

    def _pictures(self, part: str) -> NDArray[np.uint8]:
        if part not in self._images:
            self._images[part] = read_idx(self._files[part, "images"], 3, self._limits)
        return self._images[part]

    def items(self) -> Iterator[Item | Problem]:
        for part, split in _SPLITS.items():
            if (part, "images") not in self._files:
                continue
            images, file = self._pictures(part), self._files[part, "images"]
            labels: list[str] | None = None
            if (part, "labels") in self._files:
                labels = [str(label) for label in read_idx(self._files[part, "labels"], 1, self._limits)]
                if len(labels) != len(images):
                    counts = f"{len(labels)} labels for {len(images)} images"
                    raise UserError(f"{self._files[part, 'labels']} has {counts}")
            for i in range(len(images)):
                label = labels[i] if labels else None
                yield Item(f"{split}_{i:05d}", split, label, "", f"{file.name}[{i}]", (part, i))

    def load(self, item: Item) -> Picture:
        part, i = item.location
        return self._pictures(part)[i]


def open_source(path: Path, settings: SourceSettings) -> MnistSource:
    return MnistSource(path, settings.limits)
