"""The packed data that a search runs on: given, named by the space, or built-in phantom images."""

from __future__ import annotations

import os
from pathlib import Path

from vaedist.config.settings import expand
from vaedist.core.errors import UserError
from vaedist.core.terminal import ProgressBars
from vaedist.data.format.index import INDEX_NAME, Index
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings
from vaedist.tuning.space import Space

PHANTOM_COUNT = {"train": 1024, "validate": 128, "test": 128}


def open_search_data(space: Space, given: str | None, folder: Path, *, quiet: bool) -> Index:
    """The packed data to search on.

    Args:
        space: Names the data where nobody else does.
        given: A packed folder, the word `phantom`, or None: $VAEDIST_DATA, else what the space names.
        folder: Of the search; phantom images are packed into it once.
        quiet: No progress bar.

    Raises:
        UserError: the data are not there; the message names the command that makes them.
    """
    if given == "phantom":
        return _phantom(folder / "phantom", space.data.phantom, quiet=quiet)
    exported = os.environ.get("VAEDIST_DATA")
    path = expand(given or exported or space.data.path, "--data")
    if not (path / INDEX_NAME).exists():
        origin = "--data" if given else "$VAEDIST_DATA" if exported else f"space {space.name!r}"
        raise UserError(
            f"there are no shards in {path} ({origin}): make them with `{space.data.make}` and say where with --data, "
            "or try the search on built-in images with --data phantom"
        )
    return Index.open(path)


def _phantom(folder: Path, size: int, *, quiet: bool) -> Index:
    if not (folder / INDEX_NAME).exists():
        settings = SourceSettings(size=size, count=PHANTOM_COUNT)
        packing = PackingConfig(input="phantom", out=folder, size=size, settings=settings)
        with ProgressBars(quiet=quiet) as bars:
            pack(packing, bars.callback("packing"))
    return Index.open(folder)
