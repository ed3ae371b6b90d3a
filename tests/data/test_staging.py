"""Copies on a node's own disk: made once, used by many, given up whenever anything is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.conftest import Pack
from tests.data.node_local import BOTH, SPLITS, another, copies, is_copied, seen, the_set, until
from tests.data.test_code_shards import written
from tests.ranks import run_ranks
from tests.run_commands import curve, small_job, train, write_job
from vaedist.core.errors import DataError
from vaedist.data.format.index import Index
from vaedist.data.format.shard_reader import ShardReader
from vaedist.data.loading import staging
from vaedist.data.loading.staging import stage_shards
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig

# What it is good for ----------------------------------------------------------------------------------------


def test_the_same_bytes_in_the_same_order_from_the_nodes_own_disk(index: Index, place: Path) -> None:
    expected, lines = seen(index), list[str]()
    shared = {path: path.read_bytes() for path in index.folder.iterdir()}
    with stage_shards(index, BOTH, report=lines.append) as near:
        assert is_copied(near, place)
        assert near.identity == index.identity and near.spec == index.spec
        for path in index.folder.iterdir():
            path.chmod(0o600)
            if path.name.startswith(("train", "validate")):
                path.write_bytes(b"")  # whoever reads the shared folder notices
        assert seen(near) == expected
        assert near.split("test").shards == index.split("test").shards, "what is not read is not copied"
    for path, content in shared.items():
        path.write_bytes(content)
    assert [line.partition(" ")[2].split()[0] for line in lines] == ["copying", "reading"]
    folder = the_set(place)
    assert len(copies(folder)) == 2 * 4
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in copies(folder)} == {0o400}
    assert not list(folder.glob(".tmp-*"))


def test_later_jobs_use_what_is_there_whatever_their_folder_is_called(
    index: Index, place: Path, tmp_path: Path
) -> None:
    with stage_shards(index, BOTH):
        before = copies(the_set(place))
    elsewhere = shutil.copytree(index.folder, tmp_path / "another name")
    lines: list[str] = []
    with stage_shards(Index.open(elsewhere), BOTH, report=lines.append) as near:
        assert is_copied(near, place) and seen(near) == seen(index)
    assert len(lines) == 1 and lines[0].endswith("(copied before)")
    assert copies(the_set(place)) == before


def test_codes_are_staged_alike(pack: Pack, place: Path, tmp_path: Path) -> None:
    codes = written(tmp_path / "codes", pack(tmp_path / "images", SPLITS))
    with stage_shards(codes, BOTH) as near:
        assert is_copied(near, place)
        for one, other in zip(
            EvaluationStream(codes, "train", EvaluationStreamConfig(batch_size=5)),
            EvaluationStream(near, "train", EvaluationStreamConfig(batch_size=5)),
            strict=True,
        ):
            assert one["codes"].tolist() == other["codes"].tolist() and one["key"] == other["key"]


def test_nothing_happens_without_the_variable(
    index: Index, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VAEDIST_NODE_LOCAL")
    with stage_shards(index, BOTH) as same:
        assert same is index
    assert list(place.iterdir()) == []


def test_variables_in_the_path_are_those_of_the_node(
    index: Index, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAEDIST_NODE_LOCAL", f"{place}/job-$SLURM_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place / "job-17")


# Several processes ------------------------------------------------------------------------------------------


def test_two_jobs_at_once_copy_once(index: Index, place: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with another(index, gate, "copying") as first:
        until(first, "staging: copying")
        with another(index, gate) as second:
            until(second, "waiting for it")
            assert copies(the_set(place)) == {}
            gate.touch()
            out, _ = second.communicate(timeout=60)
            assert "(copied before)" in out and "staged" in out
        out, _ = first.communicate(timeout=60)
        assert "copied in" in out and "staged" in out


def test_a_job_that_copies_and_does_not_get_on_is_not_waited_for(
    index: Index,
    place: Path,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "_PATIENCE_S", 0.5)
    with another(index, tmp_path / "gate", "copying") as first:
        until(first, "staging: copying")
        with stage_shards(index, BOTH) as same:
            assert same is index
    [line] = warnings()
    assert "does not get on" in line and line.endswith(f"reading {index.folder} itself")


def test_kill_in_the_middle_leaves_temporary_files_that_the_next_removes(
    index: Index, place: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    with another(index, tmp_path / "gate", "torn") as killed:
        until(killed, "half way")
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    folder = the_set(place)
    whole, torn = copies(folder), list(folder.glob(".tmp-*"))
    assert torn and 0 < len(whole) < 8
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place) and seen(near) == seen(index)
    assert not list(folder.glob(".tmp-*"))
    now = copies(folder)
    assert len(now) == 8 and whole == {name: now[name] for name in whole}, "what was whole served on"
    assert warnings() == []


RANK = """
import hashlib, logging, os, sys
from vaedist.data.format.index import Index
from vaedist.data.loading.staging import stage_shards
from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig
from vaedist.distributed.process_group import Group

logging.basicConfig(stream=sys.stdout, format="%(message)s")
group = Group.join("cpu")
if group.rank:
    del os.environ["VAEDIST_GROUP"]  # its variables do not count for whether, only for where
with stage_shards(Index.open(sys.argv[1]), ("train", "validate"), group=group, report=print) as near:
    config = TrainingStreamConfig(batch_size=6, seed=0, rank=group.rank, world=group.world)
    stream = TrainingStream(near, "train", config)
    batches, digest = stream.batches(), hashlib.sha256()
    for _ in range(4):
        digest.update(next(batches)["image"].numpy().tobytes())
    print(near.split("train").shards[0].tar)
    print(digest.hexdigest())
    stream.close()
group.close()
"""


@pytest.mark.slow
def test_of_the_ranks_of_a_node_the_first_copies(
    index: Index, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAEDIST_GROUP", "")
    near = [out.splitlines() for out in run_ranks(RANK, 2, str(index.folder))]
    assert [len(lines) for lines in near] == [4, 2], "the others wait, and copy nothing"
    assert all(lines[-2].startswith(str(place)) for lines in near)
    monkeypatch.setenv("VAEDIST_NODE_LOCAL", "relative")
    far = [out.splitlines() for out in run_ranks(RANK, 2, str(index.folder))]
    assert "which is no path from the root" in far[0][0]
    assert [len(lines) for lines in far] == [3, 2], "one process of the node says why"
    assert [lines[-1] for lines in far] == [lines[-1] for lines in near]


@pytest.mark.slow
def test_training_has_the_same_curve(phantom: Path, place: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=6, validate_every=3))
    far, near = tmp_path / "far", tmp_path / "near"
    code, out, err = train(job, near, "--workers", "2")
    assert code == 0, err
    assert "staging: reading from" in out
    code, out, err = train(job, far, "--workers", "2", environment={"VAEDIST_NODE_LOCAL": ""})
    assert code == 0, err
    assert "staging" not in out
    assert curve(near) == curve(far)


# Damage -----------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("suffix", [".tar", ".cols"])
def test_a_copy_that_was_damaged_since_is_replaced(
    damage: str, suffix: str, index: Index, place: Path, warnings: Callable[[], list[str]]
) -> None:
    with stage_shards(index, BOTH):
        before = copies(the_set(place))
    hurt = next(path for path in the_set(place).iterdir() if path.suffix == suffix)
    content = hurt.read_bytes()
    if damage == "flipped":
        flip(hurt, len(content) // 2)
    elif damage == "cut":
        hurt.chmod(0o600)
        hurt.write_bytes(content[:-1])
    else:
        hurt.unlink()
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place) and seen(near) == seen(index)
    assert hurt.read_bytes() == content and warnings() == []
    after = copies(the_set(place))
    assert [name for name in before if before[name] != after[name]] == [hurt.name]


@pytest.mark.parametrize("place_of_damage", ["image", "header", "columns"])
def test_a_copy_that_goes_bad_while_it_is_read(
    place_of_damage: str, index: Index, place: Path, warnings: Callable[[], list[str]]
) -> None:
    expected = seen(index)
    with stage_shards(index, BOTH) as near:
        shard, offset = near.split("train").shards[1], int(index.split("train").columns(1).offset[2])
        if place_of_damage == "columns":
            hurt, at = shard.columns_path, 100
        else:
            hurt, at = shard.tar, offset + 20 if place_of_damage == "image" else offset - 300
        flip(hurt, at)
        assert seen(near) == expected
        [line] = warnings()
        assert str(hurt) in line and line.endswith(f"reading {index.folder} itself")
        assert not hurt.exists()
    lines: list[str] = []
    with stage_shards(index, BOTH, report=lines.append) as near:
        assert is_copied(near, place) and hurt.exists() and seen(near) == expected
    assert warnings() == [] and "copying" in lines[0]


def test_a_disk_that_is_wiped_while_it_is_read(
    index: Index, place: Path, warnings: Callable[[], list[str]]
) -> None:
    expected = seen(index)
    with stage_shards(index, BOTH) as near:
        shutil.rmtree(place)
        assert seen(near) == expected
    assert len(warnings()) == 2, "one line for each split, not for each shard"


def test_after_a_restart_of_the_machine_copies_are_read_back(
    index: Index, place: Path, warnings: Callable[[], list[str]]
) -> None:
    with stage_shards(index, BOTH):
        before = copies(the_set(place))
    record = the_set(place) / "verified.json"
    content = json.loads(record.read_text())
    hurt = sorted(the_set(place).glob("*.tar"))[0]
    flip(hurt, 1000)
    # As a lost write may leave it: the record vouches for just this file, of another boot.
    found = hurt.stat()
    content["files"][hurt.name] = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    record.write_text(json.dumps(content | {"boot": "another"}))
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place) and seen(near) == seen(index)
    after = copies(the_set(place))
    assert [name for name in before if before[name] != after[name]] == [hurt.name]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x00\xff", b'{"boot": 1, "files": 3}'])
def test_a_record_that_is_nonsense_vouches_for_nothing(content: bytes, index: Index, place: Path) -> None:
    with stage_shards(index, BOTH):
        before = copies(the_set(place))
    (the_set(place) / "verified.json").write_bytes(content)
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place)
    assert copies(the_set(place)) == before
    assert json.loads((the_set(place) / "verified.json").read_text())["copied_from"] == str(index.folder)


def test_damage_in_the_shared_folder_is_reported_by_the_stream(
    index: Index, place: Path, warnings: Callable[[], list[str]]
) -> None:
    offset = int(index.split("train").columns(1).offset[2])
    tar = index.split("train").shards[1].tar
    flip(tar, offset + 20)
    with stage_shards(index, BOTH) as same:
        assert same is index
        [line] = warnings()
        assert line == (
            f"staging: {tar} is not what its index says (SHA-256 differs); reading {index.folder} itself"
        )
        with pytest.raises(DataError, match=r"train-00007.*CRC-32 differs"):
            seen(same)
    assert list((place / f"vaedist-{os.getuid()}").iterdir()) == []


def test_an_original_that_is_bad_too_is_named(index: Index, place: Path) -> None:
    with stage_shards(index, BOTH) as near:
        split = near.split("train")
        for shard in (split.shards[0], index.split("train").shards[0]):
            flip(shard.tar, 600)
        with pytest.raises(DataError, match=str(index.folder)):
            ShardReader(near, split, 0).decode(0, None)  # type: ignore[arg-type]
