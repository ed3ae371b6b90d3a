"""Data that are damaged, missing, awkwardly cut, or met by another number of processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_damage import COUNT, DAMAGE, HURT, flip, places
from tests.faults.stage import STEPS, Stage, only_line, shard
from tests.run_commands import ROOT, curve, last_step
from vaedist.core.errors import EXIT_STOPPED, DataError, UserError
from vaedist.data.format.index import Index

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TWO = ("--workers", "2")


def own_data(stage: Stage) -> Path:
    """A copy of the packed images, which may be hurt; the stage trains on it from now on."""
    copy = stage.folder / "shards"
    shutil.copytree(stage.data, copy)
    for file in copy.iterdir():
        file.chmod(0o600)
    stage.data = copy
    stage.write_job()
    return copy


DOOR_BY_DOOR = """
import contextlib, io, json, sys
from vaedist.train import main
for line in sys.stdin:  # one door after the other in one process: loading torch takes longer than all of them
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(sys.argv[1:])
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


@pytest.mark.faults(
    row="F14",
    fault="a shard damaged in each of 11 ways, an index or its columns cut",
    ray="reads through webdataset, which passes over 5 of the 11 without a word",
)
def test_every_damage_to_a_shard(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    data = own_data(stage)
    index = Index.open(data)
    split = index.split("train")
    keys, sound = split.columns(0).keys, split.shards[0].tar.read_bytes()
    tar = split.shards[0].tar
    names = {
        f"'train-{HURT:05d}'": keys[HURT],
        "'train-00000'": keys[0],
        f"'train-{COUNT - 1:05d}'": keys[-1],
    }
    command = [sys.executable, "-c", DOOR_BY_DOOR, str(stage.job), "--run-dir", str(stage.run), "-q"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | stage.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as doors:
        assert doors.stdin is not None and doors.stdout is not None

        def told() -> str:
            print("again", file=doors.stdin, flush=True)
            code, err = json.loads(doors.stdout.readline())  # type: ignore[union-attr]
            assert code == DataError.exit_code, err
            return only_line(err)

        for damage, name in DAMAGE.items():
            hurt = bytearray(sound)
            if damage is None:
                tar.unlink()
            else:
                damage(hurt, *places(index))
                tar.write_bytes(hurt)
            line = told()
            assert re.search(rf"{tar.name}: sample '{names[name]}' at byte \d+: ", line), line
            stage.note("told", line.replace(str(data), "..."))
            tar.write_bytes(sound)
        for file in (split.shards[0].columns_path, data / "index.json"):
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            assert file.name in told()
            file.write_bytes(content)
        doors.stdin.close()
        assert doors.wait(60) == 0
    assert last_step(stage.run) < STEPS
    # Sound samples that came before the damaged one were trained on and count: the end is the same to the bit.
    assert stage.go_on("-q")[::2] == (0, "")
    stage.equals(whole)


@pytest.mark.ci
@pytest.mark.faults(row="F14b", fault="a shard cut at the end of a member, met by one of two ranks")
def test_a_cut_shard_stops_all_ranks(stage: Stage, whole_of_two: Stage) -> None:
    data = own_data(stage)
    index = Index.open(data)
    tar = index.split("train").shards[0].tar
    sound = tar.read_bytes()
    with stage.start(*TWO, "-q", hold=12) as training:
        stage.wait_held(training, ranks=2)
        training.signal(signal.SIGKILL)
        training.end()
    stage.release()
    tar.write_bytes(sound[: places(index)[2]])
    code, _, err = stage.train(*TWO, "-q")
    assert code == DataError.exit_code
    told = only_line(err)
    assert re.search(rf"{tar.name}: sample '\S+' at byte \d+: ", told)
    assert "copy the shard" in told or "--remove-samples" in told
    tar.write_bytes(sound)
    assert stage.go_on(*TWO, "-q")[::2] == (0, "")
    stage.note("told", told.replace(str(data), "..."))
    stage.equals(whole_of_two)


@pytest.mark.faults(row="F15", fault="one bit of an image flipped; then the sample is removed from the index")
def test_a_bad_image(stage: Stage) -> None:
    data = own_data(stage)
    index = Index.open(data)
    tar, key = index.split("train").shards[0].tar, index.split("train").columns(0).keys[HURT]
    hurt = bytearray(tar.read_bytes())
    flip(hurt, *places(index))
    tar.write_bytes(hurt)
    code, _, err = stage.train(*TWO, "-q")
    assert code == DataError.exit_code
    told = only_line(err)
    assert f"sample '{key}' at byte {places(index)[0]}" in told
    code, out, err = shard(stage, str(data), "--remove-samples", key)
    assert (code, err) == (0, "")
    assert "removed    1 now" in out
    # What is left is other data, and a new run: both ranks see the same 63 samples and not one of them the bad one.
    shutil.rmtree(stage.run)
    for file in stage.witness.iterdir():
        file.unlink()
    assert stage.go_on(*TWO, "-q")[::2] == (0, "")
    seen = stage.keys()
    assert sorted(seen) == list(range(STEPS))
    assert all(len(batch) == len(set(batch)) == 8 for batch in seen.values())
    assert not any(key in batch for batch in seen.values())
    stage.note("told", told.replace(str(data), "..."))


@pytest.mark.faults(
    row="F16",
    fault="7 shards for 2 ranks with 2 readers each",
    ray="webdataset: ranks with 10 and 9 batches, which hangs, or an error",
)
def test_shards_that_do_not_divide(stage: Stage) -> None:
    counts = {"train": 61, "validate": 13, "test": 8}
    arguments = ["phantom", "--out", str(stage.folder / "seven"), "--size", "16", "--samples-per-shard", "9"]
    code, _, err = shard(
        stage, *arguments, "--count", ",".join(f"{name}={count}" for name, count in counts.items())
    )
    assert (code, err) == (0, "")
    stage.data = stage.folder / "seven"
    assert len(Index.open(stage.data).split("train").shards) == 7
    stage.write_job(steps=14, validate_every=7)
    assert stage.train("data.workers=0", "-q") == (0, "", "")
    alone = stage.keys()
    rows = curve(stage.run)
    shutil.rmtree(stage.run)
    for file in stage.witness.iterdir():
        file.unlink()
    assert stage.go_on(*TWO, "data.workers=2", "-q")[::2] == (0, "")
    assert stage.keys() == alone
    for epoch in (range(7), range(7, 14)):
        seen = [key for step in epoch for key in alone[step]]
        assert len(seen) == len(set(seen)) == 56, "each sample at most once; 5 of 61 fill no batch"
    lines = lines_of(stage, "seen-*.jsonl")
    assert {sample for line in lines for sample in line.get("samples", [])} == set(range(13))
    steps = [{line.get("step") for line in lines_of(stage, f"seen-{rank}.jsonl")} for rank in range(2)]
    assert steps[0] == steps[1], "both ranks take the same number of steps"
    assert far_apart(rows, curve(stage.run)) < 1e-3
    stage.note("told", "nothing; the start says how many samples do not fill a batch")


def lines_of(stage: Stage, pattern: str) -> list[dict[str, Any]]:
    """What the ranks wrote down of the batches they saw."""
    files = sorted(stage.witness.glob(pattern))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def far_apart(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of the losses of two curves."""
    assert [(row["step"], row["kind"]) for row in one] == [(row["step"], row["kind"]) for row in other]
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, other, strict=True))


@pytest.mark.ci
@pytest.mark.faults(
    row="F17", fault="another number of ranks and readers at each start: 2, 1, 3, 2", ray="restarts its group"
)
def test_another_number_of_ranks(stage: Stage, whole: Stage) -> None:
    def stopped(world: int, step: int, readers: int) -> None:
        for file in stage.witness.glob("held-*"):
            file.unlink()
        with stage.start("--workers", str(world), f"data.workers={readers}", "-q", hold=step) as training:
            stage.wait_held(training, ranks=world)
            training.signal(signal.SIGTERM)
            if world > 1:
                training.wait_until((stage.run / "stop").exists, 60, "ask its ranks to stop")
                time.sleep(
                    1.1
                )  # rank 0 looks once a second: held for longer, it sees the file at its next step
            stage.release()
            code, _, err = training.end()
        assert (code, err) == (EXIT_STOPPED, "")

    stopped(2, 8, readers=1)
    stopped(1, 14, readers=2)
    stopped(3, 21, readers=0)
    assert stage.go_on("--workers", "2", "data.workers=3", "-q")[::2] == (0, "")
    first, second, third, fourth = stage.starts()
    assert (first, second > 8, third > 14, fourth > 21) == (0, True, True, True)
    assert second < third < fourth < STEPS
    assert stage.keys() == whole.keys(), "the same samples in the same order at every step"
    assert far_apart(curve(stage.run), curve(whole.run)) < 1e-3
    stage.note("told", "nothing: the same samples at every step, whatever the number of ranks")


@pytest.mark.faults(row="F19", fault="kill -9 of vaedist-shard in the middle of a shard, twice")
def test_a_killed_sharder(stage: Stage) -> None:
    def arguments(out: Path) -> list[str]:
        counted = ["--samples-per-shard", "25", "--count", "train=400,validate=25"]
        return ["phantom", "--out", str(out), "--size", "32", *counted]

    out = stage.folder / "packed"
    for shards in (2, 7):
        with subprocess.Popen(
            [sys.executable, "-m", "vaedist.shard", *arguments(out)],
            cwd=ROOT,
            env=os.environ | stage.environment(),
            stdout=subprocess.DEVNULL,
        ) as process:
            while process.poll() is None and len(list(out.glob("*.tar"))) < shards:
                time.sleep(0.002)
            assert process.poll() is None, "it was over before it could be killed"
            process.send_signal(signal.SIGKILL)
        for tar in out.glob("*.tar"):
            with tarfile.open(tar) as archive:
                assert len(archive.getmembers()) in (50, 75), "a whole shard or none"
        stage.data = out
        stage.write_job()
        code, _, err = stage.train("-q")
        assert code == UserError.exit_code, "a folder that is not finished is not trained on"
        told = only_line(err)
    since = time.monotonic()
    assert shard(stage, *arguments(out))[::2] == (0, "")
    stage.note("recovery", round(time.monotonic() - since, 2))
    stage.note("told", told.replace(str(stage.folder), "..."))
    assert shard(stage, *arguments(stage.folder / "whole"))[::2] == (0, "")
    left, right = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for folder in (out, stage.folder / "whole")
    )
    assert left == right, "byte for byte what an unkilled run packs"


@pytest.mark.faults(row="M3", fault="a validation shard vanishes before a validation")
def test_a_missing_validation_shard(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    data = own_data(stage)
    tar = Index.open(data).split("validate").shards[0].tar
    aside = tar.with_suffix(".aside")
    with stage.start("-q", hold=18) as training:
        stage.wait_held(training)
        tar.rename(aside)
        stage.release()
        code, _, err = training.end()
    assert code == DataError.exit_code
    told = only_line(err)
    assert re.search(rf"{tar.name}: sample '\S+' at byte \d+: ", told)
    aside.rename(tar)
    assert stage.go_on("-q")[::2] == (0, "")
    assert stage.starts() == [0, 15, 15]
    stage.note("told", told.replace(str(data), "..."))
    stage.equals(whole)
