"""What each source finds, and what it says of what it cannot use."""

from __future__ import annotations

import gzip
import os
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import BadImage
from vaedist.data.sources import (
    ImageSource,
    Item,
    Problem,
    SourceSettings,
    clean_key,
    detect,
    find,
    names,
    phantom,
)


def write_png(path: Path, value: int = 100, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


def opened(path: Path, name: str | None = None, **settings: object) -> ImageSource:
    return find(name or detect(path)).open_source(path, SourceSettings(**settings))  # type: ignore[arg-type]


def listed(source: ImageSource) -> tuple[list[Item], list[Problem]]:
    found = list(source.items())
    return [one for one in found if isinstance(one, Item)], [one for one in found if isinstance(one, Problem)]


# The registry ------------------------------------------------------------------------------------------------


def test_the_files_are_the_registry() -> None:
    assert names() == ["folder", "mnist", "oasis", "phantom", "volume"]
    with pytest.raises(UserError, match=r"'osis'; did you mean 'oasis'\? Valid: folder, mnist"):
        find("osis")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        detect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing that can be packed"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("case_001_slice_0", "case_001_slice_0"),
        ("a/b.c d", "a_b_c_d"),
        ("../../etc/passwd", "etc_passwd"),
        ("x" * 80, "x" * 80),
    ],
)
def test_keys_are_made_safe(text: str, key: str) -> None:
    assert clean_key(text) == key


def test_keys_stay_different_where_letters_are_lost() -> None:
    texts = ["größe", "grüße", "кот", "狗", "x" * 200, "x" * 199 + "y", "", "...", "a\0b", "a\udcffb"]
    keys = [clean_key(text) for text in texts]
    assert len(set(keys)) == len(texts)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,80}", key) for key in keys)


# OASIS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "keras_png_slices_data"])
def test_oasis_layout(tmp_path: Path, below: str) -> None:
    top = tmp_path / below
    for split, case in (("train", 1), ("validate", 402), ("test", 441)):
        for number in (0, 2, 10):
            write_png(top / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{number}.nii.png")
    write_png(top / "keras_png_slices_seg_train" / "seg_001_slice_0.nii.png")
    assert detect(tmp_path) == "oasis"
    items, problems = listed(opened(tmp_path))
    assert problems == []
    assert [item.key for item in items[:3]] == ["case_001_slice_0", "case_001_slice_2", "case_001_slice_10"]
    assert {item.split: item.subject for item in items} == {
        "train": "case_001",
        "validate": "case_402",
        "test": "case_441",
    }


def test_oasis_tells_other_names(tmp_path: Path) -> None:
    write_png(tmp_path / "keras_png_slices_train" / "case_001_slice_0.nii.png")
    write_png(tmp_path / "keras_png_slices_train" / "slice_7.png")
    items, problems = listed(opened(tmp_path))
    assert len(items) == 1
    assert problems == [
        Problem("keras_png_slices_train/slice_7.png", "is not named case_NNN_slice_M.nii.png")
    ]


@pytest.mark.shared
def test_real_slices_of_the_oasis_layout(shared_data: Path) -> None:
    source = opened(shared_data / "mri_oasis_layout")
    items, problems = listed(source)
    assert problems == []
    counts = {split: sum(item.split == split for item in items) for split in ("train", "validate", "test")}
    assert counts == {"train": 855, "validate": 408, "test": 263}
    assert source.load(items[0]).shape == (256, 256)


# idx ---------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(0))
    for part, count in (("t10k", 5), ("train", 12)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return images, labels


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    images, labels = write_idx(tmp_path, zipped)
    assert detect(tmp_path) == "mnist"
    source = opened(tmp_path)
    items, _ = listed(source)
    assert [item.split for item in items] == ["train"] * 12 + ["test"] * 5
    assert items[3].key == "train_00003"
    assert [item.label for item in items[:12]] == [str(label) for label in labels]
    assert (source.load(items[3]) == images[3]).all()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"x", "goes on"),
        (lambda data: b"\0\0\x0d" + data[3:], "not an idx file"),
        (lambda data: data[:0], "not an idx file"),
        (lambda data: data[:4] + b"\x7f\xff\xff\xff" * 3 + data[16:], "more than is allowed"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, damage, told: str) -> None:  # type: ignore[no-untyped-def]
    write_idx(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=told):
        listed(opened(tmp_path))


def test_idx_labels_must_fit(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match="3 labels for 12 images"):
        listed(opened(tmp_path))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_idx_files(shared_data: Path, name: str) -> None:
    source = opened(shared_data / name)
    items, _ = listed(source)
    assert len(items) == 70_000
    assert {item.label for item in items} == {str(digit) for digit in range(10)}
    assert source.load(items[-1]).shape == (28, 28)


# Folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "below"),
    [(("train_data", "test_data"), ""), (("train", "test"), ""), (("train_data", "test_data"), "faces")],
)
def test_split_folders_with_classes(tmp_path: Path, spellings: tuple[str, str], below: str) -> None:
    for spelling in spellings:
        for label in ("dog", "cat"):
            write_png(tmp_path / below / spelling / label / "1.png")
    items, problems = listed(opened(tmp_path))
    assert problems == []
    assert {(item.split, item.label) for item in items} == {
        (split, label) for split in ("train", "test") for label in ("dog", "cat")
    }
    assert f"{spellings[0]}_cat_1" in {item.key for item in items}


@pytest.mark.parametrize("spelling", ["val", "valid", "validate", "validation", "Val_data"])
def test_spellings_of_validate(tmp_path: Path, spelling: str) -> None:
    write_png(tmp_path / spelling / "cat" / "1.png")
    write_png(tmp_path / "train" / "cat" / "1.png")
    items, _ = listed(opened(tmp_path))
    assert {item.split for item in items} == {"train", "validate"}


def test_class_folders_and_flat_folder(tmp_path: Path) -> None:
    write_png(tmp_path / "classes" / "cat" / "deep" / "1.png")
    write_png(tmp_path / "classes" / "dog" / "1.png")
    items, _ = listed(opened(tmp_path / "classes"))
    assert [(item.key, item.split, item.label) for item in items] == [
        ("cat_deep_1", None, "cat"),
        ("dog_1", None, "dog"),
    ]
    write_png(tmp_path / "flat" / "b.png")
    write_png(tmp_path / "flat" / "a.png")
    (tmp_path / "flat" / ".DS_Store").write_bytes(b"x")
    items, problems = listed(opened(tmp_path / "flat"))
    assert problems == []
    assert [(item.key, item.split, item.label) for item in items] == [("a", None, None), ("b", None, None)]


def test_folder_problems_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.png").touch()
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "cat" / "self.png").symlink_to(tmp_path / "cat" / "self.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "dog").mkdir()
    write_png(tmp_path / "loose.png")
    items, problems = listed(opened(tmp_path))
    assert [item.key for item in items] == ["cat_1"]
    told = {problem.origin: problem.reason for problem in problems}
    assert told["cat/2.png"] == "is empty (0 bytes)"
    assert "loop" in told["cat/loop"]
    assert "No such file" in told["cat/gone.png"]
    assert "symbolic links" in told["cat/self.png"]
    assert "not a regular file" in told["cat/pipe.png"]
    assert told["dog"] == "is an empty class folder"
    assert "no class" in told["loose.png"]
    assert len(told) == 7


def test_folders_beside_split_folders_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "train" / "cat" / "1.png")
    write_png(tmp_path / "backup" / "cat" / "1.png")
    items, problems = listed(opened(tmp_path))
    assert len(items) == 1
    assert [problem.origin for problem in problems] == ["backup"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folders_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "cat" / "1.png")
    locked = write_png(tmp_path / "dog" / "1.png").parent
    locked.chmod(0)
    try:
        _, problems = listed(opened(tmp_path))
    finally:
        locked.chmod(0o755)
    assert "Permission denied" in problems[0].reason


def test_match_chooses_files(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/1_mask.png", "dog/1.png"):
        write_png(tmp_path / name)
    items, _ = listed(opened(tmp_path, match="*_mask.png"))
    assert [item.key for item in items] == ["cat_1_mask"]


# Phantom -----------------------------------------------------------------------------------------------------


def phantom_of(count: int, size: int = 32, seed: int = 0) -> tuple[list[Item], np.ndarray]:
    source = opened(Path("phantom"), "phantom", seed=seed, size=size, count={"train": count})
    items, _ = listed(source)
    return items, np.stack([source.load(item) for item in items])


def test_phantom_is_a_function_of_seed_and_place() -> None:
    items, pictures = phantom_of(40)
    more, again = phantom_of(56)
    assert (again[:40] == pictures).all(), "asking for more images changed the first ones"
    assert [item.key for item in more[:40]] == [item.key for item in items]
    _, other = phantom_of(40, seed=1)
    assert not (other == pictures).all(axis=(1, 2)).any()
    assert len({picture.tobytes() for picture in pictures}) == 40


def test_phantom_has_subjects_and_balanced_classes() -> None:
    items, _ = phantom_of(64)
    assert [item.subject for item in items[:17]] == ["train_00000"] * 16 + ["train_00001"]
    assert sum(item.label == "old" for item in items) == 32


def test_phantom_neighbours_are_more_alike_than_strangers() -> None:
    _, pictures = phantom_of(128, size=48)
    volumes = pictures.reshape(8, 16, -1).astype(float)
    neighbours = np.abs(volumes[:, 1:] - volumes[:, :-1]).mean()
    strangers = np.abs(volumes[1:] - volumes[:-1]).mean()
    assert neighbours < 0.8 * strangers


def test_phantom_shows_the_same_head_at_any_size() -> None:
    _, small = phantom_of(4, size=64)
    _, large = phantom_of(4, size=256)
    shrunk = large.reshape(4, 64, 4, 64, 4).mean(axis=(2, 4))
    for one, other in zip(small, shrunk, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.95


def test_phantom_classes_can_be_told_apart() -> None:
    # Old heads have wide ventricles: the middle of a low slice is darker.
    items, pictures = phantom_of(16 * 40, size=48)
    low = [i for i, item in enumerate(items) if item.location[2] == 4]
    middle = {
        label: [pictures[i][18:30, 16:32].mean() for i in low if items[i].label == label]
        for label in ("young", "old")
    }
    threshold = (np.mean(middle["young"]) + np.mean(middle["old"])) / 2
    right = sum(value > threshold for value in middle["young"]) + sum(
        value < threshold for value in middle["old"]
    )
    assert right >= 0.8 * len(low)
    assert right < len(low) + 1


def test_phantom_looks_like_a_head() -> None:
    _, pictures = phantom_of(16 * 6, size=64)
    assert pictures[:, :3, :3].mean() < 12, "corners are air"
    middle = pictures[:, 16:48, 20:44].astype(float)
    assert 90 < middle.mean() < 210
    assert middle.std(axis=(1, 2)).min() > 15


def test_phantom_is_fast_enough() -> None:
    # 11,328 images in two minutes are 10 ms each, packing included; CPU time, for the cores are shared.
    before = time.process_time()
    phantom_of(128, size=64)
    assert (time.process_time() - before) / 128 < 0.006


def test_phantom_module_has_no_layout() -> None:
    assert phantom.recognizes(Path("/")) == 0


# Loading --------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    source = opened(tmp_path)
    items, _ = listed(source)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        source.load(items[0])
