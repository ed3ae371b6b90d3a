"""The memory cache between real processes, and how much memory it may take."""

from __future__ import annotations

import itertools
import json
import logging
import os

import numpy as np
import pytest

from tests.ranks import run_ranks
from vaedist.core.errors import DataError
from vaedist.data.loading import cache
from vaedist.data.loading.cache import available_memory, fill_cache
from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig

RANK = """
import hashlib, itertools, json, logging, os, sys
from vaedist.data.loading import cache
from vaedist.data.format.index import Index
from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig
from vaedist.core.errors import UserError
from vaedist.distributed.process_group import Group

logging.basicConfig(stream=sys.stdout, format="%(message)s")
cache._ROUND = 8
folder, limit, nodes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
group = Group.join("cpu")
if nodes > 1:  # as if the ranks were spread over several nodes
    each = group.world // nodes
    os.environ["SLURMD_NODENAME"] = f"node{group.rank // each}"
    group.local_rank, group.local_world = group.rank % each, each
index = Index.open(folder)
try:
    config = TrainingStreamConfig(
        batch_size=6, seed=0, rank=group.rank, world=group.world, cache="memory",
        memory_limit=limit, group=group,
    )
    stream = TrainingStream(index, "train", config)
except UserError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    images = [batch["image"].numpy().tobytes().hex() for batch in itertools.islice(stream.batches(4), 3)]
    stream.close()
    with open("/proc/self/maps") as maps:
        shared = [line.split()[4] for line in maps if "/memfd:vaedist" in line]
    print(json.dumps({"images": images, "memory": shared}))
group.barrier()
group.close()
"""


def ranks(folder, world, limit=2**30, nodes=1):
    outputs = [output.splitlines() for output in run_ranks(RANK, world, str(folder), str(limit), str(nodes))]
    return [json.loads(lines[-1]) for lines in outputs], [lines[:-1] for lines in outputs]


def plain(index):
    stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=6, seed=0, workers=0))
    batches = [batch["image"].numpy() for batch in itertools.islice(stream.batches(4), 3)]
    stream.close()
    return batches


@pytest.mark.parametrize(("world", "nodes"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_processes_of_a_node_share_one_nameless_memory(tmp_path, pack, world, nodes):
    index = pack(tmp_path, {"train": [9, 17, 14]})
    before = set(os.listdir("/dev/shm"))
    outputs, _ = ranks(tmp_path, world=world, nodes=nodes)
    parts = [np.split(batch, [6 * rank // world for rank in range(1, world)]) for batch in plain(index)]
    for rank, one in enumerate(outputs):
        assert one["images"] == [batch[rank].tobytes().hex() for batch in parts]
    inodes = [one["memory"] for one in outputs]
    assert all(len(memory) == 1 for memory in inodes)
    assert len({memory[0] for memory in inodes}) == nodes, "one memory per node"
    assert set(os.listdir("/dev/shm")) <= before


def test_too_little_memory_is_said_once_and_shards_are_read(tmp_path, pack):
    index = pack(tmp_path, {"train": [9, 17, 14]})
    outputs, lines = ranks(tmp_path, world=2, limit=100)
    assert [one["memory"] for one in outputs] == [[], []]
    halves = [np.split(batch, 2) for batch in plain(index)]
    assert [one["images"] for one in outputs] == [[b[r].tobytes().hex() for b in halves] for r in (0, 1)]
    assert lines[1] == [] and len(lines[0]) == 1 and "reading shards instead" in lines[0][0]


def test_damage_that_one_process_meets_stops_all(tmp_path, pack):
    index = pack(tmp_path, {"train": [20, 20]})
    tar = index.split("train").shards[1].tar
    data = bytearray(tar.read_bytes())
    data[-20_000] ^= 1
    tar.write_bytes(data)
    outputs, _ = ranks(tmp_path, world=2)
    assert outputs[0]["error"] == outputs[1]["error"], "whichever process is heard, it names the sample"
    assert outputs[0]["error"].startswith("DataError")
    assert "train-000001.tar: sample 'train-000" in outputs[0]["error"]


def test_one_process_needs_no_group(tmp_path, pack, expected, caplog):
    index = pack(tmp_path, {"train": [9, 4]})
    images = fill_cache(index, index.split("train"), workers=3)
    assert images is not None and not images.flags.writeable
    assert np.array_equal(images, expected("train", range(13)))
    with caplog.at_level(logging.WARNING, logger="vaedist"):
        assert fill_cache(index, index.split("train"), memory_limit=13 * 64 - 1) is None
    assert "cache: memory needs 0.0 MiB for the split 'train'" in caplog.text
    assert fill_cache(index, index.split("train"), memory_limit=13 * 64) is not None


@pytest.mark.parametrize("workers", [1, 3])
def test_images_are_transformed_once_each_by_their_own_keys(tmp_path, pack, expected, monkeypatch, workers):
    monkeypatch.setattr(cache, "_VALUES", 4 * 64)
    seen = []

    def transform(images, keys):
        assert len(images) == len(keys) <= 4
        seen.extend(keys)
        for image, key in zip(images, keys, strict=True):
            image[0, 0, 0] = int(key[-2:])

    index = pack(tmp_path, {"train": [9, 4]})
    images = fill_cache(index, index.split("train"), transform=transform, workers=workers)
    wanted = expected("train", range(13)).copy()
    wanted[:, 0, 0, 0] = range(13)
    assert np.array_equal(images, wanted)
    assert sorted(seen) == [f"train-{number:05d}" for number in range(13)]


def test_damage_ends_all_filling_threads(tmp_path, pack):
    index = pack(tmp_path, {"train": [9, 9, 9]})
    index.split("train").shards[1].tar.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar"):
        fill_cache(index, index.split("train"), workers=3)


GIB = 2**30
MEMINFO = "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\nHugePages_Total: 0\n"


@pytest.mark.parametrize(
    ("files", "environ", "gib"),
    [
        ({}, {}, 32),
        ({}, {"SLURM_MEM_PER_NODE": "8192"}, 8),
        ({}, {"SLURM_MEM_PER_NODE": "0"}, 32),
        ({}, {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "4"}, 4),
        ({}, {"SLURM_MEM_PER_CPU": "1024"}, 32),
        (
            {
                "/proc/self/cgroup": "0::/slice/job\n",
                "/sys/fs/cgroup/slice/job/memory.max": "max\n",
                "/sys/fs/cgroup/slice/job/memory.current": "5\n",
                "/sys/fs/cgroup/slice/memory.max": f"{6 * GIB}\n",
                "/sys/fs/cgroup/slice/memory.current": f"{4 * GIB}\n",
                "/sys/fs/cgroup/slice/memory.stat": f"anon 5\ninactive_file {3 * GIB}\n",
            },
            {},
            5,
        ),
        (
            {
                "/proc/self/cgroup": "8:cpu:/\n4:memory:/job\n0::/\n",
                "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
                "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{1 * GIB}\n",
                "/sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 0\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
                "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            {},
            2,
        ),
    ],
    ids=["free", "slurm", "slurm-all", "slurm-cpu", "slurm-half", "cgroup2", "cgroup1"],
)
def test_available_memory_is_the_least_of_all_limits(files, environ, gib):
    def read(path: str) -> str:
        try:
            return {"/proc/meminfo": MEMINFO, **files}[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    assert available_memory(read, environ) == gib * GIB


def test_available_memory_here_is_some():
    assert available_memory() > 2**20
