"""The memory cache: every image of a split decoded once, in memory that a node's processes share.

The memory is a memfd, which the node's first process passes to the others over a socket. A memfd has no name: the
system frees it when the last process has ended, however that ended, so nothing can be left in /dev/shm, whose size is
no limit either. Torchrun's children, the local engine's and Ray's workers are not related by fork, so the first process
listens on an abstract Unix socket, which is no file either. Its address holds a secret that rank 0 sends to all ranks,
and only processes of the same user are answered.

All processes of the job take part, in the same order: agree on the secret, share the memory, decode (each its
part of the node's copy), agree that all went well. This room may not import torch.distributed, so the process group
is an argument (`Collectives`); one process needs none.

What a job does to an image at every step alike (`StaticTransform`) is done here, once.

Where the memory is too small, the stream reads shards as without a cache, and says so in one sentence.

A GPU can hold the split itself (`cache: device`): each process then sends it there once, and a batch is taken from it
by one kernel. Where the GPU has no room for it, it stays in the node's memory, and one sentence says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.errors import DataError, UserError
from vaedist.data.format.index import Index
from vaedist.data.format.shard_reader import ShardReader
from vaedist.data.format.split import Split

_log = logging.getLogger("vaedist")
_SHARE = 0.8  # of what is free; the rest is for the model and for the shards being read
_SHARE_OF_DEVICE = 0.5  # of what is free there; the rest is for activations
_DEADLINE_S = 120.0  # for a process of this node to fetch the memory
_BLOCK = 4 << 20  # bytes of shard read at once while filling
_VALUES = 1 << 17  # pixels that are transformed at once: that may take many bytes for each
_LONGEST_MESSAGE = 4096  # bytes
_ROUND = 4096  # samples that a process decodes between two agreements


Cache = Literal["none", "memory", "device"]
"""Where a split lies, decoded."""
StaticTransform = Callable[[NDArray[np.uint8], Sequence[str]], None]
"""Changes (n, C, H, W) uint8 images in place; the names are their keys."""


class Collectives(Protocol):
    """What the cache and staging need of a process group (`vaedist.distributed.process_group`)."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    def from_leader(self, work: Callable[[], bytes]) -> bytes:
        """Do `work` on rank 0; its bytes, on every rank."""

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""


def fill_cache(
    index: Index,
    split: Split,
    *,
    transform: StaticTransform | None = None,
    group: Collectives | None = None,
    workers: int = 1,
    memory_limit: int | None = None,
) -> NDArray[Any] | None:
    """All images of the split, (N, C, H, W) uint8, shared by the processes of this node; or all codes, (N, 1, h, w).

    Collective: with a `group` of several processes, all of them call it at the same point.

    Args:
        index, split: What to decode.
        transform: What is done to every image after decoding.
        group: The process group; none: this process alone.
        workers: Decoding threads of this process.
        memory_limit: Bytes that the cache may take on this node; default: 80 % of what is free.

    Returns:
        The images, or none where they do not fit (a warning has said so).

    Raises:
        DataError: a sample is damaged; raised on all ranks, with one message.
    """
    needed = split.count * index.sample_bytes
    first = group is None or group.local_rank == 0
    allowed = (int(available_memory() * _SHARE) if memory_limit is None else memory_limit) if first else 0
    memory, part, parts = None, 0, 1
    if group is None or group.world == 1:
        group = None
        if needed <= allowed:
            with _memfd(needed) as handle:
                memory = mmap.mmap(handle, needed)
    else:
        part, parts = group.local_rank, group.local_world
        memory = _share(needed, allowed, group)
    images: NDArray[Any] | None = None
    start = stop = 0
    if memory is not None:
        images = np.frombuffer(memory, index.dtype).reshape(split.count, *index.shape)
        start, stop = split.count * part // parts, split.count * (part + 1) // parts
    elif first:
        what = f"needs {_size(needed)} for the split {split.name!r} and {_size(allowed)} may be used here"
        _log.warning("cache: memory %s: reading shards instead, as with cache: none", what)
    # In rounds, so that no process waits long for another (collectives have deadlines) and damage ends it early.
    rounds = -(-(stop - start) // _ROUND)
    if group is not None:
        rounds = int(group.largest(torch.tensor([float(rounds)])))
    for low in range(start, start + rounds * _ROUND, _ROUND):
        failure: DataError | None = None
        if images is not None:
            try:
                _decode_into(images, index, split, (low, min(low + _ROUND, stop)), workers, transform)
            except DataError as error:
                failure = error
        if group is not None:
            failure = _share_failure(failure, group)
        if failure is not None:
            raise failure
    if images is not None:
        images.flags.writeable = False
    return images


def copy_to_device(images: NDArray[Any], device: torch.device) -> Tensor | None:
    """A copy on the device, or none where it has no room (a warning has said so).

    Codes become int32, because a device cannot index with unsigned numbers.
    """
    kind, dtype = (np.uint8, torch.uint8) if images.dtype == np.uint8 else (np.int32, torch.int32)
    needed = images.size * np.dtype(kind).itemsize
    if device.type == "cuda":
        allowed = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_DEVICE)
        if needed > allowed:
            what = f"needs {_size(needed)} and {_size(allowed)} of the GPU may be used for it"
            _log.warning(
                "cache: device %s: the images stay in the node's memory, as with cache: memory", what
            )
            return None
    content = torch.empty(images.shape, dtype=dtype, device=device)
    step = max(1, _BLOCK * len(images) // needed)
    for start in range(0, len(images), step):  # not all at once: it would be in the node's memory twice
        content[start : start + step] = torch.from_numpy(images[start : start + step].astype(kind))
    return content


def _share_failure(failure: DataError | None, group: Collectives) -> DataError | None:
    """The failure of one rank on all ranks, so that every process names the damaged sample. Collective."""
    failed = int(group.largest(torch.tensor([0.0 if failure is None else group.rank + 1.0])))
    if not failed:
        return None
    message = torch.zeros(_LONGEST_MESSAGE)
    if failure is not None and failed == group.rank + 1:
        content = str(failure).encode()[:_LONGEST_MESSAGE]
        message[: len(content)] = torch.tensor(list(content), dtype=torch.float32)
    shared = bytes(group.largest(message).to(torch.uint8).tolist())
    return DataError(shared.rstrip(b"\0").decode(errors="replace"))


def _decode_into(
    images: NDArray[Any],
    index: Index,
    split: Split,
    samples: tuple[int, int],
    workers: int,
    transform: StaticTransform | None,
) -> None:
    def decode(block: tuple[int, int, int]) -> None:
        shard, low, high = block
        reader, base = ShardReader(index, split, shard, low, high), int(split.starts[shard])
        for row in range(low, high):
            reader.decode(row, images[base + row])
        if transform is not None:
            many = max(1, _VALUES // index.sample_bytes)
            for first in range(low, high, many):
                last = min(first + many, high)
                transform(images[base + first : base + last], reader.columns.keys[first:last])

    blocks = _blocks(split, *samples)
    if workers <= 1:
        for block in blocks:
            decode(block)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="vaedist-cache") as pool:
        try:
            for _ in pool.map(decode, blocks):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise


def _blocks(split: Split, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first row, last row + 1) runs of about 4 MB that make up samples `start` to `stop`."""
    while start < stop:
        shard, low = split.locate(start)
        entry = split.shards[shard]
        step = max(1, _BLOCK * entry.count // entry.bytes)
        high = min(low + step, entry.count, low + stop - start)
        yield shard, low, high
        start += high - low


# Shared memory -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _memfd(size: int) -> Iterator[int]:
    handle = os.memfd_create("vaedist", os.MFD_CLOEXEC)
    try:
        os.ftruncate(handle, size)
        yield handle
    finally:
        os.close(handle)


def _share(needed: int, allowed: int, group: Collectives) -> mmap.mmap | None:
    """The node's memory in each of its processes; none on this node where it does not fit."""
    secret = group.from_leader(lambda: secrets.token_bytes(16))
    # Two nodes of a test cluster on one machine see the same sockets, so the node's name is part of the address.
    name = f"{os.uname().nodename} {os.environ.get('SLURMD_NODENAME', '')}".encode()
    address = b"\0vaedist-" + hashlib.blake2b(secret + name, digest_size=24).hexdigest().encode()
    if group.local_rank != 0:
        group.barrier()  # all listeners are bound
        return _receive_memory(address, needed)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            what = f"cannot be shared on this node ({error})"
            raise UserError(f"cache: memory {what}; set data.cache=none") from None
        listener.listen(group.local_world)
        listener.settimeout(_DEADLINE_S)
        group.barrier()
        if needed > allowed:
            _send_memory(listener, group.local_world - 1, None)
            return None
        with _memfd(needed) as handle:
            _send_memory(listener, group.local_world - 1, handle)
            return mmap.mmap(handle, needed)


def _send_memory(listener: socket.socket, count: int, handle: int | None) -> None:
    while count:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise UserError(
                f"cache: memory: {count} processes of this node did not come for the shared memory within "
                f"{_DEADLINE_S:.0f} s; look for their errors, or set data.cache=none"
            ) from None
        with connection:
            peer = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if peer[1] != os.getuid():
                continue
            # A process that died here is noticed where all agree; the others still get theirs.
            with contextlib.suppress(OSError):
                answer, handles = (b"0", []) if handle is None else (b"1", [handle])
                socket.send_fds(connection, [answer], handles)
            count -= 1


def _receive_memory(address: bytes, needed: int) -> mmap.mmap | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_DEADLINE_S)
        try:
            connection.connect(address)
            answer, handles, _, _ = socket.recv_fds(connection, 1, 1)
        except OSError as error:
            raise UserError(
                f"cache: memory: the first process of this node did not hand over the shared memory ({error}); look "
                "for its error, or set data.cache=none"
            ) from None
    if not handles:
        if answer != b"0":
            raise UserError(
                "cache: memory: the first process of this node ended while sharing; look for its error"
            )
        return None
    try:
        return mmap.mmap(handles[0], needed)
    finally:
        os.close(handles[0])


# How much there is ---------------------------------------------------------------------------------------------


def available_memory(
    read: Callable[[str], str] = lambda path: Path(path).read_text(), environ: Mapping[str, str] = os.environ
) -> int:
    """Bytes that may still be taken on this node: the least of what is free, the control groups' and Slurm's."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in read("/proc/meminfo").splitlines() if ":" in line)
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError):
        for line in read("/proc/self/cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                names = ("memory.max", "memory.current", "inactive_file")
                limits += _group_limits(read, "/sys/fs/cgroup", path, names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                limits += _group_limits(read, "/sys/fs/cgroup/memory", path, names)
    with contextlib.suppress(KeyError, ValueError):
        # Slurm may hold a job to what it asked for without a control group (it kills jobs that exceed it).
        if environ.get("SLURM_MEM_PER_NODE", "0") != "0":  # 0: all of the node
            limits.append(int(environ["SLURM_MEM_PER_NODE"]) << 20)
        elif environ.get("SLURM_MEM_PER_CPU", "0") != "0":
            limits.append(int(environ["SLURM_MEM_PER_CPU"]) * int(environ["SLURM_CPUS_ON_NODE"]) << 20)
    return max(0, min(limits, default=0))


def _group_limits(
    read: Callable[[str], str], root: str, path: str, names: tuple[str, str, str]
) -> Iterator[int]:
    """What each control group from `path` up to the root still allows; file cache that can go counts as free."""
    limit_name, used_name, cached_name = names
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts), -1, -1):
        group = "/".join([root, *parts[:depth]])
        with contextlib.suppress(OSError, ValueError):  # no such file here, or the limit is `max`
            limit, used = int(read(f"{group}/{limit_name}")), int(read(f"{group}/{used_name}"))
            statistics = dict(line.split() for line in read(f"{group}/memory.stat").splitlines())
            yield limit - used + int(statistics.get(cached_name, 0))


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
