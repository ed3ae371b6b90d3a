"""Keep freed memory for the next step, and report a lack of memory as one error.

A training step on the CPU frees as much memory as it allocates, and the next step asks for the same again. By default
glibc returns it to the system, which hands it out again page by page, each filled with zeros: up to a third of the CPU
time of a small model. `keep_freed_memory` lets the process keep it.

A lack of memory is reported by Python, by torch on the CPU or on a GPU, or by a thread that cannot start:
`enough_memory` turns all of these into `OutOfMemory`. That works where memory is refused (`ulimit -v`, limits of batch
systems on the address space, a GPU). Where the kernel kills a process instead, its launcher reports the death.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator

import torch

from vaedist.core.errors import OutOfMemory
from vaedist.distributed.process_group import Group

_REFUSED = re.compile(
    r"can.t allocate memory|[Cc]annot allocate memory|can.t start new thread|std::bad_alloc"
)
"""The words of torch's CPU allocator, the system and Python's threads, all in a RuntimeError or OSError."""
_ASKED = re.compile(r"tried to allocate (\d+) bytes|[Tt]ried to allocate ([\d.]+ [KMG]iB)")


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # <malloc.h>
_LARGEST = 32 * 2**20
"""Bytes up to which glibc lets a block come from the heap (its DEFAULT_MMAP_THRESHOLD_MAX)."""


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what this process frees, for its next step.

    Returns:
        Whether it does now: not with another libc, and not where the environment says how malloc should be (the
        variables of mallopt(3), GLIBC_TUNABLES).
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Both: setting either ends glibc's own adjustment of the other.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def enough_memory(group: Group) -> Iterator[None]:
    """Raises:
    OutOfMemory: in place of the many errors that mean it.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _REFUSED.search(str(error)):
            raise
        found = _ASKED.search(str(error))
        asked = f" (it asked for {_size(found)} more)" if found else ""
        who = f"rank {group.rank} of {group.world}" if group.world > 1 else "this process"
        raise OutOfMemory(
            f"{who} ran out of memory on {group.device}{asked}: lower train.micro_batch_size, set data.cache=none, or "
            "ask the allocation for more; the same command continues from the last checkpoint"
        ) from None


def _size(found: re.Match[str]) -> str:
    return f"{int(found[1]) / 2**20:,.0f} MiB" if found[1] else found[2]
