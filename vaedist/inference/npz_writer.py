"""An .npz of arrays that grow part by part, for more images than memory holds: `numpy.load` reads it as any other."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.files import sync_folder, temporary, writable

_COPIED = 1 << 20
_LEVEL = 1
"""Of zlib: on samples two to three times as fast as its default, and 6 to 9 % larger."""


class NpzWriter:
    """Writes a compressed .npz, whole or not at all; the same parts give the same bytes.

    The members of a zip archive follow each other, and each begins with its array's length. So the first array is
    compressed as it comes, if its length is known, and parts of the others wait. All lie in unnamed temporary files in
    the target's folder, so that a killed process leaves nothing. A context manager: unfinished, it leaves nothing.

    Args:
        path: Where to; its folder is made if it is missing.
        rows: How many the first array will have; None: not known.

    Raises:
        UserError: the file cannot be written; so do all methods.
    """

    def __init__(self, path: str | Path, rows: int | None = None) -> None:
        self.path, self._rows = Path(path), rows
        self._open = contextlib.ExitStack()
        self._first: IO[bytes] | None = None
        self._parts: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._counts: dict[str, int] = {}
        with writable(self.path):
            if self.path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._unnamed()
            self._archive = self._open.enter_context(
                zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL)
            )

    def add(self, **arrays: NDArray[Any]) -> None:
        """Append rows (n, ...) to the arrays of these names; the first part decides dtype and shape."""
        with writable(self.path):
            for name, rows in arrays.items():
                kind = (rows.dtype, rows.shape[1:])
                assert self._kinds.setdefault(name, kind) == kind, f"{name}: parts of different kinds"
                if name not in self._parts:
                    self._counts[name] = 0
                    self._parts[name] = self._destination(name)
                self._parts[name].write(np.ascontiguousarray(rows).data)
                self._counts[name] += len(rows)

    def _destination(self, name: str) -> IO[bytes]:
        """Where the rows of a new array go: into the archive, if its header can be written now."""
        if self._first is None and self._rows is not None:
            self._first = self._member(name, self._rows)
            return self._first
        return self._unnamed()

    def _unnamed(self) -> IO[bytes]:
        return self._open.enter_context(tempfile.TemporaryFile(dir=self.path.parent))

    def _member(self, name: str, rows: int) -> IO[bytes]:
        """A new member of the archive, past its header."""
        dtype, shape = self._kinds[name]
        member = self._archive.open(f"{name}.npy", "w", force_zip64=True)
        descr = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (rows, *shape)}
        np.lib.format.write_array_header_1_0(member, header)
        return member

    def finish(self) -> None:
        """Complete the archive and move it to its path."""
        with writable(self.path):
            if self._first is not None:
                self._first.close()
            for name, part in self._parts.items():
                if part is self._first:
                    assert self._counts[name] == self._rows, f"{name}: {self._rows} rows were promised"
                    continue
                part.seek(0)
                with self._member(name, self._counts[name]) as member:
                    while data := part.read(_COPIED):
                        member.write(data)
            self._archive.close()
            self._file.seek(0)
            scratch = temporary(self.path)
            try:
                with scratch.open("xb") as file:
                    shutil.copyfileobj(self._file, file, _COPIED)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, self.path)
                sync_folder(self.path.parent)
            finally:
                scratch.unlink(missing_ok=True)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, *error: object) -> None:
        # Errors of closing an unfinished archive do not matter: it is deleted.
        for held in (self._first, self._open):
            if held is not None:
                with contextlib.suppress(OSError, ValueError):
                    held.close()
