"""The preprocessed OASIS slices: `keras_png_slices_{train,validate,test}/case_NNN_slice_M.nii.png`.

The three folders lie in the input or one level below it. The key keeps case and slice (`case_001_slice_0`),
and the subject is the case, unless a subject map (`--subjects`) says which cases are scans of one patient.
The segmentations of the same archive (`keras_png_slices_seg_*`) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.data.format.image_files import Picture, read_picture
from vaedist.data.sources import Item, Problem, SourceSettings, folders, walk

OPTIONS = frozenset({"fit"})
SPLITS = {f"keras_png_slices_{split}": split for split in ("train", "validate", "test")}
_NAME = re.compile(r"case_(\d+)_slice_(\d+)(\.nii)?\.png")


def recognizes(path: Path) -> int:
    return 10 if _top(path) is not None else 0


def _top(path: Path) -> Path | None:
    """The folder that holds the split folders: `path` or one directly in it."""
    candidates = [path, *folders(path)]
    return next((path for path in candidates if any((path / name).is_dir() for name in SPLITS)), None)


class OasisSource:
    def __init__(self, top: Path, settings: SourceSettings) -> None:
        self._top = top
        self._limits = settings.limits

    def items(self) -> Iterator[Item | Problem]:
        for folder, split in SPLITS.items():
            if not (self._top / folder).is_dir():
                continue
            for found in walk(self._top, self._top / folder):
                if isinstance(found, Problem):
                    yield found
                    continue
                name = _NAME.fullmatch(found.path.name)
                if name is None:
                    yield Problem(found.relative, "is not named case_NNN_slice_M.nii.png")
                    continue
                case = f"case_{name[1]}"
                key = f"{case}_slice_{name[2]}"
                yield Item(key, split, None, case, found.relative, str(found.path), found.size)

    def load(self, item: Item) -> Picture:
        return read_picture(item.location, self._limits)


def open_source(path: Path, settings: SourceSettings) -> OasisSource:
    top = _top(path)
    if top is None:
        raise UserError(
            f"{path} has no folder keras_png_slices_train, _validate or _test, nor has a folder in it: give the one "
            "that holds them, or leave --source away"
        )
    return OasisSource(top, settings)
