"""The files in which `vaedist-sample` leaves a picture and its arrays, and what it says of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from vaedist.inference.npz_writer import NpzWriter


class PictureFiles(NamedTuple):
    """Where a picture goes, and its arrays if they are wanted."""

    picture: str
    npz: str | None = None

    def write_arrays(self, **arrays: NDArray[Any]) -> list[str]:
        """Write the arrays, if they are wanted; the paths written."""
        if self.npz is None:
            return []
        with NpzWriter(self.npz) as writer:
            writer.add(**arrays)
            writer.finish()
        return [self.npz]


class PictureResult(NamedTuple):
    """What was made: lines that describe it, and the paths of its files."""

    lines: list[str]
    files: list[str]
