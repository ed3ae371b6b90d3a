"""A trained run in Python, for notebooks and scripts.

    import vaedist

    run = vaedist.load("runs/vae_mnist")
    pictures = run.sample(16)                 # (16, 1, 28, 28) in [0, 1]
    others = run.reconstruct(images)          # what is given as a tensor comes back as a tensor, an array as an array
    z = run.encode(images)                    # means of the posterior, or the codes of a VQ-VAE
    pictures = run.decode(z)

The commands use the same code: number i of `sample(n, seed=s)` is image i of `vaedist-sample --seed s`, before it is
rounded to a picture's 256 levels. Nothing is trained, and nothing is written but the density of `sampler="gmm"`, once.

Images are (n, C, H, W), or (n, H, W) where the model has one channel: uint8 from 0 to 255, or floating from 0 to 1.
What comes back is floating, from 0 to 1. Of a run on binarised images every image is binarised as the evaluation does
it, a static draw by its number in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import Inputs, rows_at_once
from vaedist.inference.sampling import SAMPLE_BATCH, Sampler, label_tensor
from vaedist.inference.stored_mixture import load_or_fit_mixture
from vaedist.models.contract import Variant
from vaedist.runs.open_run import Run, open_run

Numbers = TypeVar("Numbers", Tensor, NDArray[Any])
"""A tensor, or an array: what comes back is of the same kind as what was given."""
Classes = str | int | Sequence[str | int] | None
"""Name or number of a class: one for all images, or one for each; None: no class."""
_Network = Callable[[Tensor, Tensor | None], Tensor]


class TrainedModel:
    """A trained model with what it knows of itself: see the module. Made by `vaedist.load`.

    Attributes:
        run: What the commands use: the model (`run.model`, a torch module), the job, the checkpoint.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._inputs = Inputs(run.job)
        self._rows = rows_at_once(run.spec)

    @classmethod
    def open(cls, path: str | Path, *, weights: str | None = None, device: str = "cpu") -> TrainedModel:
        """As `vaedist.load`."""
        return cls(open_run(path, weights=weights, device=device))

    def __repr__(self) -> str:
        size = "x".join(str(axis) for axis in self.shape)
        return f"<{self.kind} of {size} images, step {self.run.step}, {self.run.weights} weights, {self.run.folder}>"

    @property
    def kind(self) -> str:
        """`vae`, `vqvae`, `pixelcnn`, ..."""
        return self.run.job.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return self.run.spec.image_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the data that it was trained on."""
        return self.run.classes

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent: (D,), (D, h, w), (h, w) for codes, () where there is none."""
        return self.run.model.latent_shape

    @torch.no_grad()
    def sample(
        self,
        n: int = 16,
        *,
        classes: Classes = None,
        seed: int = 0,
        first: int = 0,
        temperature: float = 1.0,
        sampler: str = "prior",
        **options: Any,
    ) -> Tensor:
        """(n, C, H, W) new images in [0, 1]; number i depends on (seed, first + i, its class) alone.

        Args:
            n: How many.
            classes: Name or number of the class, one for all or one for each, where the model was trained with
                classes; None: evenly drawn.
            seed: Of the noise.
            first: Number of the first.
            temperature: Spread around the prior's mean, or of the codes' distribution; 1: the prior.
            sampler: `prior`, or `gmm`: latents from a Gaussian mixture fitted to those of the training images and
                kept with the run (it is fitted now if there is none, from the data where the run read them).
            options: `top_k`, `top_p`, `guidance`, for priors over codes.

        Raises:
            NotDefined: this variant does not sample, or not so.
            UserError: an argument means nothing here.
        """
        if sampler not in ("prior", "gmm"):
            raise UserError(f"sampler is {sampler!r}: give 'prior' or 'gmm'")
        if n < 1:
            raise UserError(f"n is {n}: ask for at least 1 image")
        mixture = None
        if sampler == "gmm":
            mixture = load_or_fit_mixture(self.run, lambda: Index.open(self.run.data_path))
        drawer = Sampler(self.run.model, seed=seed, temperature=temperature, options=options, mixture=mixture)
        labels = self._labels(classes, n)
        parts = []
        for start in range(0, n, SAMPLE_BATCH):  # as vaedist-sample draws them
            count = min(SAMPLE_BATCH, n - start)
            some = None if labels is None else labels[start : start + count]
            parts.append(drawer.images(count, first + start, some))
        return torch.cat(parts).float().cpu()

    def reconstruct(self, images: Numbers, classes: Classes = None) -> Numbers:
        """(n, C, H, W) in [0, 1]: the mean reconstruction of each image.

        Args:
            images: See the module.
            classes: As of `sample`, for a conditional model.

        Raises:
            NotDefined: this variant does not reconstruct.
            UserError: these are no images of the model's shape.
        """
        return self._encoded(images, classes, self.run.model.reconstruct)

    def encode(self, images: Numbers, classes: Classes = None) -> Numbers:
        """(n, *latent_shape): the posterior's mean of each image, or its int64 codes.

        Args:
            images: See the module.
            classes: As of `sample`, for a conditional model.

        Raises:
            NotDefined: this variant has no encoder.
            UserError: these are no images of the model's shape.
        """
        if self.run.model.latent == "codes":
            return self._encoded(images, None, lambda image, _: self.run.model.codes(image))
        return self._encoded(images, classes, lambda image, label: self.run.model.encode(image, label).mean)

    def decode(self, latents: Numbers, classes: Classes = None) -> Numbers:
        """(n, C, H, W) in [0, 1]: the mean image of each latent, or of each map of codes.

        Args:
            latents: (n, *latent_shape), as `encode` gives them.
            classes: As of `sample`, for a conditional model.

        Raises:
            NotDefined: this variant has no such decoder.
            UserError: these are no latents of the model's shape.
        """
        model: Variant = self.run.model
        z = torch.as_tensor(latents)
        if tuple(z.shape[1:]) != model.latent_shape or not len(z):
            expected = ", ".join(str(axis) for axis in ("n", *model.latent_shape))
            raise UserError(f"latents are of shape {tuple(z.shape)} and the model decodes ({expected})")
        dtype = next(model.parameters()).dtype

        def decode(part: Tensor, label: Tensor | None, _: int) -> Tensor:
            if model.latent == "codes":
                return model.decode_codes(part.long()).mean
            return model.decode(part.to(dtype), label).mean

        return _as(latents, self._in_parts(z, classes, decode))

    # Around it

    def _encoded(self, images: Numbers, classes: Classes, network: _Network) -> Numbers:
        def shown(part: Tensor, label: Tensor | None, start: int) -> Tensor:
            keys = [str(number) for number in range(start, start + len(part))]
            return network(self._inputs.binarize(part, keys), label)

        return _as(images, self._in_parts(self._pixels(torch.as_tensor(images)), classes, shown))

    @torch.no_grad()
    def _in_parts(
        self, rows: Tensor, classes: Classes, function: Callable[[Tensor, Tensor | None, int], Tensor]
    ) -> Tensor:
        """`function(part, its labels, number of its first row)` for each part of `rows`, on the model's device."""
        labels = self._labels(classes, len(rows))
        results = []
        for start in range(0, len(rows), self._rows):
            part = rows[start : start + self._rows].to(self.run.device)
            label = None if labels is None else labels[start : start + len(part)]
            results.append(function(part, label_tensor(label, self.run.device), start))
        result = torch.cat(results)
        return result.float() if result.is_floating_point() else result

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 (n, C, H, W)."""
        if images.dim() == 3 and self.shape[0] == 1:
            images = images[:, None]
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape or not len(images):
            expected = ", ".join(str(axis) for axis in ("n", *self.shape))
            raise UserError(f"images are of shape {tuple(images.shape)} and the model takes ({expected})")
        if images.dtype == torch.uint8:
            return images
        if not images.is_floating_point():
            raise UserError(
                f"images are of type {images.dtype}: give uint8 from 0 to 255, or floating from 0 to 1"
            )
        least, most = float(images.min()), float(images.max())
        if not 0 <= least <= most <= 1:
            raise UserError(
                f"floating images hold values from {least:g} to {most:g}: give them from 0 to 1, or as uint8"
            )
        return (images * 255).round().to(torch.uint8)

    def _labels(self, classes: Classes, n: int) -> list[int] | None:
        if classes is None:
            return None
        if not self.run.model.conditional:
            raise UserError(f"classes are given, but {self} was not trained with classes: leave them away")
        given = [classes] * n if isinstance(classes, str | int) else list(classes)
        if len(given) != n:
            raise UserError(f"{len(given)} classes are given for {n} images: give one, or one for each")
        names = {name: number for number, name in enumerate(self.classes)}
        numbers = [name if isinstance(name, int) else names.get(name, _number(name)) for name in given]
        wrong = [name for name, number in zip(given, numbers, strict=True) if not 0 <= number < len(names)]
        if wrong:
            raise UserError(f"the model knows no class {wrong[0]!r}; it knows {', '.join(self.classes)}")
        return numbers


def _number(text: str) -> int:
    """Of a class that is no name; -1 for what is no number either."""
    return int(text) if text.isdecimal() else -1


def _as(given: Numbers, result: Tensor) -> Numbers:
    """`result` as a tensor where `given` is one (on its device), else as an array."""
    return result.to(given.device) if isinstance(given, Tensor) else result.cpu().numpy()
