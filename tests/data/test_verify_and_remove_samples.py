"""Verifying finds every kind of damage and names the sample; removing the samples repairs the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from vaedist.core.errors import DataError, UserError
from vaedist.data.format.index import Index
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.packing.remove_samples import read_keys, remove_samples
from vaedist.data.packing.verify import verify
from vaedist.data.sources import SourceSettings


@pytest.fixture(params=["png", "npy"])
def index(tmp_path: Path, request: pytest.FixtureRequest) -> Index:
    settings = SourceSettings(count={"train": 40, "test": 10})
    options = PackingConfig(
        "phantom",
        tmp_path / "out",
        size=16,
        samples_per_shard=20,
        codec=request.param,
        validation_fraction=0.0,
        settings=settings,
    )
    return pack(options).index


def place_of(index: Index, key: str) -> tuple[Path, int, int]:
    """Tar, offset and size of a sample's image."""
    for split in index.splits.values():
        for number, shard in enumerate(split.shards):
            columns = split.columns(number)
            if key in list(columns.keys):
                row = list(columns.keys).index(key)
                return shard.tar, int(columns.offset[row]), int(columns.size[row])
    raise KeyError(key)


def change(path: Path, damage: Callable[[bytearray], bytearray | None]) -> None:
    data = bytearray(path.read_bytes())
    changed = damage(data)
    path.chmod(0o644)
    path.write_bytes(data if changed is None else changed)


def keys_of(index: Index, split: str) -> list[str]:
    return [index.split(split).key(i) for i in range(index.split(split).count)]


def test_a_sound_folder(index: Index) -> None:
    seen = []
    assert verify(index, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (50, 50)


def test_a_flipped_byte_names_its_sample(index: Index) -> None:
    key = keys_of(index, "train")[7]
    tar, offset, size = place_of(index, key)
    change(tar, lambda data: data.__setitem__(offset + size // 2, data[offset + size // 2] ^ 1))
    (damage,) = verify(index)
    assert (damage.shard, damage.key, damage.offset) == (tar.name, key, offset)
    assert "CRC-32" in damage.what


def test_a_hole_of_zeros_names_all_its_samples(index: Index) -> None:
    keys = keys_of(index, "train")[3:6]
    tar, first, _ = place_of(index, keys[0])
    _, last, size = place_of(index, keys[2])
    change(tar, lambda data: data.__setitem__(slice(first, last + size), bytes(last + size - first)))
    damages = verify(index)
    assert [damage.key for damage in damages] == keys
    assert all("all zero" in damage.what for damage in damages)


def test_a_short_shard_names_what_is_missing(index: Index) -> None:
    keys = keys_of(index, "train")[:20]
    tar, offset, _ = place_of(index, keys[15])
    change(tar, lambda data: data[: offset + 3])
    assert [damage.key for damage in verify(index)] == keys[15:]


def test_a_changed_tar_header_names_the_sample_behind_it(index: Index) -> None:
    key = keys_of(index, "train")[4]
    tar, offset, _ = place_of(index, key)
    before = place_of(index, keys_of(index, "train")[3])
    middle = before[1] + before[2] + (offset - before[1] - before[2]) // 2
    change(tar, lambda data: data.__setitem__(middle, data[middle] ^ 1))
    (damage,) = verify(index)
    assert damage.key == key
    assert "headers" in damage.what


def test_bytes_after_the_last_image_count_too(index: Index) -> None:
    tar = index.split("train").shards[0].tar
    change(tar, lambda data: data.__setitem__(len(data) - 1, 1))
    (damage,) = verify(index)
    assert damage.key is None
    assert "SHA-256" in damage.what


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_lost_shard_names_all_its_samples(index: Index, how: str) -> None:
    tar = index.split("train").shards[1].tar
    if how == "missing":
        tar.unlink()
    else:
        change(tar, lambda data: data[:0])
    assert [damage.key for damage in verify(index)] == keys_of(index, "train")[20:]


def test_damaged_columns_are_reported(index: Index) -> None:
    change(index.split("train").shards[0].columns_path, lambda data: data.__setitem__(60, data[60] ^ 1))
    damages = verify(Index.open(index.folder))
    assert [(damage.shard, damage.key) for damage in damages] == [("train-000000.cols", None)]


# Removing samples --------------------------------------------------------------------------------------------


def test_removing_takes_samples_out_and_changes_the_identity(index: Index) -> None:
    keys = [*keys_of(index, "train")[2:5], keys_of(index, "test")[0]]
    tars = {tar: hashlib.sha256(tar.read_bytes()).digest() for tar in index.folder.glob("*.tar")}
    opened, count = remove_samples(index, keys, "ugly")
    assert count == 4
    assert opened.identity != index.identity
    assert {name: split.count for name, split in opened.splits.items()} == {"train": 37, "test": 9}
    assert not set(keys) & {*keys_of(opened, "train"), *keys_of(opened, "test")}
    assert [entry["key"] for entry in opened.info.removed] == keys
    assert {entry["reason"] for entry in opened.info.removed} == {"ugly"}
    assert verify(opened) == []
    assert {tar: hashlib.sha256(tar.read_bytes()).digest() for tar in index.folder.glob("*.tar")} == tars
    # A run that opened the folder before goes on.
    assert verify(Index.open(index.folder)) == []
    assert verify(index) == []


def test_the_order_of_removing_does_not_matter(index: Index, tmp_path: Path) -> None:
    keys = keys_of(index, "train")
    together, _ = remove_samples(index, keys[:2])
    rest, _ = remove_samples(together, keys[5:7])
    again, none = remove_samples(rest, keys[:7:3])
    assert none == 1, "keys removed before are passed over"
    settings = SourceSettings(count={"train": 40, "test": 10})
    options = PackingConfig("phantom", tmp_path / "b", size=16, validation_fraction=0.0, settings=settings)
    other, _ = remove_samples(pack(options).index, [*keys[:2], keys[3], *keys[5:7]])
    assert other.identity == again.identity, "the identity is that of what is left, however it is packed"


def test_removing_every_damaged_sample_repairs_the_folder(index: Index) -> None:
    keys = keys_of(index, "train")
    tar, offset, size = place_of(index, keys[7])
    change(tar, lambda data: data.__setitem__(offset + size // 2, data[offset + size // 2] ^ 1))
    index.split("train").shards[1].tar.unlink()
    damaged = [str(damage.key) for damage in verify(index)]
    assert damaged == [keys[7], *keys[20:]]
    with pytest.raises(DataError, match=f"{keys[7]}.*remove it as well"):
        remove_samples(index, [keys[0]])
    opened, count = remove_samples(index, damaged, "damaged")
    assert count == 21
    assert verify(opened) == []
    assert opened.split("train").count == 19
    assert len(opened.split("train").shards) == 1


def test_keys_that_are_not_there(index: Index) -> None:
    before = (index.folder / "index.json").read_bytes()
    with pytest.raises(UserError, match="no sample 'nobody'"):
        remove_samples(index, ["nobody", keys_of(index, "train")[0]])
    with pytest.raises(UserError, match="nothing would be left of the split 'test'"):
        remove_samples(index, keys_of(index, "test"))
    assert (index.folder / "index.json").read_bytes() == before


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a\n\n# a remark\n b \n")
    assert read_keys(path) == ["a", "b"]
    with pytest.raises(UserError, match="cannot read the keys"):
        read_keys(tmp_path / "nothing")
