"""What will be packed, decided before anything is written: splits, classes, order, shards.

Everything here is a pure function of the source's listing and the settings, so a run that was killed makes the
same plan again and goes on with the first shard that is missing.

Patients never cross splits. Where the source has splits of its own and a subject occurs in two of them, that is
an error (with `--skip-bad` the subject stays where it has most images, and its others are left out). Where the
packer chooses, it draws whole subjects; images without a subject are drawn one by one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vaedist.core.errors import UserError
from vaedist.data.sources import Item, Problem, clean_key, natural

Order = Literal["random", "source"]
SHARD_BYTES = 64 * 2**20
_MEMBER_BYTES = 4096  # at most: three tar headers, padding, the label, a short json
_SPLIT_ORDER = {"train": 0, "validate": 1, "test": 2}


@dataclass(frozen=True)
class Part:
    """One shard to be: its name without an ending, and the items in it, in order."""

    name: str
    split: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    digest: str
    """Hash of the settings and of everything listed: two equal digests pack the same bytes."""


class Bad:
    """What is done about bad input: the first one ends the run, or all are kept for `rejected.jsonl`."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.problems: list[Problem] = []

    def add(self, origin: str, reason: str) -> None:
        """Leave one input out.

        Raises:
            UserError: unless `--skip-bad`.
        """
        if not self.skip:
            raise UserError(
                f"{origin} {reason}; mend or remove it, or leave out all such files with --skip-bad"
            )
        self.problems.append(Problem(origin, reason))


def usable(listing: Iterable[Item | Problem], bad: Bad) -> list[Item]:
    """The listed items with unique keys; problems and later duplicates go to `bad`."""
    kept: dict[str, Item] = {}
    for item in listing:
        if isinstance(item, Problem):
            bad.add(item.origin, item.reason)
        elif item.key in kept:
            bad.add(item.origin, f"has the same key as {kept[item.key].origin} ({item.key})")
        else:
            kept[item.key] = item
    return list(kept.values())


# Subjects ----------------------------------------------------------------------------------------------------


def read_subject_map(path: Path) -> dict[str, str]:
    """Key, key prefix or scan name to subject, from a text table (spaces, tabs, commas or semicolons).

    With a header line (which may begin with `#`) the subject is the column called `subject`, `patient` or
    `participant` (also with `_id`), and the first column is what it belongs to. Without one there are exactly
    two columns.

    Raises:
        UserError: unreadable, empty, not such a table, or one key with two subjects.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"cannot read the subject map {path}: {error.strerror}; give the path of a table"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"the subject map {path} is not UTF-8 text: save it as a CSV file") from None
    delimiter = next((sign for sign in ",;\t" if sign in text), None)
    column, found = None, dict[str, str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        words = (
            next(csv.reader([line.lstrip("# ")], delimiter=delimiter))
            if delimiter
            else line.strip("# ").split()
        )
        words = [word.strip() for word in words]
        if not found and column is None:
            named = [i for i, word in enumerate(words) if _is_subject_column(word)]
            if named:
                column = named[0]
                continue
        if line.lstrip().startswith("#"):
            continue
        if column is None and len(words) != 2:
            raise UserError(
                f"{path}, line {number}: expected two columns, key and subject, or a header line that names the "
                "column `subject` or `patient`"
            )
        place = 1 if column is None else column
        if len(words) <= place or not words[0] or not words[place]:
            raise UserError(f"{path}, line {number}: no subject in {line.strip()!r}")
        key, subject = clean_key(words[0]), words[place]
        if found.setdefault(key, subject) != subject:
            raise UserError(f"{path}, line {number}: {words[0]} has two subjects, {found[key]} and {subject}")
    if not found:
        raise UserError(f"the subject map {path} is empty")
    return found


def _is_subject_column(word: str) -> bool:
    return re.sub(r"[_ ]?id$", "", word.lower()) in ("subject", "patient", "participant")


def map_subjects(items: Sequence[Item], table: Mapping[str, str], where: Path) -> list[Item]:
    """`items` with the subjects of the table: of the whole key, of its longest listed prefix, or of the scan.

    A prefix ends at a `_` or `-` of the key: `case_001` is not a prefix of `case_0010_slice_1`.

    Raises:
        UserError: an item is not in the table.
    """
    mapped = []
    for item in items:
        cuts = [len(item.key), *(match.start() for match in re.finditer("[_-]", item.key))]
        names = [item.key[:cut] for cut in sorted(cuts, reverse=True)]
        names += [clean_key(item.subject)] if item.subject else []
        names += [clean_key(item.origin.rsplit("/", 1)[-1].split(".")[0])]
        subject = next((table[name] for name in names if name in table), None)
        if subject is None:
            raise UserError(f"{where} tells no subject for {item.origin} (key {item.key})")
        mapped.append(replace(item, subject=subject))
    return mapped


def part_subjects(items: Sequence[Item], bad: Bad) -> list[Item]:
    """`items` such that no subject is in two splits; what breaks that goes to `bad`."""
    splits: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if item.subject and item.split is not None:
            splits[item.subject][item.split] += 1
    crossing = {subject: counts for subject, counts in splits.items() if len(counts) > 1}
    if not crossing:
        return list(items)
    home = {
        subject: min(counts, key=lambda split: (-counts[split], split))
        for subject, counts in crossing.items()
    }
    kept = []
    for item in items:
        if item.subject in crossing and item.split != home[item.subject]:
            counts = crossing[item.subject]
            told = " and ".join(f"{split} ({counts[split]} images)" for split in sorted(counts))
            bad.add(item.origin, f"belongs to subject {item.subject}, who occurs in {told}")
        else:
            kept.append(item)
    return kept


# Splits, classes, order --------------------------------------------------------------------------------------


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
    units: dict[str, list[int]] = defaultdict(list)
    for i in free:
        units[f"subject {items[i].subject}" if items[i].subject else f"image {items[i].key}"].append(i)
    names = sorted(units)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    queue = [units[names[i]] for i in order]
    split_of = dict.fromkeys(free, "train")
    for name, share in shares.items():
        wanted, taken = round(share * len(free)), 0
        if share > 0 and validation is None and len(queue) < 2:
            continue  # one image or one patient: nothing to hold apart, and nobody asked for it
        while share > 0 and (taken < wanted or taken == 0):
            if len(queue) < 2:
                raise UserError(
                    f"{share:g} of {len(free)} images cannot become {name!r}: there are {len(names)} subjects in "
                    "all, and some have to stay in train; hold a smaller share apart"
                )
            unit = queue.pop()
            taken += len(unit)
            split_of.update(dict.fromkeys(unit, name))
    return [replace(item, split=split_of.get(i, item.split)) for i, item in enumerate(items)]


def split_rank(split: str) -> tuple[int, str]:
    """Sort key: train, validate, test, then the others by name."""
    return _SPLIT_ORDER.get(split, 3), split


def samples_per_shard(pixels: int) -> int:
    """How many samples of `pixels` bytes keep a shard within 64 MB, whatever their content compresses to."""
    return max(1, SHARD_BYTES // (pixels + pixels // 64 + _MEMBER_BYTES))


def make_plan(
    items: Sequence[Item], *, per_shard: int, order: Order, seed: int, settings: Mapping[str, Any]
) -> Plan:
    """Cut the items of every split into shards, in a seeded random order or the source's."""
    classes = tuple(sorted({item.label for item in items if item.label is not None}, key=natural))
    by_split: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_split[item.split or "train"].append(item)
    parts = []
    for split in sorted(by_split, key=split_rank):
        rows = by_split[split]
        if order == "random":
            identity = hashlib.blake2b(f"pack\x1f{seed}\x1f{split}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(identity, "little")))
            rows = [rows[i] for i in generator.permutation(len(rows))]
        for number, start in enumerate(range(0, len(rows), per_shard)):
            name = f"{split}-{number:06d}"
            parts.append(Part(name, split, tuple(rows[start : start + per_shard])))
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for item in items:
        listed = (item.key, item.split, item.label, item.subject, item.origin, item.size)
        text.update(json.dumps(listed).encode())
    return Plan(tuple(parts), classes, text.hexdigest())
