"""The door: what it prints, and with which code it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.data.format.index import Index
from vaedist.shard import main

PHANTOM = ["phantom", "--size", "16", "--count", "train=32,validate=16,test=16", "--samples-per-shard", "16"]


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """First word of each printed line to the rest of it."""
    printed = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line[11:] for line in printed}


@pytest.fixture
def packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([*PHANTOM, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_packing_says_what_was_packed_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([*PHANTOM, "--out", out]) == 0
    told = lines(capsys)
    assert told["packed"] == f"{out}: 16 x 16, gray, from phantom"
    assert told["train"].startswith("32 images, 2 subjects, 2 shards")
    assert told["classes"] == "2: old, young"
    assert told["identity"] == Index.open(out).identity
    assert told["next"] == f"vaedist-train JOB.yaml data.path={out}"
    assert Path(told["look"]).exists()
    assert main([*PHANTOM, "--out", out]) == 0
    assert "packed already; nothing to do" in capsys.readouterr().out


def test_every_option_reaches_the_packer(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for i in range(10):
            generator = np.random.Generator(np.random.PCG64([ord(label[0]), i]))
            pixels = generator.integers(0, 256, (10, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / label / f"{i}.png")
    (tmp_path / "in" / "cat" / "x.png").write_text("no image")
    (tmp_path / "map.csv").write_text(
        "key,subject\n" + "".join(f"{c}_{i},p{i}\n" for c in ("cat", "dog") for i in range(10))
    )
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--source", "folder", "--size", "8"]
    arguments += [
        "--fit",
        "crop",
        "--gray",
        "--codec",
        "npy",
        "--samples-per-shard",
        "5",
        "--order",
        "source",
    ]
    arguments += ["--seed", "3", "--subjects", str(tmp_path / "map.csv"), "--validation-fraction", "0.2"]
    arguments += ["--test-fraction", "0.2", "--workers", "2", "--skip-bad", "--match", "*.png"]
    arguments += ["--max-pixels", "1000", "--max-bytes", "100000"]
    assert main([*arguments, "--skip-bad"]) == 2, "the map does not tell whose cat/x.png is"
    (tmp_path / "map.csv").write_text((tmp_path / "map.csv").read_text() + "cat_x,p0\n")
    assert main(arguments) == 0
    index = Index.open(tmp_path / "out")
    assert (index.shape, index.info.codec, index.classes) == ((1, 8, 8), "npy", ("cat", "dog"))
    assert index.source["seed"] == 3
    assert index.source["order"] == "source"
    assert index.source["fit"] == "crop"
    assert {name: split.count for name, split in index.splits.items()} == {
        "train": 12,
        "validate": 4,
        "test": 4,
    }
    assert max(index.split("train").counts) <= 5
    assert (tmp_path / "out" / "rejected.jsonl").exists()


def test_limits_are_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "in" / "a.png")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "8", "--gray"]
    assert main([*arguments, "--max-pixels", "399"]) == 2
    assert "a.png announces 20 x 20 pixels, more than 399" in capsys.readouterr().err
    assert main([*arguments, "--max-bytes", "20"]) == 2
    assert main([*arguments, "--max-pixels", "400"]) == 0, "the folder that was begun goes on"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["phantom"], "--out DIR"),
        (["nowhere", "--out", "OUT"], "nowhere does not exist"),
        (["phantom", "--out", "OUT", "--fit", "pad", "--size", "8"], "--fit has no meaning"),
        (["OUT", "--verify"], "is not a packed folder"),
        (["OUT", "--verify", "--size", "8"], "--size has no meaning with --verify"),
        (["OUT", "--remove-samples", "a", "--gray"], "--gray or --rgb has no meaning with --remove-samples"),
        (["OUT", "--index", "--samples-per-shard", "8"], "--samples-per-shard has no meaning with --index"),
    ],
)
def test_commands_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vaedist-shard: error: ")
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        "--size=0",
        "--count=train",
        "--validation-fraction=1",
        "--slices=0.5:0.2",
        "--fit=squeeze",
        "--nonsense",
    ],
)
def test_values_that_make_no_sense(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["phantom", "--out", "out", option])
    assert ended.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_verify_and_remove_samples(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed), "--verify"]) == 0
    assert "sound" in lines(capsys)
    index = Index.open(packed)
    columns = index.split("train").columns(0)
    tar, offset = index.split("train").shards[0].tar, int(columns.offset[3])
    data = bytearray(tar.read_bytes())
    data[offset + 20] ^= 255
    tar.chmod(0o644)
    tar.write_bytes(data)
    assert main([str(packed), "--verify"]) == 3
    printed = capsys.readouterr()
    assert f"sample {columns.keys[3]!r} at byte {offset}" in printed.err
    assert f"vaedist-shard {packed} --verify --remove-samples" in printed.err
    assert main([str(packed), "--verify", "--remove-samples"]) == 0
    told = lines(capsys)
    assert told["train"].startswith("31 images")
    assert told["removed"].startswith("1 now, 1 in all")
    assert main([str(packed), "--verify"]) == 0
    (packed.parent / "keys").write_text(f"{columns.keys[0]}\n")
    assert (
        main(
            [
                str(packed),
                "--remove-samples",
                columns.keys[1],
                "--remove-samples-file",
                str(packed.parent / "keys"),
            ]
        )
        == 0
    )
    assert len(Index.open(packed).info.removed) == 3
    assert main([str(packed), "--remove-samples"]) == 2
    assert main([str(packed), "--remove-samples", "nobody"]) == 2


def test_index(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = Index.open(packed).identity
    assert main([str(packed), "--index"]) == 2
    (packed / "index.json").unlink()
    assert main([str(packed), "--index"]) == 0
    assert lines(capsys)["identity"] == identity


def rectangles(folder: Path, ground: int, sizes: tuple[tuple[int, int], ...] = ((40, 72), (70, 41))) -> Path:
    """A picture of each size (rows, columns) in either class."""
    for label in ("old cars", "bikes"):
        (folder / label).mkdir(parents=True)
        for i, size in enumerate(sizes):
            pixels = np.full((*size, 3), ground, np.uint8)
            pixels[10:20, 10:20] = (200, 30 * i, len(label))
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (((40, 72), (40, 72)), "the images are 72 x 40 pixels and models take squares: say --size, such as --size 32,"),
        (((70, 70), (65, 65)), "70 x 70 and 65 x 65 pixels among them, and a set has one"),
        (((28, 30), (28, 30)), "--size 28"),
    ],
)  # fmt: skip
def test_without_a_size_one_that_models_can_halve_is_advised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: tuple[tuple[int, int], ...], told: str
) -> None:
    source = rectangles(tmp_path / "in", 255, sizes)
    arguments = [str(source), "--out", str(tmp_path / "out"), "--validation-fraction", "0"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1
    assert main([*arguments, "--size", "16"]) == 0, "the same folder takes the corrected command"


def test_black_borders_that_were_not_asked_for_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bright, dark = rectangles(tmp_path / "bright", 255), rectangles(tmp_path / "dark", 0)
    common = ["--size", "16", "--validation-fraction", "0", "--out"]
    assert main([str(bright), *common, str(tmp_path / "a")]) == 0
    assert "black bars make 4 of 4 images looked at square" in capsys.readouterr().out
    assert main([str(bright), "--fit", "pad", *common, str(tmp_path / "b")]) == 0
    assert main([str(dark), *common, str(tmp_path / "c")]) == 0
    assert "black bars" not in capsys.readouterr().out
