"""Tars written by webdataset's own writer become packed folders."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.data.packing.external_tars import index_tars, split_of
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.packing.verify import verify
from vaedist.data.sources import SourceSettings


def picture(i: int, shape: tuple[int, ...] = (12, 12)) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(i)).integers(0, 256, shape, dtype=np.uint8)


def write_shards(folder: Path, prefix: str, samples: list[dict[str, Any]], maxcount: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / f"{prefix}-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=maxcount, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def sample(i: int, codec: str = "png", shape: tuple[int, ...] = (12, 12), **more: Any) -> dict[str, Any]:
    return {"__key__": f"some/where/{i:04d}", codec: picture(i, shape), "cls": i % 3, **more}


@pytest.mark.parametrize("codec", ["png", "npy"])
@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 3)])
def test_tars_of_shard_writer(tmp_path: Path, codec: str, shape: tuple[int, ...]) -> None:
    write_shards(tmp_path, "train", [sample(i, codec, shape) for i in range(25)])
    write_shards(tmp_path, "val", [sample(i, codec, shape) for i in range(100, 107)])
    tars = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    index, rejected = index_tars(tmp_path)
    assert rejected == 0
    assert {name: split.count for name, split in index.splits.items()} == {"train": 25, "validate": 7}
    assert index.shape == (3 if len(shape) == 3 else 1, 12, 12)
    assert index.classes == ("0", "1", "2")
    assert index.split("train").key(0) == "some_where_0000"
    assert verify(index) == []
    assert {path: path.read_bytes() for path in tmp_path.glob("*.tar")} == tars
    stream = EvaluationStream(
        Index.open(tmp_path),
        "train",
        EvaluationStreamConfig(batch_size=25, rank=0, world=1, workers=0, device="cpu"),
    )
    (batch,) = list(stream)
    expected = picture(3, shape)
    expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    row = batch["key"].index("some_where_0003")
    assert (batch["image"][row].numpy() == expected).all()
    assert int(batch["label"][row]) == 0


def test_our_own_tars_get_their_index_back(tmp_path: Path) -> None:
    settings = SourceSettings(count={"train": 40, "validate": 10, "test": 10})
    index = pack(PackingConfig("phantom", tmp_path, size=16, samples_per_shard=15, settings=settings)).index
    for path in [*tmp_path.glob("*.cols"), *tmp_path.glob("*.json"), *tmp_path.glob("*.png")]:
        path.unlink()
    again, _ = index_tars(tmp_path)
    assert again.identity == index.identity
    assert again.classes == index.classes
    assert [again.split("test").subject(i) for i in range(10)] == [
        index.split("test").subject(i) for i in range(10)
    ]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-000000.tar", "train"),
        ("imagenet-val-0001.tar", "validate"),
        ("test/0.tar", "test"),
        ("validation_3.tar", "validate"),
        ("shard-0.tar", "train"),
        ("restraint-0.tar", "train"),
    ],
)
def test_splits_follow_from_names(path: str, split: str) -> None:
    assert split_of(path) == split


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"jpg": b"\xff\xd8\xff"}, "no png or npy member, only jpg: unpack"),
        ({"png": b""}, "is empty"),
        ({"png": b"hello" * 20}, "is not a PNG"),
        ({"png": _png(Image.fromarray(picture(0)))[:-40]}, "is damaged"),
        ({"png": _png(Image.new("P", (12, 12)))}, "-bit palette PNG, and only 8-bit"),
        ({"png": _png(Image.new("RGBA", (12, 12)))}, "RGBA PNG"),
        ({"png": _png(Image.fromarray(np.zeros((12, 12), np.uint16)))}, "16-bit gray"),
        ({"png": _png(Image.new("L", (13, 12)))}, "first sample"),
        ({"png": _png(Image.new("RGB", (12, 12)))}, "first sample"),
        ({"npy": _npy(picture(0))}, "first sample"),
        ({"npy": _npy(picture(0).astype(np.float32))}, "not uint8"),
        ({"npy": _npy(np.array([{"a": 1}], dtype=object))}, "not uint8"),
        ({"npy": _npy(picture(0))[:-10]}, "truncated"),
        ({"png": picture(0), "cls": b"cat"}, "class that is not a number"),
        ({"png": picture(0), "cls": b"-7"}, "class number -7"),
        ({"png": picture(0), "json": b"{"}, "not JSON"),
        ({"__key__": "some/where/0003", "png": picture(0)}, "same key"),
        ({"__key__": "some.where/0003", "png": picture(0)}, "same key"),
    ],
)
def test_samples_that_cannot_be_read_in_place(tmp_path: Path, bad: dict[str, Any], told: str) -> None:
    samples = [sample(i) for i in range(9)]
    write_shards(tmp_path, "train", [*samples, {"__key__": "bad", **bad}])
    with pytest.raises(UserError, match=told):
        index_tars(tmp_path)
    assert not (tmp_path / "index.json").exists()
    index, rejected = index_tars(tmp_path, skip_bad=True)
    assert rejected == 1
    assert index.split("train").count == 9
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1
    assert verify(index) == []


def test_keys_of_external_tars_become_safe(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [{"__key__": "../../etc/cron", "png": picture(0)}])
    index, _ = index_tars(tmp_path)
    assert index.split("train").key(0) == "etc_cron"
    assert index.classes == ()


def test_a_subject_in_two_splits(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [sample(i, json={"subject": "P1"}) for i in range(5)])
    write_shards(tmp_path, "test", [sample(9, json={"subject": "P1"})])
    with pytest.raises(UserError, match="subject P1, who occurs in test"):
        index_tars(tmp_path)


def test_folders_without_usable_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \*\.tar"):
        index_tars(tmp_path)
    (tmp_path / "train-0.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"train-0\.tar\.gz is compressed"):
        index_tars(tmp_path)
    (tmp_path / "train-0.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match=r"train-0\.tar is damaged or not an uncompressed tar"):
        index_tars(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an index\.json already"):
        index_tars(tmp_path)


def test_a_cut_tar(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [sample(i) for i in range(5)])
    tar = tmp_path / "train-000000.tar"
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + 10])
    with pytest.raises(UserError, match="damaged"):
        index_tars(tmp_path)


def test_class_names_come_from_json(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")
    write_shards(tmp_path, "train", [sample(i, json={"class": names[i % 3]}) for i in range(6)])
    index, _ = index_tars(tmp_path)
    assert index.classes == names
    note = json.loads((tmp_path / "index.json").read_text())["source"]
    assert note["source"] == "tars"
