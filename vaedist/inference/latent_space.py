"""Images along paths through a latent space.

| images | what they show |
|---|---|
| interpolation | the way from one latent to another |
| traversal | one latent number (of a map: one channel) moved from low to high, the others at the prior's center |
| manifold | of two latent numbers, the whole prior by its quantiles: Kingma and Welling (2014), figure 4 |

From latent a to latent b, seen from the prior's center c, the direction turns evenly and the distance changes evenly:
in many dimensions the straight line would pass near c, where the prior has no mass (White, "Sampling generative
networks", 2016).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import Pixels
from vaedist.inference.sampling import decode_to_pixels, label_tensor, require_numeric_latent
from vaedist.models.contract import Variant

TRAVERSAL_REACH = 3.0
"""A traversal goes so many standard deviations of the prior to both sides."""


@torch.no_grad()
def interpolation(model: Variant, a: Tensor, b: Tensor, count: int, label: int | None = None) -> Pixels:
    """uint8 (count, C, H, W) on the way from latent a to latent b, both (*latent_shape), both included."""
    require_numeric_latent(model)
    center = model.prior(_labels(label, 1, a.device)).sample(torch.zeros_like(a)[None])[0]
    share = torch.linspace(0, 1, count, device=a.device, dtype=a.dtype).view(-1, *[1] * a.dim())
    z = center + _between(a - center, b - center, share)
    # Exactly the given ends, without rounding.
    z[0], z[-1] = a, b
    return decode_to_pixels(model, z, _labels(label, count, a.device))


def _between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    lengths = a.norm(), b.norm()
    if min(lengths) == 0:
        return a + share * (b - a)
    cosine = ((a / lengths[0]) * (b / lengths[1])).sum().clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle.sin() < 1e-4:  # the same or opposite directions span no plane to turn in
        return a + share * (b - a)
    turned = ((1 - share) * angle).sin() * (a / lengths[0]) + (share * angle).sin() * (b / lengths[1])
    return turned / angle.sin() * ((1 - share) * lengths[0] + share * lengths[1])


@torch.no_grad()
def traversal(
    model: Variant,
    dimensions: Sequence[int],
    count: int,
    *,
    label: int | None = None,
    reach: float = TRAVERSAL_REACH,
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
    require_numeric_latent(model)
    units = model.latent_shape[0]
    wrong = [unit for unit in dimensions if not 0 <= unit < units]
    if wrong:
        what = "dimension" if model.latent == "vector" else "channel"
        raise UserError(f"there is no latent {what} {wrong[0]}: the model has 0 to {units - 1}")
    weight = next(model.parameters())
    noise = torch.zeros(len(dimensions), count, *model.latent_shape, device=weight.device, dtype=weight.dtype)
    steps = torch.linspace(-reach, reach, count, device=weight.device, dtype=weight.dtype)
    for row, unit in enumerate(dimensions):
        noise[row, :, unit] = steps.view(-1, *[1] * (noise.dim() - 3))
    return _decode_points(model, noise.flatten(0, 1), label)


@torch.no_grad()
def manifold(model: Variant, side: int, *, label: int | None = None, temperature: float = 1.0) -> Pixels:
    """uint8 (side * side, C, H, W), row by row: the quantiles of a two-dimensional prior, upwards and to the right.

    Raises:
        NotDefined: the latent has another number of dimensions.
    """
    require_numeric_latent(model)
    if model.latent_shape != (2,):
        size = "x".join(str(axis) for axis in model.latent_shape)
        raise NotDefined(
            f"the manifold is not defined, because it is a picture of two latent numbers and this model has {size}"
        )
    weight = next(model.parameters())
    quantiles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    steps = temperature * torch.special.ndtri(quantiles).to(weight.device, weight.dtype)
    down, right = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    return _decode_points(model, torch.stack([right, down], 2).flatten(0, 1), label)


def _decode_points(model: Variant, noise: Tensor, label: int | None) -> Pixels:
    """The images of latents that lie `noise` (n, *latent_shape) standard deviations from the prior's center."""
    labels = _labels(label, len(noise), noise.device)
    return decode_to_pixels(model, model.prior(labels).sample(noise), labels)


def _labels(label: int | None, n: int, device: torch.device) -> Tensor | None:
    return None if label is None else label_tensor([label] * n, device)
