"""Samples in a picture, in arrays and in a packed folder.

They are drawn and written part by part, so that memory does not grow with their number; another thread writes a part
while the model draws the next.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from vaedist.core.imaging import Pixels, channels_last, code_maps, grid, png_bytes, write_atomic
from vaedist.core.terminal import ProgressBars
from vaedist.inference.npz_writer import NpzWriter
from vaedist.inference.picture_files import PictureFiles, PictureResult
from vaedist.inference.sample_shards import SampleShards
from vaedist.inference.sampling import SAMPLE_BATCH, SampleBatch, Sampler
from vaedist.runs.open_run import Run

SAMPLES = 64
LARGEST_PICTURE = 1024
"""Samples in the picture; more go into arrays and tars alone."""


def write_samples(
    run: Run,
    sampler: Sampler,
    target: PictureFiles,
    *,
    count: int | None,
    columns: int,
    classes: Sequence[int] | None = None,
    tar: str | None = None,
    bars: ProgressBars | None = None,
) -> PictureResult:
    """Samples 0 .. count - 1 in a grid, and as many as are asked for in arrays and tars.

    Args:
        run: The sampler's.
        sampler: Draws.
        target: Where the picture goes.
        count: How many; default: 64, or a row for each class.
        columns: Of the grid.
        classes: Of the rows, which take turns; default: of a conditional model all.
        tar: A folder for tars.
        bars: Show how far it is; default: nothing.
    """
    if classes is None and run.model.conditional:
        classes = range(len(run.classes))
    count = count or (SAMPLES if classes is None or len(classes) == 1 else len(classes) * columns)
    pictures: list[Pixels] = []
    with contextlib.ExitStack() as stack:
        npz = stack.enter_context(NpzWriter(target.npz, count)) if target.npz else None
        shards = stack.enter_context(_shards(run, sampler, tar)) if tar else None
        writer = stack.enter_context(BackgroundWriter())
        advance = (bars or ProgressBars(quiet=True)).start("drawing", count)

        def write(batch: SampleBatch, first: int, labels: list[int] | None) -> None:
            if npz is not None:
                npz.add(images=batch.images)
                if labels is not None:
                    npz.add(labels=np.array(labels, np.int64))
                if batch.codes is not None:
                    npz.add(codes=batch.codes)
            if shards is not None:
                shards.add(batch.images, first, labels)

        def show(pictures: Sequence[Pixels]) -> None:
            sheet = grid(np.concatenate(pictures), columns * (2 if sampler.codes else 1))
            write_atomic(target.picture, png_bytes(sheet))

        for first in range(0, count, SAMPLE_BATCH):
            numbers = range(first, min(count, first + SAMPLE_BATCH))
            labels = None if classes is None else [classes[i // columns % len(classes)] for i in numbers]
            batch = sampler.draw(len(numbers), first, labels)
            writer.call(write, batch, first, labels)
            if first < LARGEST_PICTURE:
                pictures.append(with_code_maps(batch.images, batch.codes))
            if numbers.stop == min(count, LARGEST_PICTURE):
                writer.call(show, pictures)
            advance(numbers.stop)
        writer.join()
        if npz is not None:
            npz.finish()
        if shards is not None:
            shards.finish()
    lines = [f"{count} samples of {run.title}, seed {sampler.seed}, temperature {sampler.temperature:g}"]
    if sampler.mixture is not None:
        lines.append(f"latents from a {sampler.mixture}")
    if classes is not None:
        names = ["none" if label < 0 else run.classes[label] for label in classes]
        lines.append(f"class: {names[0]}" if len(names) == 1 else f"classes, row by row: {', '.join(names)}")
    if count > LARGEST_PICTURE:
        lines.append(f"the picture shows the first {LARGEST_PICTURE}")
    return PictureResult(lines, [path for path in (target.picture, target.npz, tar) if path])


class BackgroundWriter:
    """Runs calls in order in one other thread; what one raises is raised by the next `call` or `join`.

    A context manager: calls that still wait when an error leaves it are not begun.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vaedist-writer")
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Queue a call; waits while two are queued, so that memory does not fill up before a slow disk."""
        while len(self._waiting) >= 2:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(function, *arguments))

    def join(self) -> None:
        """Wait for all of them."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _shards(run: Run, sampler: Sampler, folder: str) -> SampleShards:
    source = {
        "source": "vaedist-sample",
        "run": run.job.name,
        "step": run.step,
        "weights": run.weights,
        "sampler": "prior" if sampler.mixture is None else "gmm",
        "temperature": sampler.temperature,
        **sampler.options,
    }
    classes = run.classes if run.model.conditional else ()
    return SampleShards(Path(folder), run.spec.image_shape, classes, source, sampler.seed)


def with_code_maps(images: Pixels, codes: Any) -> Pixels:
    """Pictures (n, H, W[, 3]); with codes (2n, H, W, 3), each image followed by its map."""
    shown = channels_last(images)
    if codes is None:
        return shown
    maps = code_maps(codes, *shown.shape[1:3])
    color = np.broadcast_to(shown if shown.ndim == 4 else shown[..., None], maps.shape)
    return np.stack([color, maps], axis=1).reshape(-1, *maps.shape[1:])
