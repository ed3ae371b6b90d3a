"""Checkpoints, state files and disks that are damaged, full, read-only, or written by other versions."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.stage import KILLED, Stage, difference, only_line, read_only, small_disk, state
from tests.run_commands import curve
from vaedist.core.errors import CannotWrite, UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


# Checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            truncate,
            "bytes, its manifest says",
            id="truncated",
            marks=[
                pytest.mark.ci,
                pytest.mark.faults(
                    row="F10",
                    fault="newest checkpoint truncated",
                    ray="takes it as the newest at every retry, until all retries are used up",
                ),
            ],
        ),
        pytest.param(
            flip_a_bit,
            "the sha256 of state.pt is not the manifest's",
            id="flipped",
            marks=pytest.mark.faults(
                row="F10b", fault="one bit of the newest checkpoint flipped", ray="as above"
            ),
        ),
    ],
)
def test_a_damaged_newest_checkpoint(
    damage: Callable[[Path], None], reason: str, stage: Stage, whole: Stage, half: Stage
) -> None:
    stage.begin_with(half)
    damage(stage.newest() / "state.pt")
    code, _, err = stage.go_on("-q")
    assert code == 0
    told = only_line(err)
    assert "step-000000015 is damaged" in told
    assert reason in told
    assert "passed over for the one before, put aside as damaged-step-000000015" in told
    assert stage.starts() == [0, 10]
    stage.note("told", told)
    stage.equals(whole)


@pytest.mark.faults(
    row="F13",
    fault="kill -9 in the middle of writing a checkpoint, twice",
)
def test_killed_while_writing(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)

    def killed(place: str, checkpoint: str) -> list[str]:
        orders = {"place": place, "path": checkpoint, "once": str(stage.folder / place)}
        code, _, err = stage.train("-q", FAULT_KILL=json.dumps(orders))
        assert (code, err) == (KILLED, "")
        assert (stage.folder / place).exists()
        left = [name for name in stage.saved() if name.startswith(".tmp-")]
        assert [name for name in left if checkpoint in name] == left, "what the kill before left was swept"
        assert checkpoint not in stage.saved()
        return left

    [torn] = killed("half-write", "step-000000020")
    assert [path.name for path in (stage.run / "checkpoints" / torn).iterdir()] == ["state.pt"]
    [unnamed] = killed("before-rename", "step-000000025")
    assert len(list((stage.run / "checkpoints" / unnamed).iterdir())) == 2
    code, _, err = stage.go_on("-q")
    assert (code, err) == (0, "")
    assert stage.starts() == [0, 15, 15, 20]
    stage.note("told", "nothing: what is half written has never been a checkpoint, and is swept")
    stage.equals(whole)


@pytest.mark.faults(
    row="F22",
    fault="a checkpoint written by other versions of torch, Ray and vaedist; then by a newer format",
    ray="its state cannot be read where the format changed (2.53 to 2.56)",
)
def test_a_checkpoint_of_other_versions(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    record = json.loads((stage.run / "provenance.json").read_text())
    record[-1]["vaedist"] = "0.0.1"
    record[-1]["libraries"] |= {"torch": "2.1.0", "ray": "2.53.0"}
    (stage.run / "provenance.json").write_text(json.dumps(record))
    newest = stage.newest()
    manifest = json.loads((newest / "manifest.json").read_text())

    # A checkpoint of a version to come is not damaged: it stays where it is, and the user is told.
    (newest / "manifest.json").write_text(json.dumps(manifest | {"format": manifest["format"] + 1}))
    code, _, err = stage.train("-q")
    assert code == UserError.exit_code
    assert "use the version that wrote it (provenance.json names it)" in only_line(err)
    assert stage.saved() == half.saved()

    # What torch of 2023 wrote lacks the entries that later versions added to the archive.
    old = newest / "old.pt"
    with zipfile.ZipFile(newest / "state.pt") as given, zipfile.ZipFile(old, "w") as made:
        dropped = (".format_version", ".storage_alignment", ".data/serialization_id")
        for member in given.infolist():
            if not member.filename.endswith(dropped):
                made.writestr(member.filename, given.read(member))
        assert len(made.infolist()) < len(given.infolist())
    old.replace(newest / "state.pt")
    content = (newest / "state.pt").read_bytes()
    told_of = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest | {"files": {"state.pt": told_of}}))
    assert stage.go_on("-q")[::2] == (0, "")
    assert stage.starts() == [0, 15]
    stage.note("told", only_line(err))
    stage.equals(whole)


# State files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            damage,
            id=damage.__name__,
            marks=pytest.mark.faults(row=row, fault=f"every state file of the run {word}", ray=ray),
        )
        for row, damage, word, ray in (
            (
                "F11",
                truncate,
                "and the newest manifest truncated",
                "its run cannot be resumed though all checkpoints are intact",
            ),
            ("F11b", zero, "and the newest manifest zeroed", "as above"),
            ("F11c", Path.unlink, "deleted", "silently starts from nothing"),
        )
    ],
)
def test_damaged_state_files(damage: Callable[[Path], None], stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    names = ["job.yaml", "provenance.json", "best.json", "metrics.jsonl", "metrics.csv", "latents.jsonl"]
    files = [stage.run / name for name in names] + list(stage.run.glob("tensorboard/*tfevents*"))
    if damage is not Path.unlink:
        files.append(stage.newest() / "manifest.json")
    for file in files:
        damage(file)
    code, _, err = stage.go_on("-q")
    assert code == 0, err
    begin = 15 if damage is Path.unlink else 10
    assert stage.starts() == [begin], "the record of starts begins anew"
    if damage is not Path.unlink:
        assert "provenance.json cannot be read: put aside as damaged-1-provenance.json" in err
        assert "step-000000015 is damaged" in err
        stage.note("told", "a line for each: put aside as damaged-..., passed over")
    else:
        assert err == ""
        stage.note("told", "nothing: no checkpoint depends on these files")
    assert difference(state(stage.run), state(whole.run)) == []
    assert stage.keys() == whole.keys()
    later = [row for row in curve(whole.run) if row["step"] > begin]
    assert [row for row in curve(stage.run) if row["step"] > begin] == later


# Disks ------------------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.faults(row="F12", fault="the disk is full when a checkpoint is written (ENOSPC)")
def test_a_full_disk(stage: Stage, whole: Stage) -> None:
    with small_disk(stage.run, "24m"):
        with stage.start("-q", hold=13) as training:
            stage.wait_held(training)
            free = shutil.disk_usage(stage.run).free
            size = (stage.newest() / "state.pt").stat().st_size
            (stage.run / "filler").write_bytes(bytes(free - size // 2))
            stage.release()
            code, _, err = training.end()
        assert code == CannotWrite.exit_code
        told = only_line(err)
        assert "no room to write the checkpoint of step 15" in told
        assert "No space left on device" in told
        assert "checkpoints written before are intact; make room and run the same command again" in told
        assert stage.newest().name == "step-000000010"
        stage.is_clean()
        (stage.run / "filler").unlink()
        assert stage.go_on("-q")[::2] == (0, "")
        assert stage.starts() == [0, 10]
        stage.equals(whole)
        stage.is_clean()
    stage.note("told", told)


@pytest.mark.faults(row="M5", fault="the checkpoint folder becomes read-only")
def test_a_read_only_checkpoint_folder(stage: Stage, whole: Stage, half: Stage) -> None:
    stage.begin_with(half)
    with stage.start("-q", hold=18) as training:
        stage.wait_held(training)
        with read_only(stage.run / "checkpoints"):
            stage.release()
            code, _, err = training.end()
    assert code == CannotWrite.exit_code
    told = only_line(err)
    assert f"cannot write the checkpoint of step 20 in {stage.run / 'checkpoints'}" in told
    assert "make the folder writable and run the same command again" in told
    assert stage.go_on("-q")[::2] == (0, "")
    assert stage.starts() == [0, 15, 15]
    stage.note("told", told)
    stage.equals(whole)
