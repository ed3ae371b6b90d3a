"""A lack of memory, told as what it is: by Python, by torch on the CPU or on a GPU, or by a thread that cannot start.

Only a memory that is refused can be told (`ulimit -v`, Slurm's and batch systems' limits on address space, a GPU).
Where the kernel ends a process instead, its launcher sees the death and says that memory is the likely reason.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from vaedist.errors import OutOfMemory
from vaedist.training.dist import Group

_REFUSED = re.compile(
    r"can.t allocate memory|[Cc]annot allocate memory|can.t start new thread|std::bad_alloc"
)
"""How torch's CPU allocator, the system and Python's threads say it, all in a RuntimeError or OSError."""
_ASKED = re.compile(r"tried to allocate (\d+) bytes|[Tt]ried to allocate ([\d.]+ [KMG]iB)")


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
