"""Folders of image files.

| layout | split | class |
|---|---|---|
| `train_data/<class>/...`, `test_data/<class>/...`, also `train`, `val`, `test` | the folder | `<class>` |
| `train/...`, `test/...` without class folders | the folder | none |
| `<class>/...` | chosen by the packer | `<class>` |
| files only | chosen by the packer | none |

The split folders may lie one level below the input when they are all there is. The key is the path below the
input, made safe (`train_data_animal_cat1`), so that equal names in two classes or splits stay apart. Which
files are images is found out by decoding them, not by their names. Subjects come from `--subjects` only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.data import sources
from vaedist.data.format.image_files import Picture, read_picture
from vaedist.data.sources import FoundFile, Item, Problem, SourceSettings, folders, split_name, walk

OPTIONS = frozenset({"fit", "match"})


def recognizes(path: Path) -> int:
    return 1 if path.is_dir() and any(path.iterdir()) else 0


class FolderSource:
    def __init__(self, path: Path, settings: SourceSettings) -> None:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder")
        inner = folders(path)
        if len(inner) == 1 and any(split_name(one.name) for one in folders(inner[0])):
            path = inner[0]
        self._top = path
        self._match = settings.match
        self._limits = settings.limits

    def items(self) -> Iterator[Item | Problem]:
        inner = folders(self._top)
        splits = {one.name: split_name(one.name) for one in inner}
        if any(splits.values()):
            for one in inner:
                if splits[one.name] is None:
                    reason = "lies beside the split folders and is none (train, validate, test)"
                    yield Problem(one.name, reason)
                else:
                    yield from self._classes(one, splits[one.name])
            yield from self._loose(self._top, "lies beside the split folders")
        else:
            yield from self._classes(self._top, None)

    def _classes(self, folder: Path, split: str | None) -> Iterator[Item | Problem]:
        """The items of a folder that holds class folders, or of one that holds only files."""
        classes = folders(folder)
        for one in classes:
            there = False
            for found in walk(self._top, one):
                there = True
                yield from self._item(found, split, one.name)
            if not there:
                yield Problem(sources.relative_to(self._top, one), "is an empty class folder")
        if classes:
            yield from self._loose(folder, "lies beside the class folders and has no class")
            return
        for found in walk(self._top, folder):
            yield from self._item(found, split, None)

    def _item(
        self, found: FoundFile | Problem, split: str | None, label: str | None
    ) -> Iterator[Item | Problem]:
        if isinstance(found, Problem):
            yield found
        elif self._match is None or fnmatchcase(found.relative, self._match):
            if found.size == 0:
                yield Problem(found.relative, "is empty (0 bytes)")
                return
            shown = None if label is None else label.encode("utf-8", "backslashreplace").decode()
            key = sources.clean_key(os.path.splitext(found.relative)[0])
            yield Item(key, split, shown, "", found.relative, str(found.path), found.size)

    def _loose(self, folder: Path, reason: str) -> Iterator[Problem]:
        """Files that lie where only folders belong."""
        for found in walk(self._top, folder, deep=False):
            yield Problem(found.relative, reason) if isinstance(found, FoundFile) else found

    def load(self, item: Item) -> Picture:
        return read_picture(item.location, self._limits)


def open_source(path: Path, settings: SourceSettings) -> FolderSource:
    return FolderSource(path, settings)
