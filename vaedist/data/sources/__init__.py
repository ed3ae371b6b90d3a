"""Where images come from: one file per kind of source, and the file's name is the source's name.

A source module offers

    OPTIONS: frozenset[str]                           # which of the source settings below it uses
    def recognizes(path: Path) -> int                 # how sure it is that this is its layout; 0: it is not
    def open_source(path, settings: SourceSettings) -> ImageSource

and an `ImageSource` lists `Item`s in a fixed order and loads the picture of any one of them. A source is a plain
object that can be sent to worker processes. What it cannot use it lists as a `Problem`, so that the packer
decides once, for every source, whether that ends the run or goes to `rejected.jsonl`.

A new kind of source is one new file here: the command, the layout detection and the packer find it by its name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from vaedist.core.errors import UserError, did_you_mean
from vaedist.data.format.image_files import Limits, Picture

LONGEST_KEY = 80  # a ustar member name has 100 bytes, and the key is followed by an extension


@dataclass(frozen=True)
class Item:
    """One image that a source has, not yet read."""

    key: str
    """Unique over all splits; letters, digits, `_` and `-` only (`clean_key`)."""
    split: str | None
    """`train`, `validate`, `test`, ..., or None: the packer decides."""
    label: str | None
    """Name of its class."""
    subject: str
    """The person or animal it shows; empty where that has no meaning or is not known."""
    origin: str
    """Where it comes from, relative to the input, for messages and `rejected.jsonl`."""
    location: Any = None
    """What the source needs to load it: a path, a number. Plain data."""
    size: int = 0
    """Bytes of the input file (0: not a file of its own); part of the packing plan."""


@dataclass(frozen=True)
class Problem:
    """Something in the input that cannot be packed: one sentence says why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class SourceSettings:
    """The user's settings of a source. A source names those that it uses in `OPTIONS`; others are refused."""

    seed: int = 0
    size: int | None = None
    workspace: Path | None = None
    """A private folder for intermediate files; kept until packing has ended."""
    limits: Limits = field(default_factory=Limits)
    """On one input file."""
    count: Mapping[str, int] | None = None
    match: str | None = None
    slices: tuple[float, float] | None = None
    axis: int | None = None


class ImageSource(Protocol):
    """An opened source."""

    def items(self) -> Iterator[Item | Problem]:
        """Everything there is, in an order that depends on the input alone."""

    def load(self, item: Item) -> Picture:
        """The picture of one item.

        Raises:
            vaedist.data.format.image_files.BadImage: one sentence about what is wrong with it.
        """


def names() -> list[str]:
    """All kinds of source: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a source.

    Raises:
        UserError: there is none of that name; names those that exist.
    """
    if name not in names():
        raise UserError(f"there is no source {name!r}{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def detect(path: Path) -> str:
    """Name of the source that recognizes the layout of `path`.

    Raises:
        UserError: there is nothing at `path`, or no source recognizes it.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder of images, idx files or volumes, or `phantom`")
    try:
        scores = {name: find(name).recognizes(path) for name in names()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    best = max(scores, key=lambda name: scores[name])
    if scores[best] <= 0:
        if path.is_file():
            raise UserError(f"{path} is a file: give the folder that holds it")
        what = "nothing that can be packed (images, idx files or volumes)"
        raise UserError(f"{path} holds {what}: give another folder")
    return best


# Keys and file walks -----------------------------------------------------------------------------------------


def clean_key(text: str) -> str:
    """A key that is safe as a tar member's name and as part of a path: `[A-Za-z0-9_-]`, at most 80 characters.

    Slashes, dots, spaces and `+` become `_`. Where other characters are lost, or the text is too long, eight
    hexadecimal digits of its hash keep the keys of different texts apart.
    """
    key = re.sub(r"[/\\. +]+", "_", text).strip("_")
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", key)
    if plain != key or len(plain) > LONGEST_KEY or not plain:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
        plain = f"{plain[: LONGEST_KEY - 9].strip('_')}-{digest}".lstrip("-")
    return plain


def natural_key(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which `slice_2` comes before `slice_10`."""
    parts = [part for part in re.split(r"(\d+)", text) if part]
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts]


def split_name(folder: str) -> str | None:
    """The split that a folder's name means (`val`, `valid_data`, `Validation` are `validate`), or None."""
    known = {
        "train": ("train", "training"),
        "validate": ("validate", "validation", "valid", "val", "dev"),
        "test": ("test", "testing"),
    }
    plain = re.sub(r"[_-](data|set|images)$", "", folder.lower())
    return next((split for split, spellings in known.items() if plain in spellings), None)


@dataclass(frozen=True)
class FoundFile:
    """A file that `walk` found."""

    path: Path
    relative: str
    size: int


def walk(top: Path, folder: Path | None = None, *, deep: bool = True) -> Iterator[FoundFile | Problem]:
    """All regular files below `folder` (default: `top`), in natural order; links are followed, loops are reported.

    With `deep=False` only those directly in it; of a file, itself.

    Hidden files and those of desktops (`Thumbs.db`, `desktop.ini`) are passed over.
    """
    if top.is_file():
        yield FoundFile(top, top.name, top.stat().st_size)
        return
    folder = folder or top
    above = [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    yield from _walk(top, folder, tuple(os.path.realpath(path) for path in above), deep)


def _walk(top: Path, folder: Path, chain: tuple[str, ...], deep: bool) -> Iterator[FoundFile | Problem]:
    try:
        entries = sorted(os.listdir(folder), key=natural_key)
    except OSError as error:
        yield Problem(relative_to(top, folder), f"the folder cannot be read ({error.strerror})")
        return
    for name in entries:
        if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
            continue
        path = folder / name
        shown = relative_to(top, path)
        try:
            state = os.stat(path)
        except OSError as error:
            yield Problem(shown, f"cannot be opened ({error.strerror})")
            continue
        if stat.S_ISDIR(state.st_mode):
            if not deep:
                continue
            real = os.path.realpath(path)
            if real in chain:
                yield Problem(shown, "is a symbolic link to a folder that it lies in (a loop)")
            else:
                yield from _walk(top, path, (*chain, real), deep)
        elif not stat.S_ISREG(state.st_mode):
            yield Problem(shown, "is not a regular file (a pipe, socket or device)")
        else:
            yield FoundFile(path, shown, state.st_size)


def folders(path: Path) -> list[Path]:
    """The folders directly in `path`, hidden ones left out, in natural order."""
    if not path.is_dir():
        return []
    inner = [path / name for name in os.listdir(path) if not name.startswith(".")]
    inner = [folder for folder in inner if folder.is_dir()]
    return sorted(inner, key=lambda folder: natural_key(folder.name))


def relative_to(top: Path, path: Path) -> str:
    """`path` below `top` with forward slashes, fit for JSON: bytes that are not UTF-8 are escaped."""
    text = "." if path == top else path.relative_to(top).as_posix()
    return text.encode("utf-8", "backslashreplace").decode()
