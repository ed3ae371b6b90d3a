"""Volumes: NIfTI (`.nii`, `.nii.gz`) and the Analyze pairs (`.hdr` + `.img`) of raw OASIS discs, read by nibabel.

A volume is turned to the closest axes of patient space (right, front, up), cut into axial slices (`--axis` cuts
along another), and shown the way it is read: front up, left hand on the left, pixels made square where the
voxels are not. Slices with almost nothing in them (less than 1 % of the pixels above a tenth of full scale) are
not packed.

Intensities are scaled once per volume, never per slice: the 1st percentile of all voxels becomes 0 and the
99.5th percentile of what lies above it becomes 255, so that slices of one head stay comparable.

The subject is `OAS1_0001` of an OASIS name, `sub-01` of a BIDS name, else the folder of a patient where volumes lie in
several (`patient7/T1.nii`), else the file's name; the splits are drawn by subject, or are the folders `train`,
`validate`, `test` directly below the input. On raw OASIS discs, where
every scan comes in many versions, only the masked atlas-space ones (`*_t88_masked_gfc.hdr`) are taken, unless
`--match` says which.

A volume is read once, when the set is listed, and kept as bytes in the private workspace until packing ends:
slices are packed in random order, and unpacking a whole volume for each would take hours.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError
from vaedist.core.files import replace_file
from vaedist.data.format.image_files import BadImage, Limits, Picture
from vaedist.data.format.resize import resize
from vaedist.data.sources import FoundFile, Item, Problem, SourceSettings, clean_key, split_name, walk

OPTIONS = frozenset({"fit", "match", "slices", "axis"})
OASIS_DISC = "*_t88_masked_gfc.hdr"
_SUFFIXES = (".nii", ".nii.gz", ".hdr")
_NAMED = re.compile(r"OAS\d_\d+|(?<![A-Za-z0-9])sub-[A-Za-z0-9]+")
_LARGEST = 2**31  # voxels
_LISTED = 2000  # files looked at before a folder is said to hold no volumes


def recognizes(path: Path) -> int:
    if path.is_file():
        return 10 if path.name.endswith(_SUFFIXES) else 0
    files = (found for found in islice(walk(path), _LISTED) if isinstance(found, FoundFile))
    return 5 if any(file.path.name.endswith(_SUFFIXES) for file in files) else 0


def read_volume(path: Path, axis: int, limits: Limits) -> NDArray[np.uint8]:
    """Slices along `axis` as they are shown, (slices, H, W) uint8.

    Raises:
        BadImage: not a volume, damaged, not three-dimensional, constant, or larger than the limits.
    """
    import nibabel

    try:
        image: Any = nibabel.load(path)
        shape = tuple(int(side) for side in image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3 or min(shape) < 1:
            raise BadImage(f"has the shape {shape}: a volume has three axes")
        voxels = int(np.prod(shape, dtype=np.float64))
        kind = np.dtype(image.get_data_dtype())
        if kind.names or kind.kind not in "uif":
            raise BadImage(f"has voxels of type {kind}: only real numbers are intensities")
        if voxels > _LARGEST or voxels * kind.itemsize > limits.bytes * 16:
            raise BadImage(f"announces {voxels:,} voxels, more than is allowed (--max-bytes)")
        turned = nibabel.as_closest_canonical(image)
        kept = turned.shape[:3] if len(turned.shape) >= 3 else shape
        data = np.asarray(turned.dataobj, np.float32).reshape(kept)
        zooms = [float(zoom) or 1.0 for zoom in turned.header.get_zooms()[:3]]
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("needs more memory to read than there is") from None
    except Exception as error:  # noqa: BLE001 - nibabel and zlib raise many kinds on damaged files
        raise BadImage(f"cannot be read as a volume: {str(error) or type(error).__name__}") from None
    scaled = normalize(data)
    # Rows run down (from the far end of the second axis that is left), columns to the right.
    rest = [other for other in range(3) if other != axis]
    slices = scaled.transpose(axis, rest[1], rest[0])[:, ::-1]
    tall, wide = abs(zooms[rest[1]]), abs(zooms[rest[0]])
    height, width = slices.shape[1:]
    if abs(tall / wide - 1) > 0.01:
        finer = min(tall, wide)
        height, width = round(height * tall / finer), round(width * wide / finer)
        if height * width > limits.pixels:
            made = f"slices of {width} x {height} pixels"
            raise BadImage(f"has voxels of {tall:g} x {wide:g} mm, which make {made}")
        return np.stack([resize(cut, height, width) for cut in slices])
    return np.ascontiguousarray(slices)


def normalize(data: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Intensities of one volume on 0..255 by the module's rule; what is not finite counts as the lowest.

    Raises:
        BadImage: all voxels are equal.
    """
    finite = np.isfinite(data)
    if not finite.all():
        data = np.where(finite, data, data[finite].min() if finite.any() else 0)
    low = float(np.percentile(data, 1))
    above = data[data > low]
    high = float(np.percentile(above, 99.5)) if above.size else low
    if not high > low:
        raise BadImage("is constant: it shows nothing")
    return np.rint(np.clip((data - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def subjects_of(paths: Sequence[str]) -> dict[str, str]:
    """The subject of each volume, from the paths below the input.

    Where no name says it, volumes of one folder are of one patient: if `p7/p7_T1.nii` and `p7/p7_T2.nii` were two
    subjects, one head could be in training and test. Of `T1/p7.nii` and `T2/p7.nii` the files' names are the more
    numerous, so they are the patients.
    """
    named = {path: _NAMED.search(path) for path in paths}
    subjects = {path: found[0] for path, found in named.items() if found}
    rest = {path: path.split("/") for path in paths if path not in subjects}
    for path, parts in rest.items():
        if len(parts) > 1 and split_name(parts[0]) is not None:
            rest[path] = parts[1:]
    # Folders that all of them share say nothing.
    levels = zip(*(parts[:-1] for parts in rest.values()), strict=False)
    depth = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    folders = {path: "".join(parts[depth:-1][:1]) for path, parts in rest.items()}
    stems = {path: _stem(parts[-1]) for path, parts in rest.items()}
    several, names = set(folders.values()), set(stems.values())
    apart = len(names) == len(rest) or len(several) >= len(names)
    by_folder = "" not in several and len(several) > 1 and apart
    return subjects | (folders if by_folder else stems)


def _stem(name: str) -> str:
    return next((name[: -len(suffix)] for suffix in (".nii.gz", *_SUFFIXES) if name.endswith(suffix)), name)


class VolumeSource:
    def __init__(self, path: Path, settings: SourceSettings, spool: Path) -> None:
        self._path, self._match, self._limits = path, settings.match, settings.limits
        self._slices = settings.slices or (0.0, 1.0)
        self._axis = 2 if settings.axis is None else settings.axis
        self._spool = spool

    def items(self) -> Iterator[Item | Problem]:
        files: list[FoundFile] = []
        for found in walk(self._path):
            if isinstance(found, Problem):
                yield found
            elif found.path.name.endswith(_SUFFIXES):
                files.append(found)
        disc = [found for found in files if fnmatchcase(found.relative, OASIS_DISC)]
        if self._match is not None:
            files = [found for found in files if fnmatchcase(found.relative, self._match)]
        elif disc:
            files = disc
        stems = {_stem(found.path.name) for found in files}
        subjects = subjects_of([found.relative for found in files])
        for found in files:
            # The file's name makes the shorter key, where it is enough to tell the volumes apart.
            name = _stem(found.path.name if len(stems) == len(files) else found.relative)
            try:
                yield from self._volume(found, clean_key(name), subjects[found.relative])
            except BadImage as error:
                yield Problem(found.relative, str(error))

    def _volume(self, found: FoundFile, key: str, subject: str) -> Iterator[Item]:
        if found.size == 0:
            raise BadImage("is empty (0 bytes)")
        state = found.path.stat()
        identity = f"{found.relative}\0{found.size}\0{state.st_mtime_ns}\0{self._axis}"
        kept = self._spool / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npy"
        if not kept.exists():
            buffer = io.BytesIO()
            np.save(buffer, read_volume(found.path, self._axis, self._limits))
            replace_file(kept, buffer.getvalue())
        slices = np.load(kept, mmap_mode="r", allow_pickle=False)
        shows_something = (slices > 25).mean(axis=(1, 2)) >= 0.01
        first, last = (round(share * len(slices)) for share in self._slices)
        numbers = [i for i in range(first, last) if shows_something[i]]
        if not numbers:
            raise BadImage("has no slice with anything in it")
        split = split_name(found.relative.split("/")[0]) if "/" in found.relative else None
        for i in numbers:
            origin, location = f"{found.relative}[{i}]", (str(kept), i)
            yield Item(f"{key}_slice_{i}", split, None, subject, origin, location, found.size)

    def load(self, item: Item) -> Picture:
        path, number = item.location
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[number])


def open_source(path: Path, settings: SourceSettings) -> VolumeSource:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    assert settings.workspace is not None, "volumes need a workspace"
    spool = settings.workspace / "volumes"
    os.makedirs(spool, mode=0o700, exist_ok=True)
    return VolumeSource(path, settings, spool)
