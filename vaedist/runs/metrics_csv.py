"""metrics.csv: the rows of metrics.jsonl as one table, for a spreadsheet or `pandas.read_csv`.

Columns are `step`, `kind`, `epoch`, `time`, then every number in the order in which it first appeared; a cell is empty
where a row does not have the number or it was not finite. A new column (a phase that starts late) makes the file anew;
otherwise rows are appended. metrics.jsonl is the record: from it the table is made at every start.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vaedist.core.files import replace_file

FIRST = ("step", "kind", "epoch", "time")


class Table:
    """A growing metrics.csv.

    Args:
        path: Of the table.
        rows: Reads what it is to hold, from metrics.jsonl: at the start, and when a new column appears.
    """

    def __init__(self, path: Path, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self.path, self._rows = path, rows
        self._columns = list(FIRST)
        self._rewrite()

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row, which `rows` would give by now; written before this returns."""
        if row.keys() <= set(self._columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([row]))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        rows = list(self._rows())
        self._columns = list(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_file(self.path, self._text([header, *rows]).encode())

    def _text(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()
