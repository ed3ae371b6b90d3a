"""What `vaedist-sample` shows of a run: samples, its latent space, and a person's own images through it.

Each function makes one picture, writes it with its arrays, and says in a few lines what it is. Samples are drawn and
written part by part, so that memory does not grow with their number; another thread writes a part while the model
draws the next.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vaedist.core.context import Batch
from vaedist.core.errors import NotDefined, UserError, did_you_mean
from vaedist.core.imaging import (
    Pixels,
    as_numpy,
    channels_last,
    code_maps,
    gif_bytes,
    grid,
    png_bytes,
    write_atomic,
)
from vaedist.core.terminal import ProgressBars
from vaedist.data.format.image_files import Fit, open_fitting
from vaedist.data.loading.inputs import Inputs
from vaedist.evaluation.metrics.image_quality import pair_metrics, summaries
from vaedist.evaluation.metrics.per_image import reconstruct
from vaedist.evaluation.metrics.tables import metrics_table
from vaedist.inference import sampling as drawing
from vaedist.inference.figures import framed_sheet
from vaedist.inference.npz_writer import NpzWriter
from vaedist.inference.sample_shards import SampleShards
from vaedist.inference.sampling import REACH, TOGETHER, Sampler
from vaedist.runs.open_run import Run

SAMPLES = 64
LARGEST_PICTURE = 1024
"""Samples in the picture; more go into arrays and tars alone."""
_CLASSES_NAMED = 64


class Target(NamedTuple):
    """Where a picture goes, and its arrays if they are wanted."""

    picture: str
    npz: str | None = None


class Page(NamedTuple):
    """What was made."""

    told: list[str]
    written: list[str]


def class_numbers(run: Run, given: Sequence[str] | None) -> list[int] | None:
    """Numbers of classes by name or number, -1 for `none`; None where nothing was given.

    Raises:
        NotDefined: the model knows no classes.
        UserError: it does not know this one.
    """
    if given is None:
        return None
    if not run.model.conditional:
        raise NotDefined("--class is not defined, because the model was not trained with classes")
    numbers = {str(number): number for number in range(len(run.classes))}
    numbers |= {"none": -1} | {name: number for number, name in enumerate(run.classes)}
    for name in given:
        if name not in numbers:
            valid = [*run.classes, "none"][:_CLASSES_NAMED]
            raise UserError(f"--class: the model knows no class {name!r}{did_you_mean(name, valid)}")
    return [numbers[name] for name in given]


# Samples -----------------------------------------------------------------------------------------------------


def samples(
    run: Run,
    sampler: Sampler,
    target: Target,
    *,
    count: int | None,
    columns: int,
    classes: Sequence[int] | None = None,
    tar: str | None = None,
    bars: ProgressBars | None = None,
) -> Page:
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
        behind = stack.enter_context(_Behind())
        advance = (bars or ProgressBars(quiet=True)).start("drawing", count)

        def write(drawn: drawing.Drawn, first: int, labels: list[int] | None) -> None:
            if npz is not None:
                npz.add(images=drawn.images)
                if labels is not None:
                    npz.add(labels=np.array(labels, np.int64))
                if drawn.codes is not None:
                    npz.add(codes=drawn.codes)
            if shards is not None:
                shards.add(drawn.images, first, labels)

        def show(pictures: Sequence[Pixels]) -> None:
            sheet = grid(np.concatenate(pictures), columns * (2 if sampler.codes else 1))
            write_atomic(target.picture, png_bytes(sheet))

        for first in range(0, count, TOGETHER):
            numbers = range(first, min(count, first + TOGETHER))
            labels = None if classes is None else [classes[i // columns % len(classes)] for i in numbers]
            drawn = sampler.draw(len(numbers), first, labels)
            behind.call(write, drawn, first, labels)
            if first < LARGEST_PICTURE:
                pictures.append(beside(drawn.images, drawn.codes))
            if numbers.stop == min(count, LARGEST_PICTURE):
                behind.call(show, pictures)
            advance(numbers.stop)
        behind.join()
        if npz is not None:
            npz.finish()
        if shards is not None:
            shards.finish()
    told = [f"{count} samples of {_name(run)}, seed {sampler.seed}, temperature {sampler.temperature:g}"]
    if sampler.mixture is not None:
        told.append(f"latents from a {sampler.mixture}")
    if classes is not None:
        names = ["none" if label < 0 else run.classes[label] for label in classes]
        told.append(f"class: {names[0]}" if len(names) == 1 else f"classes, row by row: {', '.join(names)}")
    if count > LARGEST_PICTURE:
        told.append(f"the picture shows the first {LARGEST_PICTURE}")
    return Page(told, [path for path in (target.picture, target.npz, tar) if path])


class _Behind:
    """Calls, in order, in one other thread; what one raises is raised by the next `call` or `join`.

    A context manager: what waits when it is left by an error is not begun.
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
    return SampleShards(folder, _shape(run), classes, source, sampler.seed)


def beside(images: Pixels, codes: Any) -> Pixels:
    """Pictures (n, H, W[, 3]); with codes (2n, H, W, 3), each image followed by its map."""
    shown = channels_last(images)
    if codes is None:
        return shown
    maps = code_maps(codes, *shown.shape[1:3])
    colour = np.broadcast_to(shown if shown.ndim == 4 else shown[..., None], maps.shape)
    return np.stack([colour, maps], axis=1).reshape(-1, *maps.shape[1:])


# The latent space --------------------------------------------------------------------------------------------


def interpolation(
    run: Run,
    sampler: Sampler,
    ends: Sequence[str],
    target: Target,
    *,
    frames: int,
    classes: Sequence[int] | None = None,
    fit: Fit = "pad",
) -> Page:
    """A strip from one image to another, and a GIF beside it.

    Args:
        run: The sampler's.
        sampler: Knows the latents of samples.
        ends: Two image files or numbers of samples.
        target: Of the strip.
        frames: Images in it.
        classes: None, or the class to decode as.
        fit: How files are made square.
    """
    label = _one(classes)
    told = None if label is None else [label]
    places = []
    for end in ends:
        if not end.isdecimal() and not Path(end).exists():
            raise UserError(
                f"--interpolate: there is no image file {end!r}: give one, or the number of a sample"
            )
        if end.isdecimal():
            places.append(sampler.latents(1, int(end), told)[0])
            continue
        image = torch.from_numpy(read_images(run, [end], fit)).to(_device(run))
        with torch.no_grad():
            places.append(run.model.encode(image, _labels(run, label, 1)).mean[0])
    images = drawing.interpolation(run.model, places[0], places[1], frames, label)
    strip = channels_last(images)
    gif = str(Path(target.picture).with_suffix(".gif"))
    write_atomic(target.picture, png_bytes(grid(strip, frames)))
    write_atomic(gif, gif_bytes(strip))
    line = f"from {' to '.join(ends)} through the latents of {_name(run)}"
    return Page([line], [target.picture, gif, *_arrays(target, images=images)])


def traversal(
    run: Run,
    dimensions: Sequence[int],
    target: Target,
    *,
    frames: int,
    classes: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Page:
    """A row of `frames` images for each latent dimension, or channel of a map."""
    reach = REACH * temperature
    images = drawing.traversal(run.model, dimensions, frames, label=_one(classes), reach=reach)
    write_atomic(target.picture, png_bytes(grid(channels_last(images), frames)))
    rows = ", ".join(map(str, dimensions))
    line = f"latent dimensions {rows} of {_name(run)}, from {-reach:g} to {reach:g} standard deviations"
    return Page([line], [target.picture, *_arrays(target, images=images)])


def manifold(
    run: Run, target: Target, *, side: int, classes: Sequence[int] | None = None, temperature: float = 1.0
) -> Page:
    """All that a model with two latent numbers can draw, `side` by `side` images."""
    images = drawing.manifold(run.model, side, label=_one(classes), temperature=temperature)
    write_atomic(target.picture, png_bytes(grid(channels_last(images), side, pad=0)))
    line = f"the two latent numbers of {_name(run)}, {side} x {side} quantiles of the prior"
    return Page([line], [target.picture, *_arrays(target, images=images)])


# A person's images -------------------------------------------------------------------------------------------


def read_images(run: Run, files: Sequence[str], fit: Fit = "pad") -> Pixels:
    """Image files as uint8 (n, C, H, W), as the model is shown images.

    Raises:
        UserError: one cannot be read.
    """
    read = np.stack([open_fitting(file, _shape(run), fit) for file in files])
    # What a model of binarised images is to be asked: the static draw of each file's name.
    keys = [Path(file).name for file in files]
    return Inputs(run.job).binarised(torch.from_numpy(read), keys).numpy()


def reconstructions(
    run: Run,
    files: Sequence[str],
    target: Target,
    *,
    columns: int,
    classes: Sequence[int] | None = None,
    fit: Fit = "pad",
    codes: bool = False,
) -> Page:
    """Originals in frames, each beside its reconstruction and, if wanted, its codes.

    Args:
        run: Its model reconstructs.
        files: Image files.
        target: Of the sheet.
        columns: Images in a row.
        classes: None, or the class that the model is told.
        fit: How files are made square.
        codes: Whether codes are shown.

    Raises:
        NotDefined: the model does not reconstruct, or has no codes.
    """
    if not run.model.reconstructs:
        raise run.model.not_defined("reconstruct")
    if codes and run.model.latent != "codes":
        raise run.model.not_defined("codes")
    originals = read_images(run, files, fit)
    made, found = [], []
    for start in range(0, len(files), 16):
        part = slice(start, start + 16)
        batch = Batch(image=torch.from_numpy(originals[part]).to(_device(run)), key=list(files[part]))
        label = _labels(run, _one(classes), len(batch["image"]))
        if label is not None:
            batch["label"] = label
        with torch.no_grad():
            made.append(reconstruct(run.model, batch))
            if codes:
                found.append(as_numpy(run.model.codes(batch["image"])))
    others = np.concatenate(made)
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else list(files)
    rows = {
        name: (1, summaries([pair_metrics(*pair)]))
        for name, *pair in zip(names, originals, others, strict=True)
    }
    arrays = {"originals": originals, "reconstructions": others}
    shown = [channels_last(originals), channels_last(others)]
    if codes:
        arrays["codes"] = np.concatenate(found)
        shown.append(code_maps(arrays["codes"], *run.spec.shape))
    write_atomic(target.picture, framed_sheet(*shown, columns=max(1, columns // len(shown))))
    told = [f"reconstructions by {_name(run)}", metrics_table(rows, "file", spread=False)]
    return Page(told, [target.picture, *_arrays(target, **arrays)])


# Around it ---------------------------------------------------------------------------------------------------


def _arrays(target: Target, **arrays: np.ndarray) -> list[str]:
    """Write the arrays, if they are wanted; the path."""
    if target.npz is None:
        return []
    with NpzWriter(target.npz) as writer:
        writer.add(**arrays)
        writer.finish()
    return [target.npz]


def _one(classes: Sequence[int] | None) -> int | None:
    """The class, or None for none: a model that never learned to do without says so itself."""
    return None if classes is None or classes[0] < 0 else classes[0]


def _labels(run: Run, label: int | None, rows: int) -> Tensor | None:
    """The class for each row; None where none was named."""
    return None if label is None else torch.full((rows,), label, dtype=torch.int64, device=_device(run))


def _device(run: Run) -> torch.device:
    return next(run.model.parameters()).device


def _shape(run: Run) -> tuple[int, ...]:
    return run.spec.image_shape


def _name(run: Run) -> str:
    return f"{run.folder} ({run.job.kind}, step {run.step}, {run.weights} weights)"
