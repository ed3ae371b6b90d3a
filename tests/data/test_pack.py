"""Packing: what is written, that it is always the same, and what becomes of bad input and of interrupted runs."""

from __future__ import annotations

import gc
import json
import random
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import decode
from vaedist.data.format.index import Index
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = {"train": 48, "validate": 16, "test": 16}


def phantom(out: Path, **options: object) -> PackingConfig:
    count = options.pop("count", COUNT)
    packing = PackingConfig(
        "phantom", out, size=16, samples_per_shard=20, settings=SourceSettings(count=count)
    )  # type: ignore[arg-type]
    return replace(packing, **options)  # type: ignore[arg-type]


def images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 12)) -> Path:
    """Noise PNGs in class folders; the seed is the file's place, so all differ."""
    for label, count in classes.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            generator = np.random.Generator(np.random.PCG64([len(label), ord(label[0]), i]))
            Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(
                folder / label / f"{i}.png"
            )
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pictures(index: Index, split: str) -> dict[str, np.ndarray]:
    """Key to (C, H, W) read by offset alone, as the stream does."""
    found = {}
    opened = index.split(split)
    for number, shard in enumerate(opened.shards):
        columns, data = opened.columns(number), shard.tar.read_bytes()
        for row, key in enumerate(columns.keys):
            start = int(columns.offset[row])
            piece = data[start : start + int(columns.size[row])]
            if index.info.codec == "npy":
                channels, height, width = index.shape
                shape = (height, width) if channels == 1 else (height, width, channels)
                picture = np.frombuffer(piece, np.uint8).reshape(shape)
            else:
                picture = decode(piece)
            found[key] = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    return found


# What is written ---------------------------------------------------------------------------------------------


def test_a_packed_phantom(tmp_path: Path) -> None:
    report = pack(phantom(tmp_path / "out"))
    index = report.index
    assert {name: split.count for name, split in index.splits.items()} == COUNT
    assert [int(count) for count in index.split("train").counts] == [20, 20, 8]
    assert index.shape == (1, 16, 16)
    assert index.classes == ("old", "young")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["index.json", "contact-train.png", "contact-validate.png", "contact-test.png"]
        + [f"train-{i:06d}.{end}" for i in range(3) for end in ("tar", "cols")]
        + [f"{split}-000000.{end}" for split in ("validate", "test") for end in ("tar", "cols")]
    )
    columns = index.split("train").columns(0)
    assert columns.subject(0) == columns.keys[0].partition("_slice")[0]
    assert set(index.split("train").columns(0).label.tolist()) == {0, 1}


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # webdataset's reader leaves its files to the collector
@pytest.mark.parametrize("codec", ["png", "npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_webdataset_reads_what_is_packed(tmp_path: Path, codec: str, channels: int) -> None:
    index = pack(phantom(tmp_path / "out", codec=codec, channels=channels)).index
    expected = pictures(index, "train")
    urls = [str(shard.tar) for shard in index.split("train").shards]
    seen = {}
    state = random.getstate()  # webdataset's reader moves the global generator, even when it shuffles nothing
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"):
        picture = sample[codec]
        if channels == 1 and picture.ndim == 3:  # webdataset's `rgb8` repeats a gray PNG
            picture = picture[..., 0]
        seen[sample["__key__"]] = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
        assert index.classes[int(sample["cls"])] == sample["json"]["class"]
        assert sample["json"]["subject"] in sample["__key__"]
    random.setstate(state)
    gc.collect()
    assert seen.keys() == expected.keys()
    assert len(seen) == 48
    assert all((seen[key] == expected[key]).all() for key in seen)


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    base = pack(phantom(tmp_path / "a")).index.identity
    same = [
        {"codec": "npy"},
        {"samples_per_shard": 7},
        {"order": "source"},
        {"workers": 2},
    ]
    for i, change in enumerate(same):
        assert pack(phantom(tmp_path / f"same{i}", **change)).index.identity == base, change
    for i, change in enumerate(
        [{"seed": 1}, {"size": 24}, {"channels": 3}, {"count": {**COUNT, "test": 15}}]
    ):
        assert pack(phantom(tmp_path / f"other{i}", **change)).index.identity != base, change


def test_bytes_are_always_the_same(tmp_path: Path) -> None:
    pack(phantom(tmp_path / "a"))
    time.sleep(1.1)  # a tar's dates have a resolution of one second
    pack(phantom(tmp_path / "b", workers=2))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_members_have_fixed_dates_and_owners(tmp_path: Path) -> None:
    pack(phantom(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        members = archive.getmembers()
    assert {(member.mtime, member.uname, member.uid, member.mode) for member in members} == {
        (0, "vaedist", 0, 0o444)
    }
    assert [member.name.rpartition(".")[2] for member in members[:3]] == ["cls", "json", "png"]
    assert all(member.name.count(".") == 1 for member in members), "keys have no dots"


def test_the_packed_folder_is_read_only_and_names_nothing_of_this_machine(tmp_path: Path) -> None:
    source = images(tmp_path / "faces", {"cat": 5, "dog": 5})
    pack(PackingConfig(str(source), tmp_path / "out"))
    assert all(path.stat().st_mode & 0o222 == 0 for path in (tmp_path / "out").iterdir())
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()
    assert not any(str(tmp_path).encode() in data for data in content(tmp_path / "out").values())


def test_contact_sheets_show_what_was_packed(tmp_path: Path) -> None:
    source = images(tmp_path / "faces", {"cat": 50, "dog": 50}, size=(40, 40))
    pack(PackingConfig(str(source), tmp_path / "out", channels=3))
    with Image.open(tmp_path / "out" / "contact-train.png") as sheet:
        assert sheet.width == 8 * (120 + 2) + 2
        assert sheet.height == 26 + 8 * (120 + 15 + 2) + 2
        tile = np.asarray(sheet)[28:148, 2:122]
    index = Index.open(tmp_path / "out")
    first = pictures(index, "train")[index.split("train").key(0)].transpose(1, 2, 0)
    assert (tile == first.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_finished_folders_are_left_alone(tmp_path: Path) -> None:
    pack(phantom(tmp_path / "out"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert pack(phantom(tmp_path / "out", workers=2)).already
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="already holds a packed set"):
        pack(phantom(tmp_path / "out", seed=5))


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not empty \(thesis.tex\)"):
        pack(phantom(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fit": "crop"}, "--fit has no meaning for the source 'phantom'"),
        ({"settings": SourceSettings(axis=1)}, "--axis has no meaning"),
        ({"source": "nmist"}, "did you mean 'mnist'"),
        ({"validation_fraction": 0.1}, "split 'validate' of its own"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        pack(phantom(tmp_path / "out", **change))
    assert not (tmp_path / "out").exists(), "a refused command leaves nothing behind"


# Bad input ---------------------------------------------------------------------------------------------------

_BAD = {
    "cat/empty.png": lambda path: path.touch(),
    "cat/text.png": lambda path: path.write_text("hello"),
    "cat/cut.png": lambda path: path.write_bytes((path.parent / "0.png").read_bytes()[:100]),
    "cat/ragged.png": lambda path: Image.new("L", (7, 9)).save(path),
    "cat/float.tif": lambda path: Image.new("F", (12, 12)).save(path),
    "cat/0.tif": lambda path: Image.new("L", (12, 12)).save(path),  # the key of cat/0.png
    "cat/loop": lambda path: path.symlink_to(path.parent),
    "cat/gone.png": lambda path: path.symlink_to("nowhere"),
    "emu": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", sorted(_BAD))
def test_one_bad_file_ends_the_run_with_a_sentence(tmp_path: Path, name: str) -> None:
    source = images(tmp_path / "in", {"ant": 8, "cat": 8, "dog": 8})
    _BAD[name](source / name)
    with pytest.raises(UserError, match=rf"{name} .*--skip-bad") as told:
        pack(PackingConfig(str(source), tmp_path / "out"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out" / "index.json").exists()
    report = pack(PackingConfig(str(source), tmp_path / "out", skip_bad=True))
    left_out = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [one["file"] for one in left_out] == [name]
    assert report.rejected == 1
    assert sum(split.count for split in report.index.splits.values()) == 24


def test_all_bad_files_at_once_are_listed(tmp_path: Path) -> None:
    source = images(tmp_path / "in", {"ant": 8, "cat": 8, "dog": 8})
    for name, make in _BAD.items():
        make(source / name)
    for i, workers in enumerate((1, 2)):
        options = PackingConfig(
            str(source), tmp_path / f"out{i}", skip_bad=True, samples_per_shard=5, workers=workers
        )
        assert pack(options).rejected == len(_BAD)
    lines = (tmp_path / "out0" / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["file"] for line in lines} == set(_BAD)
    assert content(tmp_path / "out0") == content(tmp_path / "out1")


def test_nothing_usable_is_an_error_even_when_bad_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("hello")
    with pytest.raises(UserError, match=r"none of 1 files is an image: a.png is not an image"):
        pack(PackingConfig(str(tmp_path / "in"), tmp_path / "out", skip_bad=True))


def test_rectangles_need_a_size(tmp_path: Path) -> None:
    source = images(tmp_path / "in", {"cat": 8}, size=(10, 14))
    with pytest.raises(UserError, match="14 x 10 pixels and models take squares"):
        pack(PackingConfig(str(source), tmp_path / "out"))
    assert pack(PackingConfig(str(source), tmp_path / "out", size=8, fit="crop")).index.shape == (1, 8, 8)


def test_gray_and_colour(tmp_path: Path) -> None:
    source = images(tmp_path / "in", {"cat": 20})
    Image.new("RGB", (12, 12), (255, 0, 0)).save(source / "cat" / "red.png")
    assert pack(PackingConfig(str(source), tmp_path / "gray", channels=1)).index.shape[0] == 1
    index = pack(PackingConfig(str(source), tmp_path / "rgb", channels=3)).index
    everything = pictures(index, "train") | pictures(index, "validate")
    assert everything["cat_red"][:, 0, 0].tolist() == [255, 0, 0]
    assert (everything["cat_3"][0] == everything["cat_3"][2]).all()


def test_colour_that_was_not_seen_at_first_is_not_lost_silently(tmp_path: Path) -> None:
    source = images(tmp_path / "in", {"cat": 100})
    Image.new("RGB", (12, 12), (255, 0, 0)).save(source / "cat" / "1.png")
    with pytest.raises(UserError, match=r"cat/1\.png is in colour and the set is gray: say --gray"):
        pack(PackingConfig(str(source), tmp_path / "out"))


def test_duplicates_across_splits_are_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images(tmp_path / "in" / split, {"cat": 5})
    images(tmp_path / "in" / "test" / "more", {"dog": 3})
    report = pack(PackingConfig(str(tmp_path / "in"), tmp_path / "out", validation_fraction=0.0))
    assert report.duplicates == 5


def test_subjects_from_a_map(tmp_path: Path) -> None:
    for split, case in (("train", 1), ("train", 2), ("test", 3)):
        folder = tmp_path / "in" / f"keras_png_slices_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            picture = np.full((8, 8), 10 * case + i, np.uint8)
            Image.fromarray(picture).save(folder / f"case_{case:03d}_slice_{i}.nii.png")
    table = tmp_path / "CASES.txt"
    table.write_text("# case scan patient split\ncase_001 a P1 x\ncase_002 b P2 x\ncase_003 c P1 x\n")
    options = PackingConfig(str(tmp_path / "in"), tmp_path / "out", subjects=table, validation_fraction=0.0)
    told = r"subject P1, who occurs in test \(4 images\) and train \(4 images\)"
    with pytest.raises(UserError, match=told):
        pack(options)
    table.write_text("case_001 P1\ncase_002 P1\ncase_003 P2\n")
    index = pack(options).index
    assert {index.split("train").subject(i) for i in range(8)} == {"P1"}
    assert index.split("train").key(0).startswith("case_00")


@pytest.mark.shared
def test_real_slices_by_patient(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "mri_oasis_layout"
    options = PackingConfig(str(folder), tmp_path / "out", size=32, subjects=folder / "CASES.txt")
    report = pack(options)
    assert {name: split.count for name, split in report.index.splits.items()} == {
        "train": 855,
        "validate": 408,
        "test": 263,
    }
    patients = [{split.subject(i) for i in range(split.count)} for split in report.index.splits.values()]
    assert [len(one) for one in patients] == [6, 2, 2]
    assert len(set.union(*patients)) == 10


def test_volumes_are_split_by_subject(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    generator = np.random.Generator(np.random.PCG64(0))
    (tmp_path / "in").mkdir()
    for i in range(6):
        data = generator.uniform(0, 1000, (20, 20, 12)).astype(np.float32)
        nibabel.save(
            nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "in" / f"OAS1_000{i // 2}_MR{i % 2}.nii.gz"
        )
    report = pack(
        PackingConfig(str(tmp_path / "in"), tmp_path / "out", size=16, validation_fraction=0.3, workers=2)
    )
    subjects = {
        name: {split.subject(i) for i in range(split.count)} for name, split in report.index.splits.items()
    }
    assert report.index.split("validate").count == 24
    assert subjects["train"].isdisjoint(subjects["validate"])
    assert not (tmp_path / "out" / ".packing").exists(), "the volumes unpacked on the way are gone"
