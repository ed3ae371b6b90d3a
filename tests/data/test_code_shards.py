"""Folders of codes: packed folders like those of images, row for row, finished only when all shards are there."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from numpy.typing import NDArray

from vaedist.core.errors import DataError, UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.data.packing.code_shards import CodeWriter, codes_folder, open_codes
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings

STAMP = {"tokenizer": "ab" * 32, "images": "cd" * 32}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Several shards per split, with classes and subjects."""
    folder = tmp_path_factory.mktemp("codes") / "images"
    settings = SourceSettings(size=8, count={"train": 20, "validate": 7, "test": 5})
    pack(PackingConfig(input="phantom", out=folder, size=8, samples_per_shard=6, settings=settings))
    return Index.open(folder)


def grids(images: Index, split: str, shard: int, most: int = 70_000) -> NDArray[np.int64]:
    count = int(images.split(split).counts[shard])
    draw = np.random.Generator(np.random.PCG64([len(split), shard]))
    return draw.integers(0, most, (count, 3, 2))


def written(folder: Path, images: Index, num_codes: int = 70_000) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    writer = CodeWriter(folder, images, num_codes, STAMP)
    for split, shard in writer.missing():
        writer.write(split, shard, grids(images, split, shard, num_codes))
    writer.finish()
    return open_codes(folder, STAMP, images)


@pytest.mark.parametrize(("num_codes", "dtype"), [(512, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_what_is_written_is_read_row_for_row(
    num_codes: int, dtype: str, images: Index, tmp_path: Path
) -> None:
    codes = written(tmp_path / "codes", images, num_codes)
    assert codes.dtype == np.dtype(dtype) and codes.content == "codes" and codes.shape == (1, 3, 2)
    for name, split in images.splits.items():
        expected = np.concatenate(
            [grids(images, name, shard, num_codes) for shard in range(len(split.shards))]
        )
        batches = list(EvaluationStream(codes, name, EvaluationStreamConfig(batch_size=4, workers=0)))
        got = torch.cat([batch["codes"][batch["mask"]] for batch in batches])
        assert got.dtype == torch.int64 and np.array_equal(got.numpy(), expected)
        for sample in range(split.count):
            mine, theirs = codes.split(name), split
            assert (mine.key(sample), mine.label(sample), mine.subject(sample)) == (
                theirs.key(sample),
                theirs.label(sample),
                theirs.subject(sample),
            )


def test_the_same_codes_are_the_same_bytes_and_others_are_not(images: Index, tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", images), written(tmp_path / "two", images)
    assert one.identity == two.identity
    for path in sorted(one.folder.iterdir()):
        assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name
    assert written(tmp_path / "fewer", images, 512).identity != one.identity


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's reader leaves its files to the collector
def test_webdataset_reads_them(images: Index, tmp_path: Path) -> None:
    codes = written(tmp_path / "codes", images)
    tar = codes.split("validate").shards[0].tar
    state = random.getstate()  # webdataset's reader moves the global generator, even when it shuffles nothing
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode())
    random.setstate(state)
    gc.collect()
    expected = grids(images, "validate", 0)
    assert [sample["__key__"] for sample in samples] == list(codes.split("validate").columns(0).keys)
    assert np.array_equal(np.stack([sample["npy"] for sample in samples]), expected)
    assert [sample["cls"] for sample in samples] == codes.split("validate").columns(0).label.tolist()


def test_an_unfinished_folder_goes_on_and_is_nothing_until_then(images: Index, tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    folder.mkdir()
    writer = CodeWriter(folder, images, 70_000, STAMP)
    every = list(writer.missing())
    assert [split for split, _ in every] == ["train"] * 4 + ["validate"] * 2 + ["test"]
    for split, shard in every[:3]:
        writer.write(split, shard, grids(images, split, shard))
    with pytest.raises(UserError, match="not a packed folder"):
        open_codes(folder, STAMP, images)
    (folder / ".making" / "train-000003.tar.tmp").write_bytes(b"torn")
    (folder / "train-000001.tar").chmod(0o644)
    (folder / "train-000001.tar").write_bytes(b"cut short")
    again = CodeWriter(folder, images, 70_000, STAMP)
    assert list(again.missing()) == [every[1], *every[3:]]
    assert written(folder, images).identity == written(tmp_path / "straight", images).identity
    assert not (folder / ".making").exists()


def test_codes_of_other_weights_or_other_shards_are_refused(images: Index, tmp_path: Path) -> None:
    codes = written(tmp_path / "codes", images)
    with pytest.raises(UserError, match=r"do not come from this tokenizer .*\(tokenizer differs\)"):
        open_codes(codes.folder, {**STAMP, "tokenizer": "ef" * 32}, images)
    repacked = tmp_path / "repacked"
    settings = SourceSettings(size=8, count={"train": 20, "validate": 7, "test": 5})
    pack(PackingConfig(input="phantom", out=repacked, size=8, samples_per_shard=20, settings=settings))
    with pytest.raises(UserError, match=r"are not those of .*split 'train' differs"):
        open_codes(codes.folder, STAMP, Index.open(repacked))
    assert codes_folder(tmp_path, STAMP) != codes_folder(tmp_path, {**STAMP, "images": "ef" * 32})


def test_damage_is_found(images: Index, tmp_path: Path) -> None:
    codes = written(tmp_path / "codes", images)
    split = codes.split("test")
    content = bytearray(split.shards[0].tar.read_bytes())
    content[int(split.columns(0).offset[2])] ^= 1
    split.shards[0].tar.chmod(0o644)
    split.shards[0].tar.write_bytes(content)
    with pytest.raises(DataError, match=f"sample '{split.key(2)}' .*CRC-32 differs"):
        list(EvaluationStream(codes, "test", EvaluationStreamConfig(batch_size=5, workers=0)))


@pytest.mark.parametrize(("first", "limit"), [(0, None), (3, None), (3, 2), (19, None), (6, 6)])
def test_a_part_of_a_split_is_evaluated_in_order(first: int, limit: int | None, images: Index) -> None:
    stop = 20 if limit is None else first + limit
    stream = EvaluationStream(
        images, "train", EvaluationStreamConfig(batch_size=4, workers=0, first=first, limit=limit)
    )
    batches = list(stream)
    assert len(batches) == len(stream) == -(-(stop - first) // 4) and stream.count == stop - first
    seen = [
        sample
        for batch in batches
        for sample, real in zip(batch["sample"], batch["mask"].tolist(), strict=True)
        if real
    ]
    assert seen == list(range(first, stop))
    assert max(sample for batch in batches for sample in batch["sample"]) == stop - 1
    whole = next(iter(EvaluationStream(images, "train", EvaluationStreamConfig(batch_size=20, workers=0))))
    got = torch.cat([batch["image"][batch["mask"]] for batch in batches])
    assert torch.equal(got, whole["image"][first:stop])
