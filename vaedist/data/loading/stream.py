"""The stream: batches of one rank, for training from any step and for evaluation.

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

import collections
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import Batch
from vaedist.core.errors import UserError
from vaedist.data.format.columns import Strings, Taken
from vaedist.data.format.decoding import Rows
from vaedist.data.format.index import Index, Split
from vaedist.data.loading.cache import Cache, Finish, Node, fill_memory, on_device
from vaedist.data.loading.order import Order, Samples, default_lanes, epoch_order, slice_bounds

__all__ = ["EvaluationStream", "Order", "TrainingStream", "default_lanes", "epoch_order", "slice_bounds"]


# Shards in memory --------------------------------------------------------------------------------------------


class _Resident:
    """Shards held in memory: each is read when first asked for and dropped when no planned batch needs it."""

    def __init__(self, read: Callable[[int], Rows], limit: int) -> None:
        self._read, self._limit = read, limit
        self._needed: collections.Counter[int] = collections.Counter()
        self._held: collections.OrderedDict[int, Future[Rows]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.peak = 0

    def need(self, shards: Sequence[int]) -> None:
        """A batch that will be made needs these."""
        with self._lock:
            self._needed.update(shards)

    def done(self, shard: int) -> None:
        """One batch that needed it does no more."""
        with self._lock:
            self._needed[shard] -= 1
            if not self._needed[shard]:
                del self._needed[shard]
                self._held.pop(shard, None)

    def get(self, shard: int) -> Rows:
        """The shard; a thread that asks for one which another is reading waits for it."""
        with self._lock:
            future = self._held.get(shard)
            mine = future is None
            if future is None:
                while len(self._held) >= self._limit:
                    self._held.popitem(last=False)  # only where shards are tiny: it is read again when needed
                future = self._held[shard] = Future()
                self.peak = max(self.peak, len(self._held))
            self._held.move_to_end(shard)
        if mine:
            try:
                future.set_result(self._read(shard))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()


# Batches in order, made ahead --------------------------------------------------------------------------------

_Part = tuple[int, NDArray[np.intp], Samples]  # shard, rows of the batch, rows of the shard
_Plan = TypeVar("_Plan")
_Made = TypeVar("_Made")


def _in_order(
    make: Callable[[_Plan], _Made], plans: Iterator[_Plan], workers: int, device: torch.device
) -> Generator[Callable[[], _Made], None, None]:
    """For each plan, in order, a call that returns `make(plan)`; `workers` threads run up to 2 * workers ahead."""
    if workers == 0:
        for plan in plans:
            yield partial(make, plan)
        return

    # Pinned memory belongs to the context of a thread's current GPU, and a new thread's is the first one.
    gpu = device.index
    if device.type == "cuda" and gpu is None:
        gpu = torch.cuda.current_device()

    def enter_thread() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(gpu)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vaedist-reader", initializer=enter_thread)
    waiting: collections.deque[Future[_Made]] = collections.deque()
    try:
        for plan in plans:
            waiting.append(pool.submit(make, plan))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Stream:
    """What both streams share: the index, a thread pool behind an iterator, and assembling a batch."""

    def __init__(
        self, index: Index, split: str, *, rank: int, world: int, workers: int, device: torch.device | str
    ) -> None:
        assert 0 <= rank < world
        self.index, self.split = index, index.split(split)
        self.rank, self.world, self.workers = rank, world, workers
        self.device = torch.device(device)
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
        codes = self._field == "codes"
        shape, dtype = (
            self.index.shape[1:] if codes else self.index.shape,
            torch.int64 if codes else torch.uint8,
        )
        content = torch.empty((rows, *shape), dtype=dtype, pin_memory=self._pinned)
        return content, content.numpy().reshape(rows, *self.index.shape)

    def _by_shard(self, samples: Samples) -> list[_Part]:
        """Which rows come from which shard, in the order of first use."""
        shards = np.searchsorted(self.split.starts, samples, side="right") - 1
        inside = samples - self.split.starts[shards]
        numbers, firsts = np.unique(shards, return_index=True)
        return [
            (int(shard), places, inside[places])
            for shard in numbers[np.argsort(firsts)]
            for places in [np.flatnonzero(shards == shard)]
        ]

    def _batch(self, content: Tensor, samples: Samples, parts: list[_Part]) -> Batch:
        """The content with its (B_r,) labels, keys and sample numbers, looked up shard by shard."""
        label = np.empty(len(samples), np.int64)
        keys = [""] * len(samples)
        for shard, places, rows in parts:
            columns = self.split.columns(shard)
            label[places] = columns.label[rows]
            for place, key in zip(places.tolist(), columns.keys.take(rows), strict=True):
                keys[place] = key
        return self._described(content, samples, _classes(label), keys)

    def _described(
        self, content: Tensor, samples: Samples, label: NDArray[np.int64], keys: Sequence[str]
    ) -> Batch:
        labels = torch.from_numpy(label)
        if self._pinned:
            labels = labels.pin_memory()
        batch: Batch = {"label": labels, "key": keys, "sample": samples.tolist()}
        batch[self._field] = content
        return batch


def _classes(label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels as a batch has them: in the columns, -1 says that a sample has no class."""
    return np.maximum(label, 0)


class _Held:
    """A split in memory, with what is known of every sample: one look instead of one per shard.

    Args:
        split: Whose.
        images: All of them, as `fill_memory` gives them.
        device: Where they are to lie, if there is room; none: where they are.
    """

    def __init__(self, split: Split, images: NDArray[Any], device: torch.device | None) -> None:
        there = None if device is None else on_device(images, device)
        self.cache: Cache = "memory" if there is None else "device"
        # Once they are there, the node's memory is free again when its last process has let go.
        self.images = images if there is None else there
        columns = [split.columns(shard) for shard in range(len(split.shards))]
        self.label = _classes(np.concatenate([one.label for one in columns]))
        self.keys = Strings.joined([one.keys for one in columns])


class TrainingStream(_Stream):
    """Batches of one rank for training, endless, from any step.

    Args:
        index: The packed folder.
        split: Name of the split to train on.
        batch_size: Global batch B.
        lanes: Order lanes L; none: `default_lanes(batch_size)`.
        seed: The job's seed.
        rank, world: This process among all.
        cache: `memory` decodes every image once into memory that the node's processes share; `device` sends them on
            to the device.
        finish: What is done to each image once, where a cache holds it: a function of the image and its key alone.
        workers: Reader threads, which keep up to 2 * workers batches ready; 0 reads in the caller's thread.
        device: Where batches go; pinned and sent without waiting for a GPU.
        memory_limit: Bytes that the cache may take on this node; default: 80 % of what is free.
        node: The process group, needed by the cache of several processes. The constructor is then collective.

    Attributes:
        cache: What is in effect: less than was asked for where there is no room.
        finished: Whether `finish` was done to the images that come.
        steps_per_epoch: N // B.
        wait_seconds: Time that the consumer has waited for batches.
        workers: May be set until the first batch is asked for.

    Raises:
        UserError: the batch does not fit the data, the lanes or the processes; says what would.
        DataError: on reading, naming sample, shard and offset.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        batch_size: int,
        lanes: int | None = None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        cache: Cache = "none",
        finish: Finish | None = None,
        workers: int = 1,
        device: torch.device | str = "cpu",
        memory_limit: int | None = None,
        node: Node | None = None,
    ) -> None:
        super().__init__(index, split, rank=rank, world=world, workers=workers, device=device)
        count = self.split.count
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
        lanes = default_lanes(batch_size) if lanes is None else lanes
        if lanes < 1 or batch_size % lanes:
            valid = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
            raise UserError(
                f"data.lanes is {lanes}, which does not divide the global batch of {batch_size}: use one of {valid}"
            )
        self.batch_size, self.lanes = batch_size, lanes
        self.start, self.stop = slice_bounds(batch_size, rank, world)
        self._counts, self._seed = self.split.counts, seed
        self.steps_per_epoch = count // batch_size
        self.resident_peak = 0
        self._held: _Held | None = None
        if cache != "none":
            # All cores of this process decode: nothing else is done meanwhile.
            fillers = max(workers, torch.get_num_threads())
            images = fill_memory(
                index, self.split, finish=finish, node=node, workers=fillers, memory_limit=memory_limit
            )
            if images is not None:
                self._held = _Held(self.split, images, self.device if cache == "device" else None)
        self.cache: Cache = "none" if self._held is None else self._held.cache
        self.finished = finish is not None and self._held is not None

    @property
    def resident_limit(self) -> int:
        """The most shards in memory at once: two for each lane that is read, and one for each reader."""
        width = self.batch_size // self.lanes
        return 2 * (-(-self.stop // width) - self.start // width) + max(1, self.workers)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This rank's rows of the global batches `start`, `start + 1`, ...; reads no earlier ones."""
        return self._run(self._batches(start))

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        order = Order(self._counts, seed=self._seed, batch_size=self.batch_size, lanes=self.lanes)
        steps = (order.rows(step, self.start, self.stop) for step in itertools.count(start))
        if self._held is not None:
            take = partial(self._from_memory, self._held)
            yield from self._timed(_in_order(take, steps, self.workers, self.device))
            return
        resident = _Resident(partial(Rows, self.index, self.split), self.resident_limit)
        make = partial(self._from_shards, resident)
        try:
            yield from self._timed(_in_order(make, self._plans(steps, resident), self.workers, self.device))
        finally:
            self.resident_peak = max(self.resident_peak, resident.peak)

    def _plans(self, steps: Iterator[Samples], resident: _Resident) -> Iterator[tuple[Samples, list[_Part]]]:
        """Samples and their shards, one batch ahead of use: a shard that the next batch needs is not dropped."""
        ahead = None
        for samples in steps:
            parts = self._by_shard(samples)
            resident.need([shard for shard, _, _ in parts])
            if ahead is not None:
                yield ahead
            ahead = samples, parts

    def _from_shards(self, resident: _Resident, plan: tuple[Samples, list[_Part]]) -> Batch:
        samples, parts = plan
        content, pixels = self._empty(len(samples))
        for shard, places, rows in parts:
            held = resident.get(shard)
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                held.decode(row, pixels[place])
            resident.done(shard)
        return self._batch(content, samples, parts)

    def _from_memory(self, held: _Held, samples: Samples) -> Batch:
        images = held.images
        if isinstance(images, Tensor):
            content = images[torch.from_numpy(samples).to(self.device)]
            if self._field == "codes":
                content = content[:, 0].long()
        else:
            # Between two steps nothing of this is in the processor's caches: few calls, not few copies, make it fast.
            taken = images.take(samples, axis=0)
            content = torch.from_numpy(taken if self._field == "image" else taken[:, 0].astype(np.int64))
            if self._pinned:
                content = content.pin_memory()
        return self._described(content, samples, held.label.take(samples), Taken(held.keys, samples))


class EvaluationStream(_Stream):
    """Every sample of a split once, in index order; can be iterated again.

    Batch t holds samples t*B to (t+1)*B, of which each rank takes its slice. Rows beyond the last sample repeat
    it and are False in `mask`, so that all ranks yield the same number of batches of the same sizes.

    Args:
        index: The packed folder.
        split: Name of the split.
        batch_size: Rows over all processes; raised to `world` where it is less, so that no rank has none.
        rank, world: This process among all.
        workers: Reader threads; 0 reads in the caller's thread.
        device: Where batches go.
        first: The sample to begin with.
        limit: Only so many samples.

    Raises:
        DataError: on reading, naming sample, shard and offset.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        device: torch.device | str = "cpu",
        first: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(index, split, rank=rank, world=world, workers=workers, device=device)
        self.batch_size = max(batch_size, world)
        self.first = first
        left = self.split.count - first
        self.count = left if limit is None else min(limit, left)
        self.start, self.stop = slice_bounds(self.batch_size, rank, world)

    def __len__(self) -> int:
        """Batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._batches())

    def _batches(self) -> Generator[Batch, None, None]:
        yield from self._timed(_in_order(self._make, iter(range(len(self))), self.workers, self.device))

    def _make(self, number: int) -> Batch:
        wanted = np.arange(self.start, self.stop) + number * self.batch_size
        mask = wanted < self.count
        samples = np.minimum(wanted, self.count - 1) + self.first
        content, pixels = self._empty(len(samples))
        parts = self._by_shard(samples)
        for shard, places, rows in parts:
            first = int(rows[0])
            held = Rows(self.index, self.split, shard, first, int(rows[-1]) + 1)
            done = -1
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                if row == done:
                    pixels[place] = pixels[place - 1]  # padding
                else:
                    held.decode(row, pixels[place])
                done = row
        batch = self._batch(content, samples, parts)
        batch["mask"] = torch.from_numpy(mask)
        return batch
