"""Images/s from storage to a uint8 batch, shuffled, the same batch size, the same number of readers.

Three ways of ours, each beside what others do and beside its limit, which does no more than the machine must:

| ours | limit | others |
|---|---|---|
| png tars | the same bytes, in memory, decoded | a torch DataLoader over PNG files, webdataset over the same tars |
| npy tars | the same tars, read into memory | a webdataset pipeline over the same tars |
| from memory | rows of one uint8 tensor taken by a list of indices | |

Readers are threads here and processes there; a limit has as many processes, but for the last one, which is one thread.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import BATCH, Question, Rate, packed

_LEAST_SECONDS = 0.5


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    images, workers = asked.images, asked.workers
    png, npy = (packed(folder, size=256, train=images, codec=codec) for codec in ("png", "npy"))
    files = png_files(png, folder / "files")
    size = f"256x256, {workers} readers"
    limit = "limit: bytes in memory, decoded"
    yield Question(
        f"Loader, png, {size}",
        "images/s",
        {
            "vaedist": ours(png, "none", images, workers),
            "torch DataLoader, png files": dataloader(files, images, workers),
            "webdataset, the same tars": pipeline(png, decode_png, images, workers),
            limit: alone(functools.partial(_decode, files), workers),
        },
        limit,
    )
    limit = "limit: the tars read"
    yield Question(
        f"Loader, npy, {size}",
        "images/s",
        {
            "vaedist": ours(npy, "none", images, workers),
            "webdataset, the same tars": pipeline(npy, decode_npy, images, workers),
            limit: alone(functools.partial(_read, _tars(npy), images // len(_tars(npy))), workers),
        },
        limit,
    )
    limit = "limit: rows of a tensor"
    yield Question(
        f"Loader, `cache: memory`, {size}",
        "images/s",
        {"vaedist": ours(png, "memory", images, workers), limit: functools.partial(_index, images)},
        limit,
    )


# The limits --------------------------------------------------------------------------------------------------


def alone(part: Callable[[], float], processes: int) -> Rate:
    """What so many processes that each do `part` for a while reach together."""

    def rate() -> float:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return sum(pool.starmap(part, [()] * processes, chunksize=1))

    return rate


def _decode(paths: list[Path]) -> float:
    held = [path.read_bytes() for path in paths[:256]]
    return _repeat(lambda: [decode_png(data) for data in held], len(held))


def _read(tars: list[Path], images_each: int) -> float:
    whole = bytearray(max(path.stat().st_size for path in tars))

    def read() -> None:
        for path in tars:
            with path.open("rb", buffering=0) as file:
                file.readinto(whole)

    return _repeat(read, images_each * len(tars))


def _index(images: int) -> float:
    import torch

    held = torch.randint(0, 256, (images, 1, 256, 256), dtype=torch.uint8)
    batches = torch.randperm(images).split(BATCH)
    return _repeat(lambda: [held[rows] for rows in batches], images)


def _repeat(what: Callable[[], object], images: int) -> float:
    """Images/s of what handles so many at a time; the first time is not counted."""
    what()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _LEAST_SECONDS:
        what()
        done += images
    return done / (time.perf_counter() - start)


# Ours, and others ------------------------------------------------------------------------------------------------


def png_files(shards: Path, folder: Path) -> list[Path]:
    """The training images of a packed folder as single files: the very bytes of the tars' members."""
    import tarfile

    folder.mkdir(exist_ok=True)
    for tar in sorted(shards.glob("train-*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".png") and not (folder / member.name).exists():
                    stream = archive.extractfile(member)
                    assert stream is not None
                    (folder / member.name).write_bytes(stream.read())
    return sorted(folder.glob("*.png"))


class Files:
    """The dataset that everybody writes: one PNG file per image."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(self.paths[number]) as picture:
            return torch.from_numpy(np.array(picture))[None]


def decode_png(data: bytes) -> Any:
    import io

    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(data))))[None]


def decode_npy(data: bytes) -> Any:
    import io

    import numpy as np
    import torch

    return torch.from_numpy(np.load(io.BytesIO(data)))[None]


def timed(batches: Iterator[Any], count: int, image: Callable[[Any], Any], least: float = 0.0) -> float:
    """Images/s over `count` batches, and on for `least` seconds; the first is not counted: starting is not reading."""
    next(batches)
    start = time.perf_counter()
    images = taken = 0
    while taken < count - 1 or time.perf_counter() - start < least:
        images += len(image(next(batches)))
        taken += 1
    return images / (time.perf_counter() - start)


def _tars(shards: Path) -> list[Path]:
    return sorted(shards.glob("train-*.tar"))


def ours(shards: Path, cache: Any, images: int, workers: int) -> Rate:
    """Each call reads one epoch."""
    from vaedist.data.format.index import Index
    from vaedist.data.loading.stream import TrainingStream, TrainingStreamConfig

    stream = TrainingStream(
        Index.open(shards),
        "train",
        TrainingStreamConfig(batch_size=BATCH, seed=0, cache=cache, workers=workers),
    )
    epoch = iter(range(1 << 30))

    def rate() -> float:
        batches = stream.batches(next(epoch) * stream.steps_per_epoch)
        try:
            return timed(batches, images // BATCH, lambda batch: batch["image"], least=_LEAST_SECONDS)
        finally:
            batches.close()  # type: ignore[attr-defined]

    return rate


def dataloader(paths: list[Path], images: int, workers: int) -> Rate:
    import torch
    from torch.utils.data import DataLoader

    def rate() -> float:
        loader: DataLoader[Any] = DataLoader(
            Files(paths),  # type: ignore[arg-type]
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        return timed(iter(loader), images // BATCH, lambda batch: batch)

    return rate


def pipeline(shards: Path, decode: Callable[[bytes], Any], images: int, workers: int) -> Rate:
    """Webdataset as its documentation has it."""
    import torch
    import webdataset

    tars = [str(path) for path in _tars(shards)]
    codec = "png" if decode is decode_png else "npy"

    def rate() -> float:
        # Readers split the tars between them, so no more of them than there are tars.
        readers = min(workers, len(tars))
        dataset = (
            webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
            .shuffle(1000, seed=0)
            .map(lambda sample: decode(sample[codec]))
            .batched(BATCH, partial=False, collation_fn=torch.stack)
        )
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=readers, shuffle=False)
        # What readers hold back at the end of their part of an epoch differs, so count batches over epochs.
        return timed(iter(loader.repeat(2)), images // BATCH, lambda batch: batch)

    return rate
