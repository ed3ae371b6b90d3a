"""Every damage that a plain webdataset reader may pass over in silence is an error that says where."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaedist.core.errors import DataError
from vaedist.data.format.columns import SampleRow, write_columns
from vaedist.data.format.identity import pixel_digest
from vaedist.data.format.index import Index
from vaedist.data.format.shard_reader import ShardReader
from vaedist.data.loading.cache import fill_cache
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)

COUNT, HURT = 12, 5  # samples in the one shard, and the row that is damaged
NAME = f"'train-{HURT:05d}'"


@pytest.fixture(scope="module", params=["png", "npy"])
def sound(request, tmp_path_factory, pack) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pack(folder, {"train": [COUNT]}, codec=request.param)
    return folder


def places(index: Index) -> tuple[int, int, int]:
    """Where the hurt sample's image begins, where it ends, and where its tar entry's header begins."""
    columns = index.split("train").columns(0)
    start = int(columns.offset[HURT])
    header = (start // 512 - 1) * 512
    if index.info.codec == "npy":  # numpy's own header lies between
        raw = index.split("train").shards[0].tar.read_bytes()
        header = raw.rindex(b"train-00005.npy", 0, start)
    return start, start + int(columns.size[HURT]), header


def flip(data: bytearray, start: int, end: int, header: int) -> None:
    data[(start + end) // 2] ^= 0x10


def hole(data: bytearray, start: int, end: int, header: int) -> None:
    data[start + 10 : end] = bytes(end - start - 10)


def flip_header(data: bytearray, start: int, end: int, header: int) -> None:
    data[header + 130] ^= 1


def hole_over_header(data: bytearray, start: int, end: int, header: int) -> None:
    data[header : header + 512] = bytes(512)


def cut_in_image(data: bytearray, start: int, end: int, header: int) -> None:
    del data[start + 7 :]


def cut_in_header(data: bytearray, start: int, end: int, header: int) -> None:
    del data[header + 100 :]


def cut_at_member(data: bytearray, start: int, end: int, header: int) -> None:
    del data[header:]


def empty(data: bytearray, start: int, end: int, header: int) -> None:
    data.clear()


def longer(data: bytearray, start: int, end: int, header: int) -> None:
    data += b"more"


def flip_at_end(data: bytearray, start: int, end: int, header: int) -> None:
    data[-1] ^= 1


DAMAGE = {
    flip: NAME,
    hole: NAME,
    flip_header: NAME,
    hole_over_header: NAME,
    cut_in_image: NAME,
    cut_in_header: NAME,
    cut_at_member: NAME,
    empty: "'train-00000'",
    longer: f"'train-{COUNT - 1:05d}'",
    flip_at_end: f"'train-{COUNT - 1:05d}'",
    None: "'train-00000'",  # the shard is missing
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__ if d else "missing")
def test_damage_stops_every_reader_with_sample_shard_and_offset(sound, tmp_path, damage):
    folder = tmp_path / "hurt"
    shutil.copytree(sound, folder)
    index = Index.open(folder)
    tar = index.split("train").shards[0].tar
    if damage is None:
        tar.unlink()
    else:
        data = bytearray(tar.read_bytes())
        damage(data, *places(index))
        tar.write_bytes(data)
    says = rf"train-000000\.tar: sample {DAMAGE[damage]} at byte \d+: .*(copy the shard|--remove-samples)"

    for workers in (0, 2):
        stream = TrainingStream(index, "train", TrainingStreamConfig(batch_size=4, seed=0, workers=workers))
        with pytest.raises(DataError, match=says):
            list(itertools.islice(stream.batches(0), 3))
        with pytest.raises(DataError, match=says):
            list(EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=COUNT, workers=workers)))
    with pytest.raises(DataError, match=says):
        fill_cache(index, index.split("train"), memory_limit=2**30)
    # Read batch by batch, evaluation may meet it at another sample, but never misses it.
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'train-\d+' at byte \d+"):
        list(EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=1, workers=0)))


def test_the_offset_is_where_the_damage_is(sound, tmp_path):
    folder = tmp_path / "hurt"
    shutil.copytree(sound, folder)
    index = Index.open(folder)
    tar = index.split("train").shards[0].tar
    data = bytearray(tar.read_bytes())
    start, end, header = places(index)
    flip(data, start, end, header)
    tar.write_bytes(data)
    out = np.empty(index.shape, np.uint8)
    with pytest.raises(DataError, match=rf"at byte {start}: its {end - start} bytes changed"):
        ShardReader(index, index.split("train"), 0).decode(HURT, out)


def test_any_single_flipped_bit_is_noticed(sound, tmp_path):
    folder = tmp_path / "hurt"
    shutil.copytree(sound, folder)
    index = Index.open(folder)
    tar = index.split("train").shards[0].tar
    whole = tar.read_bytes()
    generator = np.random.Generator(np.random.PCG64(0))
    for place in generator.integers(0, len(whole), 150).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << int(generator.integers(8))
        tar.write_bytes(data)
        with pytest.raises(DataError, match=re.escape(str(tar))):
            list(EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=5, workers=0)))


def _with_one_sample(folder: Path, index: Index, data: bytes) -> Index:
    """`index` with a shard of one sample whose bytes are `data`, with correct checksums, as an external tar may be."""
    shard = index.split("train").shards[0]
    shard.tar.write_bytes(b"h" * 512 + data)
    pixels = pixel_digest(np.zeros((1, 8, 8), np.uint8))
    row = SampleRow("odd", 512, len(data), zlib.crc32(data), 0, "", pixels)
    digest = write_columns(shard.columns_path, shard.tar, [row])
    text = (folder / "index.json").read_text()
    text = text.replace(shard.columns_sha256, digest).replace(
        f'"bytes": {shard.bytes}', f'"bytes": {512 + len(data)}'
    )
    (folder / "index.json").write_text(text)
    return Index.open(folder)


def _png(mode: str, size: tuple[int, int], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    return file.getvalue()


def _bomb() -> bytes:
    """A png of 200 bytes that says it is 60,000 x 60,000."""
    data = bytearray(_png("L", (8, 8)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_png("L", (9, 8)), r"a 9x8 image of mode L, and the index says \(1, 8, 8\)"),
        (_png("RGB", (8, 8)), "a 8x8 image of mode RGB"),
        (_png("L", (8, 8), "BMP"), "does not decode"),
        (_png("L", (8, 8))[:-30], "does not decode"),
        (_bomb(), "DecompressionBomb|60000x60000"),
        (b"", "does not decode"),
    ],
    ids=["size", "mode", "format", "cut", "bomb", "empty"],
)
def test_an_unfit_image_is_refused_before_it_is_decoded(tmp_path, pack, data, says):
    index = _with_one_sample(tmp_path, pack(tmp_path, {"train": [1]}), data)
    with pytest.raises(DataError, match=rf"sample 'odd' at byte 512: .*({says})"):
        list(EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=1)))


def test_raw_bytes_of_another_length_are_refused(tmp_path, pack):
    index = _with_one_sample(tmp_path, pack(tmp_path, {"train": [1]}, codec="npy"), bytes(63))
    with pytest.raises(DataError, match=r"63 bytes are not a sample of shape \(1, 8, 8\)"):
        list(EvaluationStream(index, "train", EvaluationStreamConfig(batch_size=1)))
