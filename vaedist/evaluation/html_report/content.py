"""What the page's template fills in."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from vaedist.core.imaging import channels_last, grid, png_bytes


@dataclass(frozen=True)
class ImagePair:
    """One image and its reconstruction, as data URIs."""

    title: str
    numbers: str
    original: str
    made: str
    difference: str


@dataclass(frozen=True)
class HtmlTable:
    """Cells as text; the first row is the head, the first column names the rows."""

    rows: list[list[str]]
    note: str = ""
    words: bool = False
    """Cells hold sentences, which may be broken, not numbers."""


@dataclass
class Section:
    """One part of a run's page; what is empty is not shown."""

    title: str
    note: str = ""
    charts: list[str] = field(default_factory=list)
    """SVG."""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Caption and data URI."""
    tables: list[HtmlTable] = field(default_factory=list)
    pairs: list[ImagePair] = field(default_factory=list)
    text: str = ""
    """Set as it stands."""
    pixels: bool = True
    """The pictures are images of the data, whose pixels are shown as such."""

    def __bool__(self) -> bool:
        return bool(self.charts or self.pictures or self.tables or self.pairs or self.text)

    def add_png(self, caption: str, content: bytes) -> None:
        """Add a PNG file."""
        self.pictures.append((caption, _png_uri(content)))

    def add_grid(self, caption: str, images: Any, columns: int) -> None:
        """Add uint8 (N, C, H, W) as one picture."""
        self.add_png(caption, png_bytes(grid(channels_last(images), columns)))


@dataclass(frozen=True)
class RunReport:
    """One run's part of the page."""

    name: str
    about: str
    alarm: str
    facts: list[tuple[str, str]]
    sections: list[Section]


def picture_uri(pixels: Any) -> str:
    """A data URI of uint8 (H, W) or (H, W, 3)."""
    return _png_uri(png_bytes(pixels))


def _png_uri(content: bytes) -> str:
    """A data URI of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
