"""How a run reads its images, where the job leaves it to the machine: `data.cache: auto`, and `data.workers` unset.

The cache (`vaedist.data.loading.cache`) decodes every image once, before the first step; without it each is decoded
once an epoch. So it is worth its memory where images are yet to be read more than once, and its wait where they are
few: 2 GiB of pixels, 33,000 images of 256x256, take about 20 s of one slow core. Nobody's memory is filled for it:
at most a quarter of what is free on the first rank's node. A cache on the device is for who asks for it: the node's
memory is rarely what a GPU waits for.

Readers beside a GPU are as many as there are cores for, up to eight; from the cache one is enough, which only copies.
On a CPU they take their time from the cores that train: one reads ahead. From the cache the loop reads itself: a batch
is there in less time than two threads need to hand it over (0.06 ms for 32 images of 64x64).

Neither changes a number of the run (`vaedist.data.loading.stream`), so both may differ from one start to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch

from vaedist.config.job import Data
from vaedist.data.format.index import Index
from vaedist.data.loading.cache import Cache, available_memory
from vaedist.distributed.process_group import Group

LARGEST = 2 << 30
"""Bytes of pixels that are cached unasked."""
SHARE = 1 / 4
"""Of a node's free memory, that a cache takes unasked."""
MOST_READERS = 8


class LoaderSettings(NamedTuple):
    """What was chosen."""

    cache: Cache
    why: str
    readers: Mapping[Cache, int]
    """Reader threads of what is read from there: the cache may come to less than it is to be."""

    def describe(self, cache: Cache) -> str:
        """The line of the start-up summary.

        Args:
            cache: Where the images are now: they may not have fitted.
        """
        short = "in memory" if cache == "none" else "on the device"
        why = self.why if cache == self.cache else f" (no room {short})"
        count = self.readers[cache]
        readers = f"{count} reader{'s' * (count != 1)}" if count else "read by the loop itself"
        return f"cache {cache}{why}, {readers}"


def choose_loader_settings(
    data: Data, index: Index, to_read: int, group: Group, threads: int
) -> LoaderSettings:
    """What the job says, and by rule what it leaves open; the same on every rank. Collective.

    Args:
        data: Of the job.
        index: Of what is read: images, or codes.
        to_read: Samples that this run still has to take, over all ranks.
        group: The processes.
        threads: Cores of one process.
    """
    cache, why = data.cache, ""
    if cache == "auto":
        free = int(group.from_leader(lambda: str(available_memory()).encode()))
        split = index.split(data.train_split)
        cache, why = choose_cache(split.count, index.sample_bytes, to_read, free)
    kinds: tuple[Cache, ...] = get_args(Cache)
    readers = {
        kind: choose_readers(kind, group.device, threads) if data.workers is None else data.workers
        for kind in kinds
    }
    return LoaderSettings(cache, why, readers)


def choose_cache(
    count: int, sample_bytes: int, to_read: int, free: int
) -> tuple[Literal["none", "memory"], str]:
    """What `auto` means, and the reason in brackets.

    Args:
        count: Samples of the split.
        sample_bytes: Of one, decoded.
        to_read: Samples still to be taken.
        free: Bytes of memory.
    """
    size = count * sample_bytes
    if to_read <= count:
        return "none", " (no image is read twice)"
    mebibytes = f"{math.ceil(size / 2**20):,} MiB"
    if size > LARGEST:
        return "none", f" ({mebibytes}: more than are cached unasked)"
    if size > free * SHARE:
        return "none", f" ({mebibytes}: more than a quarter of the free memory)"
    return "memory", f" ({mebibytes})"


def choose_readers(cache: Cache, device: torch.device, threads: int) -> int:
    """Reader threads of a process that has `threads` cores; one of these launches the GPU's work."""
    if cache == "device":
        return 0
    if device.type == "cpu":
        return 0 if cache == "memory" else 1
    if cache == "memory":
        return 1
    return max(1, min(MOST_READERS, threads - 1))
