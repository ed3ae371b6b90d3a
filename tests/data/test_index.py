from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from zlib import crc32

import numpy as np
import pytest

from vaedist.config.job import Spec
from vaedist.core.errors import DataError, UserError
from vaedist.data.format.columns import Columns, SampleRow, write_columns
from vaedist.data.format.identity import data_identity, sample_digests
from vaedist.data.format.index import Index


def test_what_was_written_is_read(tmp_path, pack):
    index = pack(tmp_path, {"train": [5, 3], "test": [2]}, shape=(3, 4, 6))
    assert index.spec == Spec(3, (4, 6), 3) and index.classes == ("a", "b", "c") and index.info.codec == "png"
    train = index.split("train")
    assert train.count == 8 and train.counts.tolist() == [5, 3] and train.starts.tolist() == [0, 5, 8]
    assert [train.locate(n) for n in (0, 4, 5, 7)] == [(0, 0), (0, 4), (1, 0), (1, 2)]
    assert [train.key(n) for n in (0, 7)] == ["train-00000", "train-00007"]
    assert [train.subject(n) for n in (3, 4, 7)] == ["subject 0", "subject 1", "subject 1"]
    assert [train.label(n) for n in range(4)] == [0, 1, 2, 0]
    assert index.split("test").columns(0).keys[:] == ["test-00000", "test-00001"]
    assert data_identity(sample_digests(index.splits.values()), index.shape) == index.identity


def test_columns_are_laid_out_as_documented(tmp_path):
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"..abc.defg...")
    rows = [
        SampleRow("k", 2, 3, crc32(b"abc"), -1, "s", b"p" * 32),
        SampleRow("øl", 6, 4, crc32(b"defg"), 7, "s", b"q" * 32),
    ]
    write_columns(tmp_path / "x.cols", tar, rows)
    wanted = b"vaecols1" + struct.pack("<4Q", 2, 1, 4, 1)
    wanted += struct.pack("<2Q2Q2q2Q1Q", 2, 6, 3, 4, -1, 7, 1, 4, 1)
    wanted += struct.pack("<2I", crc32(b"abc"), crc32(b"defg"))
    wanted += struct.pack("<3I", crc32(b".."), crc32(b"."), crc32(b"...")) + struct.pack("<2I", 0, 0)
    wanted += b"p" * 32 + b"q" * 32 + "køl".encode() + b"s"
    assert (tmp_path / "x.cols").read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.cols", "x.tar"], (
        "no temporary file is left"
    )


def test_a_tar_that_was_not_written_as_it_should_be_gets_no_columns(tmp_path):
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"..abc")
    with pytest.raises(DataError, match=r"x\.tar: sample 'k' at byte 2"):
        write_columns(tmp_path / "x.cols", tar, [SampleRow("k", 2, 3, 1, 0, "", b"p" * 32)])
    assert not (tmp_path / "x.cols").exists()


@pytest.mark.parametrize("cut", [0, 7, 39, 100, -1])
def test_cut_columns_are_refused(tmp_path, pack, cut):
    index = pack(tmp_path, {"train": [4]})
    path = index.split("train").shards[0].columns_path
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train-000000\.cols.*SHA-256"):
        index.split("train").columns(0)
    with pytest.raises(DataError, match="not a sound columns file"):
        Columns.read(path)


def test_changed_or_missing_columns_are_refused(tmp_path, pack):
    index = pack(tmp_path, {"train": [4]})
    path = index.split("train").shards[0].columns_path
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000000\.cols.*SHA-256"):
        index.split("train").columns(0)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-000000\.cols"):
        index.split("train").columns(0)


def test_identity_sees_content_and_nothing_else(tmp_path, pack):
    plain = pack(tmp_path / "a", {"train": [6, 2]})
    again = pack(tmp_path / "b", {"train": [1, 3, 4]}, codec="npy")
    assert plain.identity == again.identity, "neither shards nor the codec count"
    rows = list(sample_digests(plain.splits.values()))
    assert data_identity(reversed(rows), plain.shape) == plain.identity, "nor does the order"
    split, key, label, digest = rows[3]
    changes = [(split + "x", key, label, digest), (split, key + "x", label, digest), (split, key, 5, digest)]
    changes.append((split, key, label, bytes(32)))
    for change in changes:
        assert data_identity([*rows[:3], change, *rows[4:]], plain.shape) != plain.identity
    assert data_identity(rows[1:], plain.shape) != plain.identity
    assert data_identity(rows, (1, 4, 16)) != plain.identity


def test_writing_is_deterministic(tmp_path, pack):
    for name in ("a", "b"):
        pack(tmp_path / name, {"train": [3, 2]})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_no_folder_and_no_index_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*vaedist-shard"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no index\.json.*vaedist-shard"):
        Index.open(tmp_path)


def test_unknown_and_empty_splits_are_named(tmp_path, pack):
    index = pack(tmp_path, {"train": [2], "validate": []})
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        index.split("trian")
    with pytest.raises(UserError, match=r"'validate'.*is empty"):
        index.split("validate")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=2), "format 2.*install a newer vaedist"),
        (lambda c: c.pop("format"), "'format' is missing"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c["splits"]["train"].update(count=3), "do not add up"),
        (lambda c: c["splits"]["train"]["shards"][0].update(tar="../x.tar"), "not a plain path inside"),
        (lambda c: c["splits"]["train"]["shards"][0].update(tar="/etc/passwd"), "not a plain path inside"),
        (lambda c: c["splits"]["train"]["shards"][0].update(columns="a/./b"), "not a plain path inside"),
        (lambda c: c["fields"][0].update(shape=[1, 10**9, 10**9]), "not a sensible"),
        (lambda c: c["fields"][0].update(codec="pickle"), "png"),
        (lambda c: c["fields"].pop(0), "one field `image`"),
        (lambda c: c["splits"]["train"]["shards"][0].update(count=-4), "greater than or equal to 1"),
    ],
)
def test_a_strange_index_is_refused_in_one_sentence(tmp_path, pack, change, says):
    pack(tmp_path, {"train": [2]})
    content = json.loads((tmp_path / "index.json").read_text())
    change(content)
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        Index.open(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_an_index_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(UserError, match=r"index\.json"):
        Index.open(tmp_path)


def test_columns_that_belong_to_another_tar_are_refused(tmp_path, pack):
    pack(tmp_path, {"train": [4]})
    content = json.loads((tmp_path / "index.json").read_text())
    content["splits"]["train"]["shards"][0]["bytes"] = 600
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"does not fit train-000000\.tar"):
        Index.open(tmp_path).split("train").columns(0)


_STRANGER = """
import hashlib, json, sys, webdataset
for codec, decode, *tars in json.loads(sys.argv[1]):
    for row in webdataset.WebDataset(tars, shardshuffle=False).decode(decode):
        digest = hashlib.sha256(row[codec].tobytes()).hexdigest()
        print(json.dumps([row["__key__"], row["cls"], row["json"], digest]))
"""  # in its own process: webdataset draws from the global generators and leaves files open


def test_webdataset_reads_the_tars(tmp_path, pack, expected):
    asked, wanted = [], []
    for codec, shape in (("png", (1, 8, 8)), ("png", (3, 5, 7)), ("npy", (1, 8, 8))):
        split = pack(tmp_path / f"{codec}{shape[0]}", {"train": [5, 3]}, codec=codec, shape=shape).split(
            "train"
        )
        asked.append([codec, "rgb8" if shape[0] == 3 else "l8", *(str(shard.tar) for shard in split.shards)])
        stored = expected("train", range(8), shape).transpose(0, 2, 3, 1)
        for n, image in enumerate(stored):
            digest = hashlib.sha256(np.ascontiguousarray(image)).hexdigest()
            wanted.append([split.key(n), n % 3, {"n": n}, digest])
    command = [sys.executable, "-W", "ignore", "-c", _STRANGER, json.dumps(asked)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert [json.loads(line) for line in told.splitlines()] == wanted
