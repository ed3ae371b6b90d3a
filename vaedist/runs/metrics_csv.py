"""metrics.csv: the rows of metrics.jsonl as one table, for a spreadsheet or `pandas.read_csv`.

Columns are `step`, `kind`, `epoch`, `time`, then every number in the order in which it first appeared; a cell is empty
where a row does not have the number or it was not finite. A new column (a phase that starts late) rewrites the
file; otherwise rows are appended. The record is metrics.jsonl, from which the table is written at every start.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vaedist.core.files import replace_file

FIRST_COLUMNS = ("step", "kind", "epoch", "time")


class MetricsCsv:
    """A growing metrics.csv.

    Args:
        path: Of the table.
        rows: Reads all rows from metrics.jsonl; called at the start, and when a new column appears.
    """

    def __init__(self, path: Path, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self.path, self._rows = path, rows
        self._columns = list(FIRST_COLUMNS)
        self._rewrite()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row, which metrics.jsonl holds already; written before this returns."""
        if row.keys() <= set(self._columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([row]))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        rows = list(self._rows())
        self._columns = list(dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)]))
        header = dict(zip(self._columns, self._columns, strict=True))
        replace_file(self.path, self._text([header, *rows]).encode())

    def _text(self, rows: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()
