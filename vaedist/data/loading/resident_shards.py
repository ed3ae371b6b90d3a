"""The shards that training holds in memory."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from vaedist.data.format.shard_reader import ShardReader


class ResidentShards:
    """Shards held in memory: each is read when first asked for and dropped when no planned batch needs it."""

    def __init__(self, read: Callable[[int], ShardReader], limit: int) -> None:
        self._read, self._limit = read, limit
        self._needed: collections.Counter[int] = collections.Counter()
        self._loaded: collections.OrderedDict[int, Future[ShardReader]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.peak = 0

    def require(self, shards: Sequence[int]) -> None:
        """Count one more planned batch that needs these."""
        with self._lock:
            self._needed.update(shards)

    def release(self, shard: int) -> None:
        """Count one batch less that needs it."""
        with self._lock:
            self._needed[shard] -= 1
            if not self._needed[shard]:
                del self._needed[shard]
                self._loaded.pop(shard, None)

    def get(self, shard: int) -> ShardReader:
        """The shard; a thread that asks for one which another is reading waits for it."""
        with self._lock:
            future = self._loaded.get(shard)
            mine = future is None
            if future is None:
                while len(self._loaded) >= self._limit:  # only where shards are tiny
                    self._loaded.popitem(last=False)  # it is read again when needed
                future = self._loaded[shard] = Future()
                self.peak = max(self.peak, len(self._loaded))
            self._loaded.move_to_end(shard)
        if mine:
            try:
                future.set_result(self._read(shard))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()
