"""Reader threads that make batches ahead of their use, in order."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def prefetch(
    work: Callable[[_Task], _Result], tasks: Iterator[_Task], workers: int, device: torch.device
) -> Generator[Callable[[], _Result], None, None]:
    """For each task, in order, a call that returns `work(task)`; `workers` threads run up to 2 * workers ahead."""
    if workers == 0:
        for task in tasks:
            yield partial(work, task)
        return

    # Pinned memory belongs to the context of a thread's current GPU, and a new thread's is the first one.
    gpu = device.index
    if device.type == "cuda" and gpu is None:
        gpu = torch.cuda.current_device()

    def enter_thread() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(gpu)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vaedist-reader", initializer=enter_thread)
    waiting: collections.deque[Future[_Result]] = collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
