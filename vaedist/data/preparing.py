"""From an item of a source to the bytes of a tar member: the part of packing that worker processes do.

The writer is one process and takes prepared samples in the plan's order, so the number of workers changes how
long packing takes and not one byte of what is packed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

from vaedist.data.images import (
    BadImage,
    Codec,
    Fit,
    Picture,
    channels_first,
    encode,
    fit_square,
    to_channels,
)
from vaedist.data.index import pixel_digest
from vaedist.data.sources import Item, Source
from vaedist.errors import UserError

_CHUNK = 16  # items that travel to a worker together
_AHEAD = 4  # chunks under way per worker: what bounds the memory


@dataclass(frozen=True)
class Prepared:
    """A sample ready to be written."""

    item: Item
    member: bytes
    skip: int
    """Bytes of the member before the image's data."""
    crc: int
    digest: bytes


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be packed, and why."""

    item: Item
    reason: str


@dataclass(frozen=True)
class Preparer:
    """How every picture of the set is brought into one shape.

    Attributes:
        size: Side in pixels of the fitted square; None: pictures keep their size, which must be `shape`.
        convert: Whether colour may become gray.
        shape: (C, H, W) that comes out.
    """

    source: Source
    size: int | None
    fit: Fit
    convert: bool
    shape: tuple[int, int, int]
    codec: Codec

    def picture(self, item: Item) -> Picture:
        """Load, convert and fit.

        Raises:
            BadImage: it cannot be loaded, or does not fit the set.
        """
        channels, height, width = self.shape
        picture = to_channels(self.source.load(item), channels, self.convert)
        if self.size is not None:
            picture = fit_square(picture, self.size, self.fit)
        if picture.shape[:2] != (height, width):
            rows, columns = picture.shape[:2]
            raise BadImage(
                f"is {columns} x {rows} pixels and the first image of the set {width} x {height}: say --size"
            )
        return picture

    def prepare(self, item: Item) -> Prepared | Rejected:
        try:
            picture = self.picture(item)
        except BadImage as error:
            return Rejected(item, str(error))
        member, skip = encode(picture, self.codec)
        return Prepared(
            item, member, skip, zlib.crc32(memoryview(member)[skip:]), pixel_digest(channels_first(picture))
        )

    def prepare_all(self, items: list[Item]) -> list[Prepared | Rejected]:
        return [self.prepare(item) for item in items]


def choose_shape(
    source: Source, items: Sequence[Item], size: int | None, channels: int | None
) -> tuple[tuple[int, int, int], bool]:
    """(C, H, W) of the set, and whether colour may become gray.

    Args:
        source, items: What will be packed.
        size: Side of the fitted square; None: the first picture's, which must be a square.
        channels: 1, 3, or None: 3 if any of 16 pictures, spread over the listing, is in colour.

    Raises:
        UserError: a rectangle without a size, or no picture can be loaded.
    """
    convert = channels == 1
    if size is not None and channels is not None:
        return (channels, size, size), convert
    first, colour = _look(source, items)
    channels = channels or (3 if colour else 1)
    if size is not None:
        return (channels, size, size), convert
    height, width = first.shape[:2]
    if height != width:
        raise UserError(
            f"the images are {width} x {height} pixels and models take squares: say --size, such as "
            f"--size {min(height, width)}, and --fit pad, crop or stretch"
        )
    return (channels, height, width), convert


def _look(source: Source, items: Sequence[Item], looks: int = 16) -> tuple[Picture, bool]:
    """The first picture that loads, and whether any of a few spread over the listing is in colour."""
    first, colour, reason = None, False, ""
    spread = {i * len(items) // looks for i in range(looks)}
    for i, item in enumerate(items):
        if first is not None and i not in spread:
            continue
        try:
            picture = source.load(item)
        except BadImage as error:
            reason = reason or f"{item.origin} {error}"
            continue
        first = picture if first is None else first
        colour = colour or picture.ndim == 3
    if first is None:
        raise UserError(f"none of {len(items)} files is an image: {reason}")
    return first, colour


_preparer: Preparer | None = None


def _start_worker(preparer: Preparer) -> None:
    global _preparer  # a worker process has one job, and this is where it is kept
    _preparer = preparer


def _work(items: list[Item]) -> list[Prepared | Rejected]:
    assert _preparer is not None
    return _preparer.prepare_all(items)


def prepare_in_order(
    preparer: Preparer, items: Iterable[Item], workers: int
) -> Iterator[Prepared | Rejected]:
    """Prepared samples in the order of `items`, with at most a few chunks per worker in memory.

    Args:
        workers: Processes; 1 works in this one.

    Raises:
        UserError: a worker process died.
    """
    if workers <= 1:
        for item in items:
            yield preparer.prepare(item)
        return
    rest = iter(items)
    waiting: collections.deque[concurrent.futures.Future[list[Prepared | Rejected]]] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(preparer,),
    )
    try:
        while True:
            while len(waiting) < workers * _AHEAD and (chunk := list(islice(rest, _CHUNK))):
                waiting.append(pool.submit(_work, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps for want of memory; the same command continues, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
