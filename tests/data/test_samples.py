"""A model's samples as a packed folder that the stream and plain webdataset read; whole, or not there."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.inference.sample_shards import SampleShards

SOURCE = {"source": "vaedist-sample", "run": "toy"}
LABELS = [0, 1, -1, 1, 0, 0, 1, 1, 0, 0, 1, -1]


def images(channels: int) -> np.ndarray:
    draw = np.random.Generator(np.random.PCG64(channels))
    return draw.integers(0, 256, (12, channels, 6, 8)).astype(np.uint8)


def write(folder: Path, channels: int, sizes: tuple[int, ...] = (5, 7)) -> Index:
    held, start = images(channels), 0
    with SampleShards(folder, (channels, 6, 8), ("cat", "dog"), SOURCE, seed=9, per_shard=4) as shards:
        for size in sizes:
            part = slice(start, start + size)
            shards.add(held[part], start, LABELS[part])
            start += size
        return shards.finish()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stream_reads_what_was_written(channels: int, tmp_path: Path) -> None:
    index = write(tmp_path / "new" / "samples", channels)
    split = index.split("train")
    assert split.counts.tolist() == [4, 4, 4] and index.classes == ("cat", "dog")
    assert index.source == SOURCE
    [batch] = EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=12, workers=0))
    assert torch.equal(batch["image"], torch.from_numpy(images(channels)))
    assert batch["key"][:2] == ["sample-9-000000000", "sample-9-000000001"]
    assert [split.label(i) for i in range(12)] == LABELS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples"]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's reader leaves its files to the collector
def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "samples", 1)
    tars = [str(path) for path in sorted((tmp_path / "samples").glob("*.tar"))]
    state = random.getstate()  # webdataset's reader moves the global generator, even when it shuffles nothing
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("rgb8"))
    random.setstate(state)
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [f"sample-9-{i:09d}" for i in range(12)]
    assert [sample.get("cls", -1) for sample in samples] == LABELS
    assert (samples[3]["png"][..., 0] == images(1)[3, 0]).all()


def test_the_parts_do_not_matter(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", 1), write(tmp_path / "b", 1, (12,))
    assert one.identity == other.identity
    assert [shard.sha256 for shard in one.split("train").shards] == [
        shard.sha256 for shard in other.split("train").shards
    ]


def test_unfinished_it_leaves_nothing(tmp_path: Path) -> None:
    with SampleShards(tmp_path / "a", (1, 6, 8), (), SOURCE, seed=0, per_shard=2) as shards:
        shards.add(images(1), 0)
        assert list(tmp_path.glob(".tmp-*/*.tar"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    for folder in (tmp_path, tmp_path / "note.txt"):
        with pytest.raises(UserError, match="there already and not empty: give a new folder"):
            SampleShards(folder, (1, 6, 8), (), SOURCE, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
