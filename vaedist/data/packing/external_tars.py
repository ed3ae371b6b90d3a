"""Tars that other tools wrote: an index makes them a packed folder, and the tars are not changed.

A sample is what it is for WebDataset: the members that share a path up to the first dot of the file's name.
Its image is `png` or `npy`, its class number `cls` (or `label` in `json`), its class name and subject `class` and
`subject` in `json`. The tar's name says the split: `train`, `val`, `test` and similar words anywhere in it;
other tars are all `train`.

The stream reads pixels in place, so an image must already be what the index can point at: an 8-bit gray or
RGB PNG, or an npy of uint8 (H, W) or (H, W, 3) in C order, all of one size. Everything else (JPEG, 16 bits, a
palette) has to be unpacked and packed anew, and the message says so.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaedist.core.errors import UserError
from vaedist.data.format.columns import SampleRow
from vaedist.data.format.identity import pixel_digest
from vaedist.data.format.image_files import BadImage, Limits
from vaedist.data.format.index import INDEX_NAME, DatasetInfo, Index
from vaedist.data.format.sample_codec import channels_first, decode_sample
from vaedist.data.format.split import Shard
from vaedist.data.packing.packing_plan import split_sort_key
from vaedist.data.packing.publish import index_shard, publish
from vaedist.data.packing.rejections import Rejections
from vaedist.data.packing.subjects import keep_subjects_in_one_split
from vaedist.data.sources import Item, clean_key, natural_key, split_name

CODECS = ("png", "npy")
_OTHERS = ("jpg", "jpeg", "webp", "ppm", "pgm", "tif", "tiff", "bmp", "gif", "jp2")
_LABELS = 1_000_000
_NOTE = 2**20  # bytes of a json or cls member that are read


class _TarSample(NamedTuple):
    """One sample of a tar."""

    item: Item
    row: SampleRow
    shape: tuple[int, ...]
    codec: str


def index_tars(
    folder: Path,
    *,
    skip_bad: bool = False,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Index, int]:
    """Write columns, contact sheets and `index.json` for the tars in a folder, or one level below it.

    Args:
        folder: Where they lie; only the tars are left as they are.
        skip_bad: Leave out samples that cannot be used, listed in `rejected.jsonl`.
        limits: On one image.
        progress: Called with (tars read, tars in all).

    Returns:
        The packed folder, and how many samples were left out.

    Raises:
        UserError: no tars, a damaged or compressed one, a sample that cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that holds the tars")
    if (folder / INDEX_NAME).exists():
        raise UserError(f"{folder} has an {INDEX_NAME} already: remove it to index the tars anew")
    tars = sorted((*folder.glob("*.tar"), *folder.glob("*/*.tar")), key=lambda path: natural_key(str(path)))
    if not tars:
        ends = ("gz", "bz2", "xz", "zst")
        packed = next((path.name for end in ends for path in folder.glob(f"*.tar.{end}")), None)
        advice = "give the folder that holds the tars"
        if packed:
            advice = f"{packed} is compressed, and samples are read by offset; unpack it first"
        raise UserError(f"{folder} holds no *.tar: {advice}")
    rejections = Rejections(skip_bad)
    reader = _TarReader(folder, rejections, limits or Limits())
    samples: dict[Path, list[_TarSample]] = {}
    for number, tar in enumerate(tars, start=1):
        samples[tar] = list(reader.read(tar))
        if progress:
            progress(number, len(tars))
    _reject_misfits(samples, rejections)
    items = [sample.item for several in samples.values() for sample in several]
    keys = {item.key for item in keep_subjects_in_one_split(items, rejections)}
    samples = {tar: [one for one in several if one.item.key in keys] for tar, several in samples.items()}
    kept = [sample for several in samples.values() for sample in several]
    problems = rejections.problems
    if not kept:
        reason = f": {problems[0].origin} {problems[0].reason}" if problems else ""
        raise UserError(f"the tars in {folder} hold no image that can be used{reason}")

    classes = tuple(reader.classes.get(i, str(i)) for i in range(max(one.row.label for one in kept) + 1))
    splits: dict[str, list[Shard]] = defaultdict(list)
    for tar, several in samples.items():
        if several:
            shard = index_shard(tar, tar.with_suffix(".cols"), [sample.row for sample in several])
            splits[several[0].item.split or "train"].append(shard)
    rejections.write(folder)
    source = {"source": "tars", "rejected": len(problems)}
    info = DatasetInfo(kept[0].shape, kept[0].codec, classes, source)
    index = publish(folder, {name: splits[name] for name in sorted(splits, key=split_sort_key)}, info)
    return index, len(problems)


def split_of(path: str) -> str:
    """The split that a tar's path names (`imagenet-val-0001.tar` is `validate`); `train` where it names none."""
    words = re.split(r"[^A-Za-z]+", path.removesuffix(".tar"))
    return next((split for word in words if word and (split := split_name(word))), "train")


class _TarReader:
    """Reads the samples of the tars in one folder.

    Attributes:
        classes: Class names by class number, as far as json members give them.
    """

    def __init__(self, folder: Path, rejections: Rejections, limits: Limits) -> None:
        self.folder, self.rejections, self.limits = folder, rejections, limits
        self.classes: dict[int, str] = {}

    def read(self, tar: Path) -> Iterator[_TarSample]:
        """The usable samples of one tar, in its order."""
        shown = tar.relative_to(self.folder).as_posix()
        with open(tar, "rb") as file:
            for key, members in _grouped_members(tar, shown):
                try:
                    yield self._read_sample(file, shown, key, members)
                except BadImage as error:
                    self.rejections.add(f"{shown}/{key}", str(error))

    def _read_sample(
        self, file: io.BufferedReader, shown: str, key: str, members: dict[str, tarfile.TarInfo]
    ) -> _TarSample:
        codec = next((one for one in CODECS if one in members), None)
        if codec is None:
            other = next((one for one in _OTHERS if one in members), None)
            only = f", only {other}" if other else ""
            raise BadImage(f"has no png or npy member{only}: unpack the tars and pack the folder")
        member = members[codec]
        self.limits.check_bytes(member.size)
        file.seek(member.offset_data)
        content = file.read(member.size)
        skip, shape = (_shape_png if codec == "png" else _shape_npy)(content, self.limits)
        data = memoryview(content)[skip:]
        try:
            picture = decode_sample(data, shape, codec)
        except ValueError as error:
            raise BadImage(f"is damaged: {error}") from None
        note = _note(file, members.get("json"))
        label = _label(file, members.get("cls"), note)
        if label >= 0 and isinstance(note.get("class"), str):
            self.classes.setdefault(label, note["class"])
        subject = note.get("subject")
        subject = subject if isinstance(subject, str) else ""
        item = Item(clean_key(key), split_of(shown), None, subject, f"{shown}/{key}")
        offset, digest = member.offset_data + skip, pixel_digest(channels_first(picture))
        row = SampleRow(item.key, offset, len(data), zlib.crc32(data), label, subject, digest)
        return _TarSample(item, row, shape, codec)


def _grouped_members(tar: Path, shown: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members grouped as WebDataset groups them: neighbors with one path up to the first dot of the name."""
    size = tar.stat().st_size

    def named_members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for member in archive:
            if member.offset_data + (member.size if member.isfile() else 0) > size:
                raise tarfile.ReadError("it ends in the middle of a member")
            named = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name, re.DOTALL)
            if named and member.isfile() and not member.issparse():
                yield named[1], named[2].lower(), member

    try:
        with tarfile.open(tar, "r:") as archive:
            for key, members in groupby(named_members(), key=itemgetter(0)):
                yield key, {extension: member for _, extension, member in members}
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{shown} is damaged or not an uncompressed tar: {error}") from None


def _shape_png(data: bytes, limits: Limits) -> tuple[int, tuple[int, int, int]]:
    """Bytes to skip (none) and (C, H, W) of a PNG, from its header alone."""
    if len(data) < 26 or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise BadImage("is not a PNG" if data else "is empty (0 bytes)")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    depth, color = data[24], data[25]
    limits.check_pixels(width, height)
    if depth != 8 or color not in (0, 2):
        kinds = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGBA"}
        raise BadImage(
            f"is a {depth}-bit {kinds.get(color, 'unknown')} PNG, and only 8-bit gray or RGB can be read in place: "
            "unpack the tars and pack the folder"
        )
    return 0, (1 if color == 0 else 3, height, width)


def _shape_npy(data: bytes, limits: Limits) -> tuple[int, tuple[int, int, int]]:
    """Bytes to skip and (C, H, W) of an npy file; nothing in it is unpickled."""
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        headers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran, kind = headers[version != (1, 0)](buffer)
    except (ValueError, EOFError, SyntaxError) as error:
        raise BadImage(f"is not an npy file: {error}") from None
    if kind != np.uint8 or (fortran and len(shape) > 1):
        raise BadImage(f"is an npy of {kind}{' in Fortran order' if fortran else ''}, not uint8 in C order")
    if len(shape) == 3 and 1 in (shape[0], shape[2]):
        shape = tuple(shape[1:] if shape[0] == 1 else shape[:2])
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or min(shape) < 1:
        raise BadImage(f"is an npy of shape {shape}, not (H, W) or (H, W, 3)")
    limits.check_pixels(shape[1], shape[0])
    skip = len(data) - len(buffer.read())
    if len(data) - skip != int(np.prod(shape)):
        raise BadImage(f"is truncated: {len(data) - skip} bytes for an array of shape {shape}")
    return skip, (3 if len(shape) == 3 else 1, shape[0], shape[1])


def _note(file: io.BufferedReader, member: tarfile.TarInfo | None) -> dict[str, Any]:
    """The json member, if it is a small object."""
    if member is None or member.size > _NOTE:
        return {}
    file.seek(member.offset_data)
    try:
        content = json.loads(file.read(member.size))
    except (ValueError, RecursionError):
        raise BadImage("has a json member that is not JSON") from None
    return content if isinstance(content, dict) else {}


def _label(file: io.BufferedReader, member: tarfile.TarInfo | None, note: dict[str, Any]) -> int:
    """The class number; -1: none."""
    value: Any = note.get("label")
    if member is not None:
        file.seek(member.offset_data)
        value = file.read(min(member.size, 32)).strip()
    try:
        label = -1 if value is None else int(value)
    except (TypeError, ValueError):
        raise BadImage(f"has a class that is not a number: {value!r}") from None
    if not -1 <= label < _LABELS:
        raise BadImage(f"has the class number {label}, outside 0..{_LABELS - 1:,}")
    return label


def _reject_misfits(samples: dict[Path, list[_TarSample]], rejections: Rejections) -> None:
    """Reject samples whose codec, size or key does not fit those before; `samples` is changed."""
    first = next((sample for several in samples.values() for sample in several), None)
    origins: dict[str, str] = {}
    for tar, several in samples.items():
        samples[tar] = []
        for sample in several:
            assert first is not None
            key, origin = sample.item.key, sample.item.origin
            if (sample.codec, sample.shape) != (first.codec, first.shape):
                here, there = (f"{of.codec} of (C, H, W) {of.shape}" for of in (sample, first))
                rejections.add(origin, f"is a {here} and the first sample a {there}")
            elif key in origins:
                rejections.add(origin, f"has the same key as {origins[key]} ({key})")
            else:
                origins[key] = origin
                samples[tar].append(sample)
