"""Streams: the batches of one rank, for training from any step and for evaluation.

`vaedist.data.loading.order` says which samples make up a training batch: a pure function of seed and step, the same for
every number of processes. This module reads them, ahead of time and in threads, and resumes at any step without
touching what came before it.

A folder of codes (`vaedist.data.packing.code_shards`) streams alike: `codes`, (B, h, w) int64, take the place of
`image`.

Evaluation has another order: every sample once, in index order, the last batch padded with its last sample and
masked, and all ranks yield the same number of batches.

Memory: a shard being trained on lies in memory whole, as it is in the tar (64 MB at most by default). A lane is a
contiguous run of the order, so a rank holds one shard for each lane that it reads, and for a moment the next one;
`resident_limit` states the most, 2 * lanes read + reader threads. Evaluation reads runs of rows and holds none.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import Batch
from vaedist.core.errors import UserError
from vaedist.data.format.columns import LazyStrings, StringColumn
from vaedist.data.format.index import Index
from vaedist.data.format.shard_reader import ShardReader
from vaedist.data.format.split import Split
from vaedist.data.loading.cache import Cache, Collectives, StaticTransform, copy_to_device, fill_cache
from vaedist.data.loading.order import Samples, TrainingOrder, default_lanes, slice_bounds
from vaedist.data.loading.prefetch import prefetch
from vaedist.data.loading.resident_shards import ResidentShards

_Part = tuple[int, NDArray[np.intp], Samples]  # shard, rows of the batch, rows of the shard


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What both streams need to know.

    Attributes:
        batch_size: Global batch B, over all processes.
        rank, world: This process among all.
        workers: Reader threads, which keep up to 2 * workers batches ready; 0 reads in the caller's thread.
        device: Where batches go; pinned and sent without waiting for a GPU.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    workers: int = 1
    device: torch.device | str = "cpu"


@dataclass(frozen=True, kw_only=True)
class TrainingStreamConfig(StreamConfig):
    """How to stream training batches.

    Attributes:
        seed: The job's seed.
        lanes: Order lanes L; none: `default_lanes(batch_size)`.
        cache: `memory` decodes every image once into memory that the node's processes share; `device` sends them on
            to the device.
        static_transform: What is done to each image once, where a cache holds it.
        memory_limit: Bytes that the cache may take on this node; default: 80 % of what is free.
        group: The process group, needed by the cache of several processes. Creating the stream is then collective.
    """

    seed: int
    lanes: int | None = None
    cache: Cache = "none"
    static_transform: StaticTransform | None = None
    memory_limit: int | None = None
    group: Collectives | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationStreamConfig(StreamConfig):
    """How to stream a split for evaluation; a `batch_size` below `world` is raised to it, so that no rank has no rows.

    Attributes:
        first: The sample to begin with.
        limit: Only so many samples.
    """

    first: int = 0
    limit: int | None = None


class _Stream:
    """What both streams share: the index, running iterators, and assembling a batch."""

    def __init__(self, index: Index, split: str, config: StreamConfig) -> None:
        assert 0 <= config.rank < config.world
        self.index, self.split, self.workers = index, index.split(split), config.workers
        self.device = torch.device(config.device)
        self._pinned = self.device.type == "cuda"
        self._field: Literal["image", "codes"] = index.content
        self.wait_seconds = 0.0
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    def close(self) -> None:
        """Stop and join the reader threads; running iterators end. Safe to call twice."""
        while self._running:
            self._running.pop().close()

    def _run(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        self._running.add(batches)
        return batches

    def _timed(self, made: Generator[Callable[[], Batch], None, None]) -> Generator[Batch, None, None]:
        """Wait for each batch, counting the seconds, and send it to the device."""
        try:
            while True:
                begin = time.perf_counter()
                wait = next(made, None)
                batch = None if wait is None else wait()
                self.wait_seconds += time.perf_counter() - begin
                if batch is None:
                    return
                if self.device.type != "cpu":
                    batch[self._field] = batch[self._field].to(self.device, non_blocking=True)
                    batch["label"] = batch["label"].to(self.device, non_blocking=True)
                    if "mask" in batch:
                        batch["mask"] = batch["mask"].to(self.device)
                yield batch
        finally:
            made.close()

    def _empty(self, rows: int) -> tuple[Tensor, NDArray[Any]]:
        """What a batch will hold, (rows, C, H, W) uint8 or (rows, h, w) int64, and a (rows, C, H, W) view to fill."""
        shape, dtype = self.index.shape, torch.uint8
        if self._field == "codes":
            shape, dtype = shape[1:], torch.int64
        content = torch.empty((rows, *shape), dtype=dtype, pin_memory=self._pinned)
        return content, content.numpy().reshape(rows, *self.index.shape)

    def _group_by_shard(self, samples: Samples) -> list[_Part]:
        """Which rows come from which shard, in the order of first use."""
        shards = np.searchsorted(self.split.starts, samples, side="right") - 1
        inside = samples - self.split.starts[shards]
        numbers, firsts = np.unique(shards, return_index=True)
        rows = {shard: np.flatnonzero(shards == shard) for shard in numbers[np.argsort(firsts)].tolist()}
        return [(shard, places, inside[places]) for shard, places in rows.items()]

    def _with_columns(self, content: Tensor, samples: Samples, parts: list[_Part]) -> Batch:
        """The content with its (B_r,) labels, keys and sample numbers, looked up shard by shard."""
        label = np.empty(len(samples), np.int64)
        keys = [""] * len(samples)
        for shard, places, rows in parts:
            columns = self.split.columns(shard)
            label[places] = columns.label[rows]
            for place, key in zip(places.tolist(), columns.keys.take(rows), strict=True):
                keys[place] = key
        return self._assemble(content, samples, _class_numbers(label), keys)

    def _assemble(
        self, content: Tensor, samples: Samples, label: NDArray[np.int64], keys: Sequence[str]
    ) -> Batch:
        labels = torch.from_numpy(label)
        batch: Batch = {"label": labels.pin_memory() if self._pinned else labels, "key": keys}
        batch["sample"], batch[self._field] = samples.tolist(), content
        return batch


def _class_numbers(label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels as a batch has them: in the columns, -1 says that a sample has no class."""
    return np.maximum(label, 0)


class _CachedSplit:
    """A split in memory, with the labels and keys of all samples: one look-up for a batch instead of one per shard.

    Args:
        split: Which.
        images: All of them, as `fill_cache` returns them.
        device: Where to copy them, if there is room; none: they stay where they are.
    """

    def __init__(self, split: Split, images: NDArray[Any], device: torch.device | None) -> None:
        copied = None if device is None else copy_to_device(images, device)
        self.kind: Cache = "memory" if copied is None else "device"
        # Once they are copied, the node's memory is free again as soon as its last process has released it.
        self.images = images if copied is None else copied
        columns = list(split.all_columns())
        self.label = _class_numbers(np.concatenate([shard.label for shard in columns]))
        self.keys = StringColumn.concatenate([shard.keys for shard in columns])


class TrainingStream(_Stream):
    """Batches of one rank for training, endless, from any step.

    Args:
        index: The packed folder.
        split: Name of the split to train on.
        config: How to stream it.

    Attributes:
        cache: What is in effect: less than was asked for where there is no room.
        transformed: Whether the static transform was applied to the images that come.
        steps_per_epoch: N // B.
        wait_seconds: Time that the consumer has waited for batches.
        workers: May be set until the first batch is asked for.

    Raises:
        UserError: the batch does not fit the data, the lanes or the processes; says what would.
        DataError: on reading, naming sample, shard and offset.
    """

    def __init__(self, index: Index, split: str, config: TrainingStreamConfig) -> None:
        super().__init__(index, split, config)
        batch_size, count, world = config.batch_size, self.split.count, config.world
        if batch_size > count:
            raise UserError(
                f"the split {split!r} of {index.folder} has {count} samples, fewer than one global batch of "
                f"{batch_size}: set train.batch_size to at most {count}, or pack more data"
            )
        if world > batch_size:
            raise UserError(
                f"{world} processes cannot share a global batch of {batch_size}: use at most {batch_size} "
                f"processes, or set train.batch_size to at least {world}"
            )
        lanes = default_lanes(batch_size) if config.lanes is None else config.lanes
        if lanes < 1 or batch_size % lanes:
            valid = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
            raise UserError(
                f"data.lanes is {lanes}, which does not divide the global batch of {batch_size}: use one of {valid}"
            )
        self.batch_size, self.lanes, self._seed = batch_size, lanes, config.seed
        self.start, self.stop = slice_bounds(batch_size, config.rank, world)
        self.steps_per_epoch = count // batch_size
        self.resident_peak = 0
        self._cached: _CachedSplit | None = None
        if config.cache != "none":
            images = fill_cache(
                index,
                self.split,
                transform=config.static_transform,
                group=config.group,
                # All cores of this process decode: nothing else is done meanwhile.
                workers=max(config.workers, torch.get_num_threads()),
                memory_limit=config.memory_limit,
            )
            if images is not None:
                device = self.device if config.cache == "device" else None
                self._cached = _CachedSplit(self.split, images, device)
        self.cache: Cache = "none" if self._cached is None else self._cached.kind
        self.transformed = config.static_transform is not None and self._cached is not None

    @property
    def resident_limit(self) -> int:
        """The most shards in memory at once: two for each lane that is read, and one for each reader."""
        width = self.batch_size // self.lanes
        return 2 * (-(-self.stop // width) - self.start // width) + max(1, self.workers)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This rank's rows of the global batches `start`, `start + 1`, ...; reads no earlier ones."""
        return self._run(self._batches(start))

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        batch_size, lanes = self.batch_size, self.lanes
        order = TrainingOrder(self.split.counts, seed=self._seed, batch_size=batch_size, lanes=lanes)
        steps = (order.rows(step, self.start, self.stop) for step in itertools.count(start))
        if self._cached is not None:
            take = partial(self._from_memory, self._cached)
            yield from self._timed(prefetch(take, steps, self.workers, self.device))
            return
        resident = ResidentShards(partial(ShardReader, self.index, self.split), self.resident_limit)
        make = partial(self._from_shards, resident)
        try:
            yield from self._timed(prefetch(make, self._plans(steps, resident), self.workers, self.device))
        finally:
            self.resident_peak = max(self.resident_peak, resident.peak)

    def _plans(
        self, steps: Iterator[Samples], resident: ResidentShards
    ) -> Iterator[tuple[Samples, list[_Part]]]:
        """Samples and their shards, one batch ahead of use: a shard that the next batch needs is not dropped."""
        ahead = None
        for samples in steps:
            parts = self._group_by_shard(samples)
            resident.require([shard for shard, _, _ in parts])
            if ahead is not None:
                yield ahead
            ahead = samples, parts

    def _from_shards(self, resident: ResidentShards, plan: tuple[Samples, list[_Part]]) -> Batch:
        samples, parts = plan
        content, pixels = self._empty(len(samples))
        for shard, places, rows in parts:
            reader = resident.get(shard)
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                reader.decode(row, pixels[place])
            resident.release(shard)
        return self._with_columns(content, samples, parts)

    def _from_memory(self, cached: _CachedSplit, samples: Samples) -> Batch:
        images = cached.images
        if isinstance(images, Tensor):
            content = images[torch.from_numpy(samples).to(self.device)]
            if self._field == "codes":
                content = content[:, 0].long()
        else:
            # The processor's caches hold nothing of this between two steps: few calls, not few copies, make it fast.
            taken = images.take(samples, axis=0)
            content = torch.from_numpy(taken if self._field == "image" else taken[:, 0].astype(np.int64))
            if self._pinned:
                content = content.pin_memory()
        return self._assemble(content, samples, cached.label.take(samples), LazyStrings(cached.keys, samples))


class EvaluationStream(_Stream):
    """Every sample of a split once, in index order; can be iterated more than once.

    Batch t holds samples t*B to (t+1)*B, of which each rank takes its slice. Rows beyond the last sample repeat
    it and are False in `mask`, so that all ranks yield the same number of batches of the same sizes.

    Args:
        index: The packed folder.
        split: Name of the split.
        config: How to stream it.

    Raises:
        DataError: on reading, naming sample, shard and offset.
    """

    def __init__(self, index: Index, split: str, config: EvaluationStreamConfig) -> None:
        super().__init__(index, split, config)
        self.batch_size, self.first = max(config.batch_size, config.world), config.first
        left = self.split.count - config.first
        self.count = left if config.limit is None else min(config.limit, left)
        self.start, self.stop = slice_bounds(self.batch_size, config.rank, config.world)

    def __len__(self) -> int:
        """Batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._batches())

    def _batches(self) -> Generator[Batch, None, None]:
        yield from self._timed(prefetch(self._make, iter(range(len(self))), self.workers, self.device))

    def _make(self, number: int) -> Batch:
        numbers = np.arange(self.start, self.stop) + number * self.batch_size
        mask = numbers < self.count
        samples = np.minimum(numbers, self.count - 1) + self.first
        content, pixels = self._empty(len(samples))
        parts = self._group_by_shard(samples)
        for shard, places, rows in parts:
            first = int(rows[0])
            reader = ShardReader(self.index, self.split, shard, first, int(rows[-1]) + 1)
            done = -1
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                if row == done:
                    pixels[place] = pixels[place - 1]  # padding
                else:
                    reader.decode(row, pixels[place])
                done = row
        batch = self._with_columns(content, samples, parts)
        batch["mask"] = torch.from_numpy(mask)
        return batch
