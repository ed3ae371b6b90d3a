"""Room and privacy on a node's own disk: who must go, what is not touched, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.data.conftest import Pack
from tests.data.node_local import BOTH, ONE, another, copies, is_copied, seen, the_set, until
from tests.faults.stage import needs, read_only, small_disk
from tests.ranks import ROOT
from vaedist.data.format.index import Index
from vaedist.data.loading import local_disk, staging, verified_copies
from vaedist.data.loading.staging import stage_shards

# Room -------------------------------------------------------------------------------------------------------


def test_the_longest_unused_that_nobody_reads_makes_room(
    pack: Pack, place: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    shapes = [(1, 352, 352), (1, 353, 353), (1, 354, 354), (1, 355, 355)]
    folders = [
        pack(tmp_path / f"data-{n}", {"train": [4, 4], "validate": [1]}, shape=shape)
        for n, shape in enumerate(shapes)
    ]
    oldest, held, third, fourth = folders
    root = place / f"vaedist-{os.getuid()}"

    def kept() -> list[str]:
        return [json.loads((one / "verified.json").read_text())["copied_from"] for one in root.iterdir()]

    with small_disk(place, "4m"):
        with stage_shards(oldest, BOTH) as near:
            assert is_copied(near, place)
        with contextlib.ExitStack() as using:
            process = using.enter_context(another(held, tmp_path / "gate", "using"))
            until(process, "staged")
            with stage_shards(third, BOTH):
                assert len(kept()) == 3
            for one in root.iterdir():  # the one in use is the longest unused
                if json.loads((one / "verified.json").read_text())["copied_from"] == str(held.folder):
                    os.utime(one / local_disk.WORK, (1, 1))
            with stage_shards(fourth, BOTH) as near:
                assert is_copied(near, place)
                assert sorted(kept()) == sorted(str(one.folder) for one in (held, third, fourth))
        # Where all that could go would not be enough, nothing goes.
        before = kept()
        huge = pack(tmp_path / "huge", {"train": [4, 4], "validate": [1]}, shape=(1, 900, 900))
        with stage_shards(huge, BOTH) as same:
            assert same is huge
        assert sorted(kept()) == sorted(before) and "do not fit into" in warnings()[-1]
        assert not list(root.rglob(".tmp-*"))


def test_a_set_that_was_just_removed_is_made_anew(index: Index, place: Path, tmp_path: Path) -> None:
    with stage_shards(index, BOTH):
        pass
    folder = the_set(place)
    removing = os.open(folder, os.O_RDONLY)
    fcntl.flock(removing, fcntl.LOCK_EX)
    with another(index, tmp_path / "gate") as process:
        time.sleep(1)  # it opens the folder and waits
        os.rename(folder, folder.with_name(".tmp-doomed"))
        os.close(removing)
        out, _ = process.communicate(timeout=60)
    assert "copied in" in out and "staged" in out
    assert len(copies(folder)) == 8
    with stage_shards(index, BOTH):
        assert [one.name for one in folder.parent.iterdir()] == [folder.name], "what was left of it is swept"


LIMITED = (
    """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a quota that is used up: after 4 KiB of a file
"""
    + ONE
)


def test_a_disk_that_is_full_in_the_middle(pack: Pack, place: Path, tmp_path: Path) -> None:
    index = pack(tmp_path / "shared", {"train": [1, 40], "validate": [1]})
    assert [shard.bytes > 16384 for shard in index.split("train").shards] == [False, True]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(index.folder), str(tmp_path), ""],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "shared"
    assert lines[1] == f"staging: {place}: File too large; reading {index.folder} itself"
    left = list((place / f"vaedist-{os.getuid()}").iterdir())
    assert left == [], "what was copied would fill the disk and serve nobody"


def test_a_disk_that_takes_no_files(index: Index, place: Path, warnings: Callable[[], list[str]]) -> None:
    with read_only(place), stage_shards(index, BOTH) as same:
        assert same is index and seen(same)
    [line] = warnings()
    assert f"{place}/vaedist-{os.getuid()}: " in line and line.endswith(f"reading {index.folder} itself")


def test_a_stop_is_not_kept_waiting(index: Index, place: Path, warnings: Callable[[], list[str]]) -> None:
    asked = iter([False, False, False, True])
    with stage_shards(index, BOTH, stopped=lambda: next(asked, True)) as same:
        assert same is index
    assert warnings() == [], "it is about to stop: no warning"
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place)


def test_copying_has_a_deadline_and_the_next_start_goes_on(
    index: Index, place: Path, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(index.split(BOTH[0]).shards)).tar
    blocks = verified_copies.read_blocks

    def late(path: Path) -> Iterator[bytes]:
        """The first file comes when the others have found the time over: its thread only leaves."""
        if path == first:
            time.sleep(0.5)
        return blocks(path)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_LIMIT_S", 0.0)
        patch.setattr(verified_copies, "read_blocks", late)
        with stage_shards(index, BOTH) as same:
            assert same is index
    [line] = warnings()
    assert "the next start goes on with it" in line
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place)


# Privacy ----------------------------------------------------------------------------------------------------


def refused(index: Index, warnings: Callable[[], list[str]]) -> str:
    with stage_shards(index, BOTH) as same:
        assert same is index
    [line] = warnings()
    assert line.startswith("staging: ") and line.endswith(f"; reading {index.folder} itself")
    return line.removeprefix("staging: ").partition(";")[0]


def test_what_others_may_have_put_there_is_refused(
    index: Index, place: Path, tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    root, elsewhere = place / f"vaedist-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    root.symlink_to(elsewhere)
    assert refused(index, warnings) == f"{root} is a symbolic link"
    root.unlink()
    root.write_text("a file")
    assert refused(index, warnings) == f"{root}: Not a directory"
    root.unlink()
    root.mkdir()
    root.chmod(0o770)
    assert refused(index, warnings) == f"others may write into {root}"
    root.rmdir()
    place.chmod(0o777)
    assert refused(index, warnings) == f"anybody may replace what lies in {place} (it has no sticky bit)"
    place.chmod(0o1777)
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place)
    [folder] = root.iterdir()
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    assert refused(index, warnings) == f"{folder} is a symbolic link"
    assert list(elsewhere.iterdir()) == []


def test_a_foreign_folder_is_refused(index: Index, place: Path, warnings: Callable[[], list[str]]) -> None:
    root = place / f"vaedist-{os.getuid()}"
    root.mkdir(mode=0o700)
    needs("chown", "65534", str(root))
    assert refused(index, warnings) == f"{root} belongs to somebody else (user 65534)"
    assert list(root.iterdir()) == []


def test_a_folder_that_was_open_to_read_is_closed(index: Index, place: Path) -> None:
    root = place / f"vaedist-{os.getuid()}"
    root.mkdir(mode=0o755)
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place) and stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_group_may_read(
    index: Index, place: Path, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAEDIST_GROUP", "no-such-group")
    assert refused(index, warnings) == "the group 'no-such-group' does not exist on this node"
    probe = place / "probe"
    probe.mkdir()
    needs("chgrp", "daemon", str(probe))
    monkeypatch.setenv("VAEDIST_GROUP", "daemon")
    with stage_shards(index, BOTH) as near:
        assert is_copied(near, place)
    folder = the_set(place)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o2750
    assert {(folder / name).stat().st_gid for name in copies(folder)} == {probe.stat().st_gid}
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in copies(folder)} == {0o440}


@pytest.mark.parametrize("path", ["relative/place", "/tmp/$NO_SUCH_VARIABLE_HERE/x"])
def test_a_path_that_names_no_place(
    path: str, index: Index, place: Path, warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAEDIST_NODE_LOCAL", path)
    assert refused(index, warnings) == (
        f"VAEDIST_NODE_LOCAL is {path!r}, which is no path from the root with variables that are set here"
    )
