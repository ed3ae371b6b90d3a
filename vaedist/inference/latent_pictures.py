"""Pictures of a run's latent space: interpolation, traversal, manifold. Each is written with its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vaedist.core.errors import UserError
from vaedist.core.imaging import channels_last, gif_bytes, grid, png_bytes, write_atomic
from vaedist.data.format.resize import Fit
from vaedist.inference.latent_space import TRAVERSAL_REACH, interpolation, manifold, traversal
from vaedist.inference.picture_files import PictureFiles, PictureResult
from vaedist.inference.reconstructions import read_images
from vaedist.inference.sampling import Sampler, label_tensor
from vaedist.runs.open_run import Run


def write_interpolation(
    run: Run,
    sampler: Sampler,
    ends: Sequence[str],
    target: PictureFiles,
    *,
    frames: int,
    label: int | None = None,
    fit: Fit = "pad",
) -> PictureResult:
    """A strip from one image to another, and a GIF beside it.

    Args:
        run: The sampler's.
        sampler: Knows the latents of samples.
        ends: Two image files or numbers of samples.
        target: Of the strip.
        frames: Images in it.
        label: None, or the class to decode as.
        fit: How files are made square.
    """
    labels = None if label is None else [label]
    latents = []
    for end in ends:
        if not end.isdecimal() and not Path(end).exists():
            raise UserError(
                f"--interpolate: there is no image file {end!r}: give one, or the number of a sample"
            )
        if end.isdecimal():
            latents.append(sampler.latents(1, int(end), labels)[0])
            continue
        image = torch.from_numpy(read_images(run, [end], fit)).to(run.device)
        with torch.no_grad():
            latents.append(run.model.encode(image, label_tensor(labels, run.device)).mean[0])
    images = interpolation(run.model, latents[0], latents[1], frames, label)
    strip = channels_last(images)
    gif = str(Path(target.picture).with_suffix(".gif"))
    write_atomic(target.picture, png_bytes(grid(strip, frames)))
    write_atomic(gif, gif_bytes(strip))
    line = f"from {' to '.join(ends)} through the latents of {run.title}"
    return PictureResult([line], [target.picture, gif, *target.write_arrays(images=images)])


def write_traversal(
    run: Run,
    dimensions: Sequence[int],
    target: PictureFiles,
    *,
    frames: int,
    label: int | None = None,
    temperature: float = 1.0,
) -> PictureResult:
    """A row of `frames` images for each latent dimension, or channel of a map."""
    reach = TRAVERSAL_REACH * temperature
    images = traversal(run.model, dimensions, frames, label=label, reach=reach)
    write_atomic(target.picture, png_bytes(grid(channels_last(images), frames)))
    rows = ", ".join(map(str, dimensions))
    line = f"latent dimensions {rows} of {run.title}, from {-reach:g} to {reach:g} standard deviations"
    return PictureResult([line], [target.picture, *target.write_arrays(images=images)])


def write_manifold(
    run: Run, target: PictureFiles, *, side: int, label: int | None = None, temperature: float = 1.0
) -> PictureResult:
    """All that a model with two latent numbers can draw, `side` by `side` images."""
    images = manifold(run.model, side, label=label, temperature=temperature)
    write_atomic(target.picture, png_bytes(grid(channels_last(images), side, pad=0)))
    line = f"the two latent numbers of {run.title}, {side} x {side} quantiles of the prior"
    return PictureResult([line], [target.picture, *target.write_arrays(images=images)])
