"""Images/s from storage to a uint8 batch, shuffled, the same batch size, the same number of readers.

Ours over png and npy tars and from memory, a torch DataLoader over the same images as PNG files, and a webdataset
pipeline over the same tars (readers are threads here, processes there).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import BATCH, Question, Rate, packed


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    contestants = loaders(folder, asked.images, asked.workers)
    title = f"Loader, 256x256, {asked.workers} readers"
    yield Question(title, "images/s", contestants, "torch DataLoader, png files")


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


def timed(batches: Iterator[Any], count: int, image: Callable[[Any], Any], least: float = 0.0) -> float:
    """Images/s over `count` batches, and on for `least` seconds; the first is not counted: starting is not reading."""
    next(batches)
    start = time.perf_counter()
    images = taken = 0
    while taken < count - 1 or time.perf_counter() - start < least:
        images += len(image(next(batches)))
        taken += 1
    return images / (time.perf_counter() - start)


def loaders(folder: Path, images: int, workers: int) -> dict[str, Rate]:
    """Contestants, ours first; each call reads one epoch."""
    import torch
    import webdataset
    from torch.utils.data import DataLoader

    from vaedist.data.index import Index
    from vaedist.data.stream import TrainingStream

    png, npy = (packed(folder, size=256, train=images, codec=codec) for codec in ("png", "npy"))
    files = Files(png_files(png, folder / "files"))
    tars = [str(path) for path in sorted(png.glob("train-*.tar"))]
    count = images // BATCH

    def ours(shards: Path, cache: str) -> Rate:
        stream = TrainingStream(
            Index.open(shards), "train", batch_size=BATCH, seed=0, cache=cache, workers=workers
        )
        epoch = iter(range(1 << 30))

        def rate() -> float:
            batches = stream.batches(next(epoch) * stream.steps_per_epoch)
            try:
                return timed(batches, count, lambda batch: batch["image"], least=0.5)
            finally:
                batches.close()  # type: ignore[attr-defined]

        return rate

    def dataloader() -> float:
        loader = DataLoader(
            files,  # type: ignore[arg-type]
            batch_size=BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        return timed(iter(loader), count, lambda batch: batch)

    def pipeline() -> float:
        # Readers split the tars between them, so no more of them than there are tars.
        readers = min(workers, len(tars))
        dataset = (
            webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
            .shuffle(1000, seed=0)
            .map(lambda sample: decode_png(sample["png"]))
            .batched(BATCH, partial=False, collation_fn=torch.stack)
        )
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=readers, shuffle=False)
        # What readers hold back at the end of their part of an epoch differs, so count batches over epochs.
        return timed(iter(loader.repeat(2)), count, lambda batch: batch)

    return {
        "vaedist, png tars": ours(png, "none"),
        "vaedist, npy tars": ours(npy, "none"),
        "vaedist, cache: memory": ours(png, "memory"),
        "torch DataLoader, png files": dataloader,
        "webdataset, the same png tars": pipeline,
    }
