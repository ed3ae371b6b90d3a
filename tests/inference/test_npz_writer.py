"""Arrays that grow part by part: numpy reads what was written, and nothing is left of what was not finished."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vaedist.core.errors import UserError
from vaedist.inference.npz_writer import NpzWriter

IMAGES = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (10, 3, 4, 5)).astype(np.uint8)
LABELS = np.arange(10)


def write(path: Path, sizes: tuple[int, ...], rows: int | None = None) -> None:
    with NpzWriter(path, rows) as writer:
        start = 0
        for size in sizes:
            writer.add(images=IMAGES[start : start + size], labels=LABELS[start : start + size])
            start += size
        writer.finish()


def test_numpy_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "new" / "a.npz", (3, 7))
    with np.load(tmp_path / "new" / "a.npz") as arrays:
        assert list(arrays) == ["images", "labels"]
        assert (arrays["images"] == IMAGES).all() and arrays["images"].dtype == np.uint8
        assert (arrays["labels"] == LABELS).all() and arrays["labels"].dtype == LABELS.dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_the_bytes_do_not_depend_on_the_parts(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", (3, 7))
    write(tmp_path / "b.npz", (10,))
    write(tmp_path / "c.npz", (1, 4, 5), rows=10)
    for other in ("b.npz", "c.npz"):
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / other).read_bytes()


def test_rows_of_a_known_number_are_compressed_as_they_come(tmp_path: Path) -> None:
    many = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (64, 1 << 16)).astype(np.uint8)
    with NpzWriter(tmp_path / "a.npz", rows=65) as writer:
        writer.add(images=many)
        assert writer._file.tell() > many.nbytes / 2
        assert list(tmp_path.iterdir()) == [], "a kill would leave it"
        writer.add(images=many[:1])
        writer.finish()
    assert len(np.load(tmp_path / "a.npz")["images"]) == 65
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_rows_that_do_not_lie_in_memory_in_order_are_written_in_order(tmp_path: Path) -> None:
    with NpzWriter(tmp_path / "a.npz") as writer:
        writer.add(images=IMAGES.transpose(0, 3, 1, 2))
        writer.finish()
    assert (np.load(tmp_path / "a.npz")["images"] == IMAGES.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("rows", [None, 10, 11])
def test_unfinished_it_leaves_what_was_there(tmp_path: Path, rows: int | None) -> None:
    write(tmp_path / "a.npz", (10,))
    before = (tmp_path / "a.npz").read_bytes()
    with NpzWriter(tmp_path / "a.npz", rows) as writer:
        writer.add(images=IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before


def test_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.npz", tmp_path):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            NpzWriter(path)
