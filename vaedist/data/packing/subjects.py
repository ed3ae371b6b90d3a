"""Subjects: maps from keys to subjects, and no subject in two splits.

Where the source has splits of its own and a subject occurs in two of them, that is an error; with `--skip-bad` the
subject stays where it has most images, and its others are left out.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.data.packing.rejections import Rejections
from vaedist.data.sources import Item, clean_key


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
    column, subjects = None, dict[str, str]()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        words = line.strip("# ").split()
        if delimiter:
            words = [word.strip() for word in next(csv.reader([line.lstrip("# ")], delimiter=delimiter))]
        if not subjects and column is None:
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
        if subjects.setdefault(key, subject) != subject:
            both = f"{subjects[key]} and {subject}"
            raise UserError(f"{path}, line {number}: {words[0]} has two subjects, {both}")
    if not subjects:
        raise UserError(f"the subject map {path} is empty")
    return subjects


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
            raise UserError(f"{where} has no subject for {item.origin} (key {item.key})")
        mapped.append(replace(item, subject=subject))
    return mapped


def keep_subjects_in_one_split(items: Sequence[Item], rejections: Rejections) -> list[Item]:
    """`items` such that no subject is in two splits; the others are rejected."""
    splits: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if item.subject and item.split is not None:
            splits[item.subject][item.split] += 1
    crossing = {subject: counts for subject, counts in splits.items() if len(counts) > 1}
    if not crossing:
        return list(items)
    home = {
        subject: min(counts.items(), key=lambda one: (-one[1], one[0]))[0]
        for subject, counts in crossing.items()
    }
    kept = []
    for item in items:
        if item.subject in crossing and item.split != home[item.subject]:
            counts = crossing[item.subject]
            where = " and ".join(f"{split} ({counts[split]} images)" for split in sorted(counts))
            rejections.add(item.origin, f"belongs to subject {item.subject}, who occurs in {where}")
        else:
            kept.append(item)
    return kept
