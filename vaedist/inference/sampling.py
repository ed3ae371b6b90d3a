"""Samples as a picture file would hold them, by any sampler; and pictures of a latent space.

| picture | what it shows |
|---|---|
| interpolation | images on the way from one latent to another |
| traversal | one latent number (of a map: one channel) moved from low to high, the others at the prior's centre |
| manifold | of two latent numbers, the whole prior by its quantiles: Kingma and Welling (2014), figure 4 |

On the way between latents a and b, seen from the prior's centre c, the direction turns evenly and the distance changes
evenly: in many dimensions the straight line would pass near c, where the prior has no mass (White, "Sampling generative
networks", 2016).

Everything is decoded to the mean image. What a variant cannot do is asked of its capabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import Pixels, as_numpy, to_uint8
from vaedist.inference.mixture import Mixture
from vaedist.models.contract import Variant

TOGETHER = 64
"""Images drawn at once: memory stays the same however many are asked for."""
REACH = 3.0
"""A traversal goes so many standard deviations of the prior to both sides."""


class Drawn(NamedTuple):
    """Samples, in order."""

    images: Pixels
    """(n, C, H, W)."""
    codes: NDArray[np.int64] | None
    """(n, h, w), where they were asked for."""


class Sampler:
    """One way of drawing from a model.

    Args:
        model: In evaluation mode.
        seed: Of the noise.
        temperature: As of `Variant.sample`; of a mixture the spread around each component's mean.
        options: Those of `sampling_options` that are set.
        mixture: Draw latents from it; None: from the prior.
        codes: Whether the codes behind the images are wanted.

    Raises:
        NotDefined: the variant does not sample so.
    """

    def __init__(
        self,
        model: Variant,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        options: Mapping[str, Any] | None = None,
        mixture: Mixture | None = None,
        codes: bool = False,
    ) -> None:
        self.model, self.seed, self.temperature = model, seed, temperature
        self.options, self.mixture, self.codes = dict(options or {}), mixture, codes
        unknown = sorted(set(self.options) - model.sampling_options)
        if unknown:
            known = ", ".join(sorted(model.sampling_options)) or "none"
            raise NotDefined(
                f"{unknown[0]} is not defined, because this model's samples are not drawn so (its sampling options: "
                f"{known})"
            )
        if mixture is None and not model.samples:
            raise model.not_defined("sample")
        if mixture is not None:
            _has_numbers(model)
        if codes and model.latent != "codes":
            raise model.not_defined("codes")

    @torch.no_grad()
    def draw(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> Drawn:
        """n samples; number i depends on (seed, first + i, its class) alone.

        Args:
            n: How many; the caller keeps it small.
            first: Number of the first.
            label: Class of each, -1 for none, where the model is conditional.
        """
        if self.codes:
            codes = self.model.sample_codes(n, **self._asked(first, label))
            return Drawn(finite(self.model.decode_codes(codes).mean), as_numpy(codes))
        return Drawn(finite(self.images(n, first, label)), None)

    @torch.no_grad()
    def images(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) in [0, 1]: what `draw` rounds."""
        asked = self._asked(first, label)
        if self.mixture is not None:
            return self.model.decode(self.latents(n, first, label), asked["label"]).mean
        return self.model.sample(n, **asked)

    def _asked(self, first: int, label: Sequence[int] | None) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        told = None if label is None else torch.tensor(list(label), dtype=torch.int64, device=device)
        common = {"seed": self.seed, "first": first, "label": told, "temperature": self.temperature}
        return common | self.options

    @torch.no_grad()
    def latents(self, n: int, first: int = 0, label: Sequence[int] | None = None) -> Tensor:
        """(n, *latent_shape): what samples first .. first + n - 1 are decoded from, by the contract of `sample`.

        Raises:
            NotDefined: the latent is not made of numbers.
        """
        _has_numbers(self.model)
        weight = next(self.model.parameters())
        if self.mixture is not None:
            z = self.mixture.sample(n, seed=self.seed, first=first, label=label, temperature=self.temperature)
            return z.to(weight.device, weight.dtype)
        noise = [
            torch.randn(self.model.latent_shape, generator=generator("sample", self.seed, number))
            for number in range(first, first + n)
        ]
        told = None if label is None else torch.tensor(list(label), dtype=torch.int64, device=weight.device)
        prior = self.model.prior(told)
        return prior.sample(self.temperature * torch.stack(noise).to(weight.device, weight.dtype))


def finite(images: Any) -> Pixels:
    """Images in [0, 1] as uint8.

    Raises:
        UserError: one holds NaN or infinity.
    """
    values = as_numpy(images)
    if not np.isfinite(values).all():
        raise UserError("the images are not finite: the weights are damaged or training diverged")
    return to_uint8(values)


@torch.no_grad()
def decoded(model: Variant, z: Tensor, label: Tensor | None = None) -> Pixels:
    """uint8 (n, C, H, W) means of latents (n, *latent_shape); `label` (n,) or None."""
    _has_numbers(model)
    parts = range(0, len(z), TOGETHER)
    labels = [None if label is None else label[start : start + TOGETHER] for start in parts]
    return np.concatenate(
        [finite(model.decode(z[a : a + TOGETHER], y).mean) for a, y in zip(parts, labels, strict=True)]
    )


def _has_numbers(model: Variant) -> None:
    if model.latent not in ("vector", "map"):
        raise model.not_defined("decode")


# Pictures of a latent space ------------------------------------------------------------------------------------


@torch.no_grad()
def interpolation(model: Variant, a: Tensor, b: Tensor, count: int, label: int | None = None) -> Pixels:
    """uint8 (count, C, H, W) on the way from latent a to latent b, both (*latent_shape), both included."""
    told = _labels(label, 1, a.device)
    centre = _prior_points(model, torch.zeros_like(a)[None], told)[0]
    share = torch.linspace(0, 1, count, device=a.device, dtype=a.dtype).view(-1, *[1] * a.dim())
    z = centre + _between(a - centre, b - centre, share)
    # Exactly the two that were asked for, whatever the arithmetic rounds.
    z[0], z[-1] = a, b
    return decoded(model, z, _labels(label, count, a.device))


def _between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    lengths = a.norm(), b.norm()
    if min(lengths) == 0:
        return a + share * (b - a)
    cosine = ((a / lengths[0]) * (b / lengths[1])).sum().clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-4:  # the same or opposite directions: there is no one plane to turn in
        return a + share * (b - a)
    turned = ((1 - share) * angle).sin() * (a / lengths[0]) + (share * angle).sin() * (b / lengths[1])
    return turned / angle.sin() * ((1 - share) * lengths[0] + share * lengths[1])


@torch.no_grad()
def traversal(
    model: Variant, dimensions: Sequence[int], count: int, *, label: int | None = None, reach: float = REACH
) -> Pixels:
    """uint8 (len(dimensions) * count, C, H, W): a row of `count` images for each latent number, or channel of a map.

    Args:
        model: With a latent of numbers.
        dimensions: Which ones, from 0.
        count: Images in a row, evenly from -reach to reach.
        label: Class, where conditional.
        reach: In standard deviations of the prior.

    Raises:
        UserError: there is no such dimension.
    """
    _has_numbers(model)
    units = model.latent_shape[0]
    wrong = [one for one in dimensions if not 0 <= one < units]
    if wrong:
        what = "dimension" if model.latent == "vector" else "channel"
        raise UserError(f"there is no latent {what} {wrong[0]}: the model has 0 to {units - 1}")
    weight = next(model.parameters())
    noise = torch.zeros(len(dimensions), count, *model.latent_shape, device=weight.device, dtype=weight.dtype)
    steps = torch.linspace(-reach, reach, count, device=weight.device, dtype=weight.dtype)
    for row, one in enumerate(dimensions):
        noise[row, :, one] = steps.view(-1, *[1] * (noise.dim() - 3))
    told = _labels(label, len(dimensions) * count, weight.device)
    return decoded(model, _prior_points(model, noise.flatten(0, 1), told), told)


@torch.no_grad()
def manifold(model: Variant, side: int, *, label: int | None = None, temperature: float = 1.0) -> Pixels:
    """uint8 (side * side, C, H, W), row by row: the quantiles of a two-dimensional prior, upwards and to the right.

    Raises:
        NotDefined: the latent has another number of dimensions.
    """
    _has_numbers(model)
    if model.latent_shape != (2,):
        size = "x".join(str(axis) for axis in model.latent_shape)
        raise NotDefined(
            f"the manifold is not defined, because it is a picture of two latent numbers and this model has {size}"
        )
    weight = next(model.parameters())
    quantiles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    steps = temperature * torch.special.ndtri(quantiles).to(weight.device, weight.dtype)
    down, right = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    told = _labels(label, side * side, weight.device)
    return decoded(model, _prior_points(model, torch.stack([right, down], 2).flatten(0, 1), told), told)


def _prior_points(model: Variant, noise: Tensor, label: Tensor | None) -> Tensor:
    """Latents at these places, in standard deviations from the prior's centre."""
    _has_numbers(model)
    return model.prior(label).sample(noise)


def _labels(label: int | None, n: int, device: torch.device) -> Tensor | None:
    return None if label is None else torch.full((n,), label, dtype=torch.int64, device=device)
