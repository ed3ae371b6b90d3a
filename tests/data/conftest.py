"""Small packed folders, written with webdataset's own writer."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from tests.data.node_local import SPLITS
from vaedist.data.format.columns import SampleRow, write_columns
from vaedist.data.format.identity import data_identity, pixel_digest
from vaedist.data.format.index import DatasetInfo, Index, write_index
from vaedist.data.format.split import Shard

Pack = Callable[..., Index]


def picture(split: str, number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(C, H, W) uint8 that only this sample has: noise from its own generator."""
    seed = np.random.SeedSequence(zlib.crc32(split.encode()), spawn_key=(number,))
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, shape, dtype=np.uint8)


def _encoded(image: np.ndarray, codec: str) -> bytes:
    stored = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    file = io.BytesIO()
    if codec == "png":
        Image.fromarray(stored).save(file, "PNG")
    else:
        np.save(file, np.ascontiguousarray(stored))
    return file.getvalue()


@pytest.fixture(scope="session")
def pack() -> Pack:
    """`pack(folder, {"train": [counts per shard], ...}, codec=, shape=, classes=)`: a packed folder, opened."""

    def write(
        folder: Path,
        splits: Mapping[str, Sequence[int]],
        *,
        codec: str = "png",
        shape: tuple[int, int, int] = (1, 8, 8),
        classes: Sequence[str] = ("a", "b", "c"),
    ) -> Index:
        folder.mkdir(parents=True, exist_ok=True)
        samples, shards = [], {}
        for split, counts in splits.items():
            shards[split], number = [], 0
            for place, count in enumerate(counts):
                tar = folder / f"{split}-{place:06d}.tar"
                columns = tar.with_suffix(".cols")
                numbers = range(number, number + count)
                with webdataset.TarWriter(str(tar), mtime=0) as writer:
                    for n in numbers:
                        label = n % len(classes) if classes else -1
                        data = _encoded(picture(split, n, shape), codec)
                        sample = {"__key__": f"{split}-{n:05d}", codec: data, "json": {"n": n}}
                        writer.write(sample | ({"cls": label} if classes else {}))
                with tarfile.open(tar) as archive:
                    members = {member.name: member.offset_data for member in archive}
                raw = tar.read_bytes()
                rows = []
                for n in numbers:
                    key, label = f"{split}-{n:05d}", n % len(classes) if classes else -1
                    offset = members[f"{key}.{codec}"]
                    size = len(_encoded(picture(split, n, shape), codec))
                    if codec == "npy":
                        pixels = int(np.prod(shape))
                        offset, size = offset + size - pixels, pixels
                    crc, digest = (
                        zlib.crc32(raw[offset : offset + size]),
                        pixel_digest(picture(split, n, shape)),
                    )
                    rows.append(SampleRow(key, offset, size, crc, label, f"subject {n // 4}", digest))
                    samples.append((split, key, label, digest))
                columns_sha = write_columns(columns, tar, rows)
                sha = hashlib.sha256(raw).hexdigest()
                shards[split].append(Shard(tar, columns, count, len(raw), sha, columns_sha))
                number += count
        info = DatasetInfo(shape, codec, tuple(classes), {"kind": "test"})
        write_index(folder, shards, info, data_identity(samples, shape))
        return Index.open(folder)

    return write


@pytest.fixture(scope="session")
def expected() -> Callable[..., np.ndarray]:
    """`expected(split, numbers, shape)`: the (B, C, H, W) images that `pack` wrote."""
    return lambda split, numbers, shape=(1, 8, 8): np.stack([picture(split, n, shape) for n in numbers])


# A node's own disk ------------------------------------------------------------------------------------------


@pytest.fixture
def index(pack: Pack, tmp_path: Path) -> Index:
    return pack(tmp_path / "shared", SPLITS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's own disk."""
    folder = tmp_path / "local"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("VAEDIST_NODE_LOCAL", str(folder))
    monkeypatch.delenv("VAEDIST_GROUP", raising=False)
    return folder


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of since the last look."""
    caplog.set_level(logging.WARNING, "vaedist")

    def take() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return lines

    return take
