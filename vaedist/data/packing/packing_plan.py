"""What will be packed, decided before anything is written: splits, classes, order, shards.

Everything here is a pure function of the source's listing and the settings, so a run that was killed makes the
same plan again and continues with the first shard that is missing.

Where the packer chooses splits, it draws whole subjects; images without a subject are drawn one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from vaedist.core.errors import UserError
from vaedist.data.packing.rejections import Rejections
from vaedist.data.sources import Item, Problem, natural_key

PackingOrder = Literal["random", "source"]
SHARD_BYTES = 64 * 2**20
_MEMBER_BYTES = 4096  # at most: three tar headers, padding, the label, a short json
_SPLIT_ORDER = {"train": 0, "validate": 1, "test": 2}


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: its name without suffix, and the items in it, in order."""

    name: str
    split: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class PackingPlan:
    shards: tuple[PlannedShard, ...]
    classes: tuple[str, ...]
    digest: str
    """Hash of the settings and of everything listed: two equal digests pack the same bytes."""


def usable_items(listing: Iterable[Item | Problem], rejections: Rejections) -> list[Item]:
    """The listed items with unique keys; problems and repeated keys are rejected."""
    kept: dict[str, Item] = {}
    for item in listing:
        if isinstance(item, Problem):
            rejections.add(item.origin, item.reason)
        elif item.key in kept:
            rejections.add(item.origin, f"has the same key as {kept[item.key].origin} ({item.key})")
        else:
            kept[item.key] = item
    return list(kept.values())


def choose_splits(
    items: Sequence[Item], validation: float | None, test: float | None, seed: int
) -> list[Item]:
    """Give every item a split.

    Args:
        items: From the source; those without a split, or in `train` where there is no `validate`, are shared out.
        validation: Share that becomes `validate`; None: 0.1 where the source has no such split.
        test: Share that becomes `test`; None: 0.

    Raises:
        UserError: a share was asked for and the source has that split itself, or there are too few subjects.
    """
    own = {item.split for item in items if item.split is not None}
    for name, share in (("validate", validation), ("test", test)):
        if share is not None and name in own:
            option = "--validation-fraction" if name == "validate" else "--test-fraction"
            raise UserError(f"the source has a split {name!r} of its own, so {option} has no meaning here")
    shares = {
        "test": test or 0.0,
        "validate": (0.0 if "validate" in own else 0.1) if validation is None else validation,
    }
    free = [i for i, item in enumerate(items) if item.split in (None, "train")]
    groups: dict[str, list[int]] = defaultdict(list)
    for i in free:
        groups[f"subject {items[i].subject}" if items[i].subject else f"image {items[i].key}"].append(i)
    names = sorted(groups)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    queue = [groups[names[i]] for i in order]
    split_of = dict.fromkeys(free, "train")
    for name, share in shares.items():
        wanted, taken = round(share * len(free)), 0
        if share > 0 and validation is None and len(queue) < 2:
            continue  # one image or one patient: nothing can be held out, and it was not asked for
        while share > 0 and (taken < wanted or taken == 0):
            if len(queue) < 2:
                raise UserError(
                    f"{share:g} of {len(free)} images cannot become {name!r}: there are {len(names)} subjects in "
                    "all, and some have to stay in train; hold a smaller share apart"
                )
            group = queue.pop()
            taken += len(group)
            split_of.update(dict.fromkeys(group, name))
    return [replace(item, split=split_of.get(i, item.split)) for i, item in enumerate(items)]


def split_sort_key(split: str) -> tuple[int, str]:
    """Sort key: train, validate, test, then the others by name."""
    return _SPLIT_ORDER.get(split, 3), split


def samples_per_shard(pixels: int) -> int:
    """How many samples of `pixels` bytes keep a shard within 64 MB, whatever their content compresses to."""
    return max(1, SHARD_BYTES // (pixels + pixels // 64 + _MEMBER_BYTES))


def make_plan(
    items: Sequence[Item], *, per_shard: int, order: PackingOrder, seed: int, settings: Mapping[str, Any]
) -> PackingPlan:
    """Cut the items of every split into shards, in a seeded random order or the source's."""
    classes = tuple(sorted({item.label for item in items if item.label is not None}, key=natural_key))
    by_split: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_split[item.split or "train"].append(item)
    shards = []
    for split in sorted(by_split, key=split_sort_key):
        rows = by_split[split]
        if order == "random":
            identity = hashlib.blake2b(f"pack\x1f{seed}\x1f{split}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(identity, "little")))
            rows = [rows[i] for i in generator.permutation(len(rows))]
        for number, start in enumerate(range(0, len(rows), per_shard)):
            name = f"{split}-{number:06d}"
            shards.append(PlannedShard(name, split, tuple(rows[start : start + per_shard])))
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in items:
        listed = (item.key, item.split, item.label, item.subject, item.origin, item.size)
        text.update(json.dumps(listed).encode())
    return PackingPlan(tuple(shards), classes, text.hexdigest())
