"""Groups of images that a file names: patient, contrast, scanner, whatever stands beside a case.

    # case     patient    contrast
    case_001   patient01  T1W
    case_009   patient01  T2W

One line per case, columns apart by blanks, tabs, commas or semicolons. The first line may name the columns
(after `#`, or where its first word is `case`, `key` or `subject`); else they are `column 2`, `column 3`, ...
The first column is an image's key, its subject, or the beginning of its key up to a `_`, `-` or `.`:
`case_001` means every slice `case_001_slice_7`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.data.format.split import Split
from vaedist.evaluation.metrics.per_image import SplitMetrics

_CUT = re.compile(r"[_\-.]")
_HEADS = {"case", "key", "subject"}


def read_groups(path: str | Path) -> dict[str, dict[str, str]]:
    """Column name to (first column's value to that column's value).

    Raises:
        UserError: the file cannot be read, has no columns, is ragged, or names a case twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"cannot read the groups file {path}: {reason}; give a text file of lines `case group ...`"
        ) from None
    names: list[str] | None = None
    groups: list[dict[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = re.split(r"[,;\t]\s*|\s+", line.strip().lstrip("#").strip())
        heading = not groups and (line.lstrip().startswith("#") or words[0].lower() in _HEADS)
        if words == [""] or (line.lstrip().startswith("#") and not heading):
            continue
        if heading:
            names = words[1:]
            continue
        groups = groups or [{} for _ in words[1:]]
        if not groups or len(words) - 1 != len(groups):
            raise UserError(
                f"{path}, line {number}: expected a case and {max(len(groups), 1)} more columns, as in the "
                f"lines before, but it has {len(words) - 1} more"
            )
        if words[0] in groups[0]:
            raise UserError(f"{path}, line {number}: {words[0]!r} is given twice")
        for group, word in zip(groups, words[1:], strict=True):
            group[words[0]] = word
    if not groups:
        raise UserError(f"the groups file {path} is empty: give lines such as `case_001 patient01 T1W`")
    if names is None or len(names) != len(groups):
        names = [f"column {i}" for i in range(2, len(groups) + 2)]
    return dict(zip(names, groups, strict=True))


def group_of(groups: Mapping[str, str], key: str, subject: str) -> str | None:
    """The group of an image: by its key, its subject, or the longest beginning of its key that is listed."""
    for name in (key, subject, *(key[: cut.start()] for cut in reversed(list(_CUT.finditer(key))))):
        if name in groups:
            return groups[name]
    return None


def metrics_by_group(
    measured: SplitMetrics, split: Split, classes: tuple[str, ...], columns: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Per subject, per class, and per column of the groups file: means of each group that holds several images.

    Args:
        measured: Of `split`.
        classes: Their names.
        columns: Of `read_groups`.

    Raises:
        UserError: no image is in any group of a column.
    """
    rows = measured.rows
    subjects = {row.sample: split.subject(row.sample) for row in rows}
    groups = {"subject": measured.by(lambda row: subjects[row.sample] or None)}
    if len(groups["subject"]) == len(rows) > 1:
        del groups["subject"]  # every image is its own subject: those are the rows of images.jsonl
    if classes:
        labels = {row.sample: split.label(row.sample) for row in rows}
        groups["class"] = measured.by(
            lambda row: classes[labels[row.sample]] if labels[row.sample] >= 0 else None
        )
    for column, names in columns.items():
        groups[column] = measured.by(lambda row, names=names: group_of(names, row.key, subjects[row.sample]))  # type: ignore[misc]
        members = sum(group["images"] for group in groups[column].values())
        if members == 0:
            raise UserError(
                f"--groups: no image is in any group; its first column holds names such as {next(iter(names))!r}, "
                f"the images have keys such as {rows[0].key!r}"
            )
        if members < len(rows):
            print(f"note: {len(rows) - members} images have no {column} in the groups file")
    return {name: members for name, members in groups.items() if members}
