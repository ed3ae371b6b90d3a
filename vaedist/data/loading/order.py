"""The order: which samples are in which batch of training, without reading a byte.

The order of training is a pure function of the shards' counts, the seed, the epoch and the lanes:

    order  = concat(permute(samples of s) for s in permute(shards))      seeded by (seed, epoch)
    lanes  = order[: N - N % L].reshape(L, -1)                           L lanes, fixed for a run's life
    global batch t = lanes[:, t*b : (t+1)*b],  b = global batch / L      rank r takes its slice, lane-major

So a batch holds the same samples for every number of processes, and step t of any epoch is found without reading
what came before it. Each sample comes once per epoch, except the N % B last of the lanes (fewer than one global
batch), which are others in every epoch. The permutation inside a shard is drawn for that shard alone: a rank
that reads one lane of 100 million samples permutes only the shards of that lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]
_BLOCK = 16384  # sample numbers computed at once: fewer cost more each, because each lane has a start to find


def default_lanes(batch_size: int) -> int:
    """The largest divisor of the global batch up to 16."""
    return max(lanes for lanes in range(1, min(batch_size, 16) + 1) if batch_size % lanes == 0)


def slice_bounds(batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """Rows `start` to `stop` of the global batch that belong to `rank`; sizes differ by at most 1."""
    return batch_size * rank // world, batch_size * (rank + 1) // world


def epoch_order(counts: Sequence[int] | NDArray[np.int64], *, seed: int, epoch: int) -> Samples:
    """All sample numbers of a split, (N,), in the order of one epoch, before it is cut into lanes."""
    order = _EpochOrder(np.asarray(counts, np.int64), seed, epoch, kept=0)
    return order.take(0, order.total)


class _EpochOrder:
    """One epoch's order, from which any run of places can be taken without making the rest."""

    def __init__(self, counts: NDArray[np.int64], seed: int, epoch: int, kept: int) -> None:
        self._seed, self._epoch = seed, epoch
        self._shards = self._generator(0).permutation(len(counts))
        self._counts = counts
        self._first = np.cumsum(counts) - counts
        self._ends = np.cumsum(counts[self._shards])
        self.total = int(self._ends[-1]) if len(counts) else 0
        self._inside = lru_cache(kept)(self._permuted)

    def _generator(self, purpose: int) -> np.random.Generator:
        seeds = np.random.SeedSequence(self._seed, spawn_key=(self._epoch, purpose))
        return np.random.Generator(np.random.PCG64(seeds))

    def _permuted(self, shard: int) -> Samples:
        return self._generator(1 + shard).permutation(int(self._counts[shard])) + self._first[shard]

    def take(self, start: int, stop: int) -> Samples:
        """Sample numbers at places `start` to `stop` of the order."""
        parts = [np.empty(0, np.int64)]
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard = int(self._shards[place])
            begin = int(self._ends[place] - self._counts[shard])
            end = min(stop, begin + int(self._counts[shard]))
            parts.append(self._inside(shard)[start - begin : end - begin])
            start, place = end, place + 1
        return np.concatenate(parts)


class TrainingOrder:
    """Training order of a split, for any step, counted from 0 over all epochs.

    Args:
        counts: Samples per shard, in index order.
        seed: The job's seed.
        batch_size: Global batch B.
        lanes: L; divides B.
    """

    def __init__(
        self, counts: Sequence[int] | NDArray[np.int64], *, seed: int, batch_size: int, lanes: int
    ) -> None:
        assert batch_size % lanes == 0, "lanes divide the global batch"
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.batch_size, self.lanes = seed, batch_size, lanes
        self.width = batch_size // lanes
        """Samples of one lane in one batch, b."""
        self.lane_length = int(self.counts.sum()) // lanes
        self.steps_per_epoch = self.lane_length // self.width
        self._epoch: tuple[int, _EpochOrder] | None = None
        self._block: tuple[tuple[int, int, int, int], NDArray[np.int64]] | None = None

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Samples:
        """Sample numbers of rows `start` to `stop` of the lane-major global batch of `step`."""
        stop = self.batch_size if stop is None else stop
        epoch, batch = divmod(step, self.steps_per_epoch)
        first, last = start // self.width, -(-stop // self.width)
        steps = max(1, _BLOCK // max(1, (last - first) * self.width))
        name = (epoch, batch // steps, start, stop)
        if self._block is None or self._block[0] != name:
            begin = batch // steps * steps
            many = min(steps, self.steps_per_epoch - begin)
            order = self._of_epoch(epoch)
            runs = np.empty((last - first, many * self.width), np.int64)
            for i, lane in enumerate(range(first, last)):
                place = lane * self.lane_length + self.width * begin
                runs[i] = order.take(place, place + many * self.width)
            block = runs.reshape(last - first, many, self.width)
            by_step = np.ascontiguousarray(block.transpose(1, 0, 2)).reshape(many, -1)
            self._block = name, by_step[:, start - first * self.width : stop - first * self.width]
        return self._block[1][batch % steps]

    def _of_epoch(self, epoch: int) -> _EpochOrder:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, _EpochOrder(self.counts, self.seed, epoch, kept=2 * self.lanes)
        return self._epoch[1]
