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

from vaedist.core.errors import UserError
from vaedist.data.format.identity import pixel_digest
from vaedist.data.format.image_files import BadImage, Picture
from vaedist.data.format.resize import Fit, fit_square, to_channels
from vaedist.data.format.sample_codec import Codec, channels_first, encode
from vaedist.data.sources import ImageSource, Item

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
        convert: Whether color may become gray.
        shape: (C, H, W) that comes out.
    """

    source: ImageSource
    size: int | None
    fit: Fit
    convert: bool
    shape: tuple[int, ...]
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
            first = f"the first image of the set {width} x {height}"
            raise BadImage(f"is {columns} x {rows} pixels and {first}: say --size")
        return picture

    def prepare(self, item: Item) -> Prepared | Rejected:
        try:
            picture = self.picture(item)
        except BadImage as error:
            return Rejected(item, str(error))
        member, skip = encode(picture, self.codec)
        crc, digest = zlib.crc32(memoryview(member)[skip:]), pixel_digest(channels_first(picture))
        return Prepared(item, member, skip, crc, digest)


def choose_shape(
    source: ImageSource, items: Sequence[Item], size: int | None, channels: int | None, skip_bad: bool = False
) -> tuple[int, int, int]:
    """(C, H, W) of the set.

    Args:
        source, items: What will be packed.
        size: Side of the fitted square; None: the first picture's, which must be a square.
        channels: 1, 3, or None: 3 if any of 16 pictures, spread over the listing, is in color.
        skip_bad: Whether pictures of another size than the first may be left out.

    Raises:
        UserError: without a size, a rectangle or pictures of several sizes; or no picture can be loaded.
    """
    if size is not None and channels is not None:
        return channels, size, size
    some = _spread(source, items)
    channels = channels or (3 if any(picture.ndim == 3 for picture in some) else 1)
    if size is not None:
        return channels, size, size
    height, width = some[0].shape[:2]
    other = next((one.shape[:2] for one in some if one.shape[:2] != (height, width)), None)
    least = min(min(one.shape[:2]) for one in some)
    # Models halve the side several times; what 32 divides suits every job that is shipped.
    advice = f"say --size, such as --size {least - least % 32 if least > 32 else least}"
    if other is not None and not skip_bad:
        raise UserError(
            f"the images differ in size, {width} x {height} and {other[1]} x {other[0]} pixels among them, and a set "
            f"has one: {advice}, and for rectangles --fit pad, crop or stretch"
        )
    if height != width:
        raise UserError(
            f"the images are {width} x {height} pixels and models take squares: {advice}, and --fit pad, crop or "
            "stretch"
        )
    return channels, height, width


def count_letterboxed(source: ImageSource, items: Sequence[Item]) -> tuple[int, int]:
    """How many of some pictures, spread over the listing, get visible black borders by padding; and of how many."""
    some = _spread(source, items)
    return sum(_borders_show(picture) for picture in some), len(some)


def _borders_show(picture: Picture) -> bool:
    """Whether black borders would be seen: slices and scans often have a black background of their own."""
    height, width = picture.shape[:2]
    if height == width:
        return False
    sides = picture[[0, -1]] if width > height else picture[:, [0, -1]]
    return bool(sides.mean() > 25)


def _spread(source: ImageSource, items: Sequence[Item], count: int = 16) -> list[Picture]:
    """The first picture that loads, then a few that are spread over the listing."""
    loaded: list[Picture] = []
    reason = ""
    chosen = {i * len(items) // count for i in range(count)}
    for i, item in enumerate(items):
        if loaded and i not in chosen:
            continue
        try:
            loaded.append(source.load(item))
        except BadImage as error:
            reason = reason or f"{item.origin} {error}"
    if not loaded:
        raise UserError(f"none of {len(items)} files is an image: {reason}")
    return loaded


_preparer: Preparer | None = None


def _start_worker(preparer: Preparer) -> None:
    global _preparer  # a worker process has one job, kept here
    _preparer = preparer


def _work(items: list[Item]) -> list[Prepared | Rejected]:
    assert _preparer is not None
    return [_preparer.prepare(item) for item in items]


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
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (preparer,))
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
