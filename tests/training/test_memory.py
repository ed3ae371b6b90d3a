"""A lack of memory is told as such, whoever says it and however."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from vaedist.errors import OutOfMemory
from vaedist.training.dist import Group
from vaedist.training.memory import enough_memory

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
