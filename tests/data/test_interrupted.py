"""Runs that were killed, ran into a full disk, or met each other: whole shards only, and the same bytes in the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import Limits
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings

REPOSITORY = Path(__file__).resolve().parents[2]


def images(folder: Path, count: int) -> Path:
    """Noise PNGs in one class folder, all different."""
    (folder / "cat").mkdir(parents=True)
    for i in range(count):
        pixels = np.random.Generator(np.random.PCG64(i)).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "cat" / f"{i}.png")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_DOOR = [sys.executable, "-m", "vaedist.shard"]
_SMALL_FILES = """
import resource, sys
from vaedist.shard import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
raise SystemExit(main(sys.argv[2:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def many(out: Path) -> tuple[list[str], PackingConfig]:
    """One packing into many shards, as arguments of the door and as options: the two are the same."""
    arguments = [
        "phantom",
        "--out",
        str(out),
        "--size",
        "32",
        "--samples-per-shard",
        "25",
        "--count",
        "train=400",
    ]
    return arguments, PackingConfig(
        "phantom", out, size=32, samples_per_shard=25, settings=SourceSettings(count={"train": 400})
    )


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    arguments, options = many(tmp_path / "killed")
    kept: set[tuple[str, int]] = set()
    for shards in (2, 9):  # killed as soon as so many are there
        with subprocess.Popen([*_DOOR, *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(options.out.glob("*.tar"))) < shards:
                time.sleep(0.002)
            assert process.poll() is None, "it was over before it could be killed"
            process.send_signal(signal.SIGKILL)
        assert not (options.out / "index.json").exists()
        now = {path.name: path.stat().st_ino for path in options.out.glob("*.tar")}
        assert kept <= set(now.items()), "a finished shard was written again"
        receipts = {path.stem for path in (options.out / ".packing").glob("*-*.json")}
        kept = {(name, inode) for name, inode in now.items() if name.removesuffix(".tar") in receipts}
        assert kept
    pack(options)
    pack(many(tmp_path / "whole")[1])
    assert content(options.out) == content(tmp_path / "whole")
    assert kept <= {(path.name, path.stat().st_ino) for path in options.out.glob("*.tar")}


def test_a_begun_folder_takes_only_the_same_plan(tmp_path: Path) -> None:
    source = images(tmp_path / "in", 12)
    (source / "cat" / "zz.png").write_text("hello")
    options = PackingConfig(
        str(source), tmp_path / "out", samples_per_shard=3, order="source", validation_fraction=0.0
    )
    with pytest.raises(UserError, match=r"cat/zz\.png"):
        pack(options)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4, "whole shards are kept"
    with pytest.raises(UserError, match="was begun with other"):
        pack(replace(options, seed=1))
    report = pack(replace(options, skip_bad=True))
    assert report.index.split("train").count == 12


def test_shards_written_under_other_limits_are_written_again(tmp_path: Path) -> None:
    source = images(tmp_path / "in", 9)
    Image.new("L", (40, 40)).save(source / "cat" / "large.png")
    (source / "cat" / "zz.png").write_text("hello")
    small = SourceSettings(limits=Limits(pixels=1000))
    options = PackingConfig(
        str(source),
        tmp_path / "out",
        size=12,
        channels=1,
        samples_per_shard=2,
        order="source",
        validation_fraction=0.0,
    )

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(replace(options, skip_bad=True, settings=small), stop)
    report = pack(replace(options, skip_bad=True))
    assert report.rejected == 1, "cat/large.png is within the new limits"
    assert report.index.split("train").count == 10


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    told: list[str] = []

    def progress(done: int, total: int) -> None:
        if not told:
            with pytest.raises(UserError) as error:
                pack(many(tmp_path / "out")[1])
            told.append(str(error.value))

    pack(many(tmp_path / "out")[1], progress)
    assert "another vaedist-shard is writing" in told[0]


def test_a_file_too_large_to_write_leaves_no_half_shard(tmp_path: Path) -> None:
    arguments, options = many(tmp_path / "out")
    ended = run(sys.executable, "-c", _SMALL_FILES, "70000", *arguments)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("vaedist-shard: error: no space left for")
    assert ended.stderr.count("\n") == 1
    assert not list(options.out.glob("*.tar"))
    assert not list((options.out / ".packing").glob("*.tmp"))
    pack(options)
    pack(many(tmp_path / "whole")[1])
    assert content(options.out) == content(tmp_path / "whole")


def test_a_full_disk_leaves_whole_shards_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)).returncode:
        pytest.skip("mounting a small disk needs root's rights")
    try:
        options = many(disk / "out")[1]
        with pytest.raises(UserError, match=r"no space left for .* the same command continues"):
            pack(options)
        tars = sorted(options.out.glob("*.tar"))
        assert tars, "the disk holds some shards"
        for tar in tars:
            with tarfile.open(tar) as archive:
                assert len(archive.getmembers()) == 75
        assert not list((options.out / ".packing").glob("*.tmp"))
        assert run("mount", "-o", "remount,size=60m", str(disk)).returncode == 0
        pack(options)
        pack(many(tmp_path / "whole")[1])
        assert content(options.out) == content(tmp_path / "whole")
    finally:
        assert run("umount", str(disk)).returncode == 0


def test_a_folder_without_a_shard_takes_another_plan(tmp_path: Path) -> None:
    """The command that was wrong left no work behind: its correction need not be told to clear up first."""
    source = images(tmp_path / "in", 12)
    Image.new("L", (40, 40)).save(source / "cat" / "zz.png")
    options = PackingConfig(
        str(source), tmp_path / "out", channels=1, validation_fraction=0.0, skip_bad=False
    )
    options = replace(options, size=12, settings=SourceSettings(limits=Limits(pixels=1000)))
    with pytest.raises(UserError, match=r"zz\.png announces"):
        pack(options)
    report = pack(replace(options, size=16, settings=SourceSettings()))
    assert report.index.shape == (1, 16, 16)
