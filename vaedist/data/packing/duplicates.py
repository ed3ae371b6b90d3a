"""Images that stand in more than one split: exact duplicates between splits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.data.format.index import Index
from vaedist.data.format.split import Split


def count_duplicates(index: Index) -> int:
    """How many images of the other splits have exactly the pixels of an image of `train`."""
    if "train" not in index.splits:
        return 0
    known = np.unique(_digests(index.splits["train"]))
    others = [_digests(split) for name, split in index.splits.items() if name != "train"]
    return int(sum(np.isin(digests, known).sum() for digests in others))


def _digests(split: Split) -> NDArray[Any]:
    return np.concatenate([columns.pixels for columns in split.all_columns()]).view("S32")[:, 0]
