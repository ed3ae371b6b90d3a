"""A lack of memory is told as such, whoever says it and however."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

import pytest
import torch

from vaedist.core.errors import OutOfMemory
from vaedist.distributed.memory import enough_memory
from vaedist.distributed.process_group import Group

ALONE = Group(torch.device("cpu"))


def test_what_torch_cannot_get_is_told_with_its_size() -> None:
    with (
        pytest.raises(
            OutOfMemory, match=r"this process ran out of memory on cpu \(it asked for [\d,]+ MiB more\)"
        ),
        enough_memory(ALONE),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte: refused at once, on any machine


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_of_saying_it(error: Exception) -> None:
    group = Group(torch.device("cpu"), rank=1, world=2)
    with (
        pytest.raises(
            OutOfMemory, match=r"rank 1 of 2 ran out of memory.*the same command continues"
        ) as told,
        enough_memory(group),
    ):
        raise error
    assert ("it asked for 2.50 GiB more" in str(told.value)) == isinstance(error, torch.OutOfMemoryError)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory(ALONE):
        raise RuntimeError("shapes do not match")


FREEING = """
import resource, sys
import torch
from vaedist.distributed.memory import keep_freed_memory

kept = keep_freed_memory()
def step():
    held = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each, as the gradients of a step
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another libc than glibc")
@pytest.mark.parametrize("asked", [False, True], ids=["ours", "the environment's"])
def test_what_a_step_frees_the_next_one_has_without_a_page_fault(asked: bool) -> None:
    """Ten steps of 32 MiB: 8,192 faults each where malloc gives everything back, as the environment may ask."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if asked:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-c", FREEING], check=True, capture_output=True, text=True, env=environment
    )
    kept, faults = map(int, done.stdout.split())
    assert kept == (not asked)
    assert faults > 50_000 if asked else faults < 1_000
