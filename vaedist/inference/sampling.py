"""Drawing samples from a model: from its prior, or from a mixture fitted to its latents. Decoded to mean images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import generator
from vaedist.core.errors import NotDefined, UserError, did_you_mean
from vaedist.core.imaging import Pixels, as_numpy, to_uint8
from vaedist.inference.mixture import Mixture
from vaedist.models.contract import Variant
from vaedist.runs.open_run import Run

SAMPLE_BATCH = 64
"""Images drawn at once, so that memory does not depend on how many are asked for."""
_CLASSES_NAMED = 64


class SampleBatch(NamedTuple):
    """Samples, in order."""

    images: Pixels
    """(n, C, H, W)."""
    codes: NDArray[np.int64] | None
    """(n, h, w), where they were asked for."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """One way of drawing from a model.

    Args:
        model: In evaluation mode.
        seed: Of the noise.
        temperature: As of `Variant.sample`; of a mixture the spread around each component's mean.
        options: Those of `sampling_options` that are set.
        mixture: Draw latents from it; None: from the prior.
        codes: Whether samples come with their codes.

    Raises:
        NotDefined: the variant does not sample so.
    """

    model: Variant
    _: KW_ONLY
    seed: int = 0
    temperature: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mixture | None = None
    codes: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.options) - self.model.sampling_options)
        if unknown:
            known = ", ".join(sorted(self.model.sampling_options)) or "none"
            raise NotDefined(
                f"{unknown[0]} is not defined, because this model's samples are not drawn so (its sampling options: "
                f"{known})"
            )
        if self.mixture is not None:
            require_numeric_latent(self.model)
        elif not self.model.samples:
            raise self.model.not_defined("sample")
        if self.codes and self.model.latent != "codes":
            raise self.model.not_defined("codes")

    @torch.no_grad()
    def draw(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> SampleBatch:
        """n samples; number i depends on (seed, first + i, its class) alone.

        Args:
            n: How many; the caller keeps it small.
            first: Number of the first.
            label: Class of each, -1 for none, where the model is conditional.
        """
        if self.codes:
            codes = self.model.sample_codes(n, **self._asked(first, label))
            return SampleBatch(finite_pixels(self.model.decode_codes(codes).mean), as_numpy(codes))
        return SampleBatch(finite_pixels(self.images(n, first, label)), None)

    @torch.no_grad()
    def images(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) in [0, 1]: what `draw` rounds."""
        asked = self._asked(first, label)
        if self.mixture is not None:
            return self.model.decode(self.latents(n, first, label), asked["label"]).mean
        return self.model.sample(n, **asked)

    def _asked(self, first: int, label: Sequence[int] | None) -> dict[str, Any]:
        labels = label_tensor(label, next(self.model.parameters()).device)
        common = {"seed": self.seed, "first": first, "label": labels, "temperature": self.temperature}
        return common | dict(self.options)

    @torch.no_grad()
    def latents(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> Tensor:
        """(n, *latent_shape): what samples first .. first + n - 1 are decoded from, by the contract of `sample`.

        Raises:
            NotDefined: the latent is not made of numbers.
        """
        require_numeric_latent(self.model)
        weight = next(self.model.parameters())
        if self.mixture is not None:
            z = self.mixture.sample(n, seed=self.seed, first=first, label=label, temperature=self.temperature)
            return z.to(weight.device, weight.dtype)
        noise = [
            torch.randn(self.model.latent_shape, generator=generator("sample", self.seed, number))
            for number in range(first, first + n)
        ]
        prior = self.model.prior(label_tensor(label, weight.device))
        return prior.sample(self.temperature * torch.stack(noise).to(weight.device, weight.dtype))


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


def single_class(classes: Sequence[int] | None) -> int | None:
    """The one class, or None for none. A model that was not trained without classes refuses it."""
    return None if classes is None or classes[0] < 0 else classes[0]


def label_tensor(labels: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """int64 (n,) class numbers as a model takes them; None for none."""
    return None if labels is None else torch.tensor(list(labels), dtype=torch.int64, device=device)


def finite_pixels(images: Any) -> Pixels:
    """Images in [0, 1] as uint8.

    Raises:
        UserError: one holds NaN or infinity.
    """
    values = as_numpy(images)
    if not np.isfinite(values).all():
        raise UserError("the images are not finite: the weights are damaged or training diverged")
    return to_uint8(values)


@torch.no_grad()
def decode_to_pixels(model: Variant, z: Tensor, label: Tensor | None = None) -> Pixels:
    """uint8 (n, C, H, W) means of latents (n, *latent_shape); `label` (n,) or None."""
    require_numeric_latent(model)
    pixels = []
    for start in range(0, len(z), SAMPLE_BATCH):
        part = slice(start, start + SAMPLE_BATCH)
        pixels.append(finite_pixels(model.decode(z[part], None if label is None else label[part]).mean))
    return np.concatenate(pixels)


def require_numeric_latent(model: Variant, operation: str = "decode") -> None:
    """Refuse `operation` for a model whose latent is codes, or that has none."""
    if model.latent not in ("vector", "map"):
        raise model.not_defined(operation)
