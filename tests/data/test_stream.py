from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vaedist.core.errors import DataError, UserError
from vaedist.data.loading.order import TrainingOrder
from vaedist.data.loading.prefetch import prefetch
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)

COUNTS = [7, 1, 12, 4, 9]  # 33 samples


@pytest.fixture(scope="module")
def index(tmp_path_factory, pack):
    return pack(tmp_path_factory.mktemp("packed"), {"train": COUNTS, "test": [3, 2]})


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vaedist-reader")]


@pytest.mark.parametrize("cache", ["none", "memory", "device"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("codec", "shape"), [("png", (1, 8, 8)), ("png", (3, 5, 7)), ("npy", (1, 6, 4)), ("npy", (2, 3, 4))]
)
def test_batches_hold_the_right_images(tmp_path, pack, expected, cache, workers, codec, shape):
    index = pack(tmp_path, {"train": COUNTS}, codec=codec, shape=shape)
    stream = TrainingStream(
        index, "train", TrainingStreamConfig(batch_size=6, lanes=3, seed=1, cache=cache, workers=workers)
    )
    order = TrainingOrder(COUNTS, seed=1, batch_size=6, lanes=3)
    assert stream.steps_per_epoch == 5
    for step, batch in zip(range(3, 14), stream.batches(3), strict=False):
        wanted = order.rows(step).tolist()
        assert batch["sample"] == wanted
        assert list(batch["key"]) == [f"train-{n:05d}" for n in wanted]
        assert (
            batch["key"][-1] == f"train-{wanted[-1]:05d}"
            and list(batch["key"][2:4]) == list(batch["key"])[2:4]
        )
        assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [n % 3 for n in wanted]
        assert batch["image"].dtype == torch.uint8
        assert np.array_equal(batch["image"].numpy(), expected("train", wanted, shape))
    stream.close()
    assert stream.wait_seconds > 0 and readers() == []


@given(
    world=st.sampled_from([1, 2, 3, 5]),
    step=st.integers(0, 40),
    batch_size=st.integers(5, 33),
    workers=st.integers(0, 2),
    cache=st.sampled_from(["none", "memory", "device"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_global_batch_is_the_same_for_every_world(
    index, expected, world, step, batch_size, workers, cache, data
):
    lanes = data.draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))
    order = TrainingOrder(COUNTS, seed=3, batch_size=batch_size, lanes=lanes)
    images: list[list[np.ndarray]] = [[], [], []]
    for rank in range(world):
        stream = TrainingStream(
            index,
            "train",
            TrainingStreamConfig(
                batch_size=batch_size,
                lanes=lanes,
                seed=3,
                rank=rank,
                world=world,
                cache=cache,
                workers=workers,
            ),
        )
        for place, batch in zip(range(3), stream.batches(step), strict=False):
            images[place].append(batch["image"].numpy())
        stream.close()
        assert stream.resident_peak <= stream.resident_limit
    for place in range(3):
        assert np.array_equal(np.concatenate(images[place]), expected("train", order.rows(step + place)))


def test_an_epoch_has_each_sample_once(index):
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0))
    for epoch in range(3):
        batches = itertools.islice(stream.batches(epoch * 8), 8)
        seen = [n for batch in batches for n in batch["sample"]]
        assert len(seen) == len(set(seen)) == 32, "one of 33 is left out"
    stream.close()


def test_batches_do_not_share_memory(index):
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0, cache="memory"))
    batches = list(itertools.islice(stream.batches(0), 3))
    kept = [batch["image"].clone() for batch in batches]
    batches[1]["image"].zero_()
    assert torch.equal(batches[0]["image"], kept[0]) and torch.equal(batches[2]["image"], kept[2])
    assert torch.equal(next(stream.batches(1))["image"], kept[1]), "nor with the cache"
    stream.close()


def test_a_resumed_rank_opens_only_the_shards_of_its_next_batches(tmp_path, pack):
    index = pack(tmp_path, {"train": [8] * 12})
    order = TrainingOrder([8] * 12, seed=5, batch_size=8, lanes=4)
    step, world, rank = 7, 2, 1
    needed = {index.split("train").locate(int(n))[0] for t in (step, step + 1) for n in order.rows(t, 4, 8)}
    assert len(needed) < 6
    for number, shard in enumerate(index.split("train").shards):
        if number not in needed:
            shard.tar.unlink()
            shard.columns_path.unlink()
    stream = TrainingStream(
        index, "train", TrainingStreamConfig(batch_size=8, lanes=4, seed=5, rank=rank, world=world, workers=0)
    )
    batches = stream.batches(step)
    assert [next(batches)["sample"], next(batches)["sample"]] == [
        order.rows(t, 4, 8).tolist() for t in (step, step + 1)
    ]
    stream.close()


def test_each_shard_is_read_once_per_lane_and_resident_shards_are_bounded(tmp_path, pack, monkeypatch):
    from vaedist.data.loading import stream as module

    opened = []

    class Counted(module.ShardReader):
        def __init__(self, index, split, shard):
            opened.append(shard)
            super().__init__(index, split, shard)

    monkeypatch.setattr(module, "ShardReader", Counted)
    index = pack(tmp_path, {"train": [24] * 16})
    for workers, spare in ((0, 1), (1, 2), (3, 4)):
        opened.clear()
        stream = TrainingStream(
            index, "train", TrainingStreamConfig(batch_size=8, lanes=4, seed=5, workers=workers)
        )
        for _ in itertools.islice(stream.batches(0), stream.steps_per_epoch - 1):
            pass
        stream.close()
        # 4 lanes cut 16 shards at 3 places at most; readers may have begun on the next epoch.
        assert len(opened) <= 16 + 3 + 4 * (workers > 0)
        assert stream.resident_peak <= 4 + spare <= stream.resident_limit


def test_a_reader_thread_s_error_is_the_consumer_s(tmp_path, pack):
    index = pack(tmp_path, {"train": [8, 8]})
    for shard in index.split("train").shards:
        shard.tar.unlink()
    for workers in (0, 2):
        stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0, workers=workers))
        batches = stream.batches(0)
        with pytest.raises(
            DataError, match=r"train-00000.\.tar: sample 'train-000\d\d' at byte 0: .*cannot be read"
        ):
            next(batches)
        assert next(batches, None) is None, "an iterator that failed has ended"
        assert readers() == []


def test_close_ends_iterators_and_joins_threads(index):
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0, workers=2))
    batches = stream.batches(0)
    next(batches)
    assert readers() != []
    stream.close()
    stream.close()
    assert readers() == [] and next(batches, None) is None
    assert next(stream.batches(0))["sample"], "a closed stream can start again"
    stream.close()


def test_no_class_is_shown_as_zero(tmp_path, pack):
    index = pack(tmp_path, {"train": [4]}, classes=())
    assert index.split("train").label(2) == -1 and index.spec.classes == 0
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0, workers=0))
    assert next(stream.batches(0))["label"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"batch_size": 40},
            "has 33 samples, fewer than one global batch of 40: set train.batch_size to at most 33",
        ),
        ({"batch_size": 12, "lanes": 5}, "data.lanes is 5.* use one of 1, 2, 3, 4, 6, 12"),
        ({"batch_size": 4, "world": 5}, "at most 4 processes, or set train.batch_size to at least 5"),
    ],
)
def test_what_does_not_fit_says_what_would(index, options, says):
    with pytest.raises(UserError, match=says):
        TrainingStream(index, "train", TrainingStreamConfig(seed=0, **options))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 33, 64])
@pytest.mark.parametrize("limit", [None, 1, 10, 100])
def test_evaluation_sees_every_sample_once(index, expected, world, batch_size, limit):
    count = min(33, limit or 33)
    seen, lengths, shapes = [], set(), []
    for rank in range(world):
        stream = EvaluationStream(
            index,
            "train",
            EvaluationStreamConfig(
                batch_size=batch_size, rank=rank, world=world, limit=limit, workers=rank % 2
            ),
        )
        batches = list(stream)
        lengths.add(len(batches))
        assert len(batches) == len(stream) and readers() == []
        shapes.append([len(batch["image"]) for batch in batches])
        for number, batch in enumerate(batches):
            assert np.array_equal(batch["image"].numpy(), expected("train", batch["sample"]))
            assert batch["label"].tolist() == [n % 3 for n in batch["sample"]]
            real = [n for n, keep in zip(batch["sample"], batch["mask"].tolist(), strict=True) if keep]
            seen += [(number, rank, n) for n in real]
    assert len(lengths) == 1 and all(size >= 1 for sizes in shapes for size in sizes)
    assert [n for _, _, n in sorted(seen)] == list(range(count)), "in index order over batches and ranks"


def test_evaluation_can_be_iterated_again(index):
    stream = EvaluationStream(index, "test", EvaluationStreamConfig(batch_size=2, workers=2))
    assert [batch["key"] for batch in stream] == [batch["key"] for batch in stream]
    assert stream.wait_seconds > 0


def test_sums_over_masked_rows_do_not_depend_on_processes(tmp_path, pack):
    index = pack(tmp_path, {"test": [50, 50, 28]})
    totals = set()
    for world, batch_size in ((1, 64), (2, 64), (3, 64), (3, 50), (5, 7)):
        total = count = 0
        for rank in range(world):
            for batch in EvaluationStream(
                index, "test", EvaluationStreamConfig(batch_size=batch_size, rank=rank, world=world)
            ):
                kept = batch["image"][batch["mask"]]
                total, count = total + int(kept.long().sum()), count + len(kept)
        totals.add((total, count))
    assert len(totals) == 1 and next(iter(totals))[1] == 128


@pytest.mark.parametrize(("device", "wanted"), [("cuda", 3), ("cuda:1", 1)])
def test_readers_enter_the_gpu_that_is_meant(monkeypatch, device, wanted):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    made = prefetch(lambda task: task, iter(range(6)), 2, torch.device(device))
    assert [call() for call in made] == list(range(6)) and set(entered) == {wanted}
