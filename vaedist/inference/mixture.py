"""Where a model's latents really lie: a Gaussian mixture fitted to the training images' latents, after training.

    q(z) = 1/N sum_n q(z | x_n)   is approached by   sum_k w_k N(z; m_k, S_k)

A decoder is trained on latents from q(z) only. Where the prior covers more than that (a weak or absent KL term),
decoding draws from the mixture instead of the prior gives better samples at no cost to training: "ex-post density
estimation", Ghosh, Sajjadi, Vergari, Black, Schoelkopf, "From variational to deterministic autoencoders" (2020),
section 4, who take 10 components with full covariances, as is done here by default. It is fitted to one draw from
each posterior, the latents that the decoder was trained on. Of a conditional model the latents depend on the class,
so each class has a mixture of its own.

Few images fit few parameters: a component with a full covariance is given at least 2 D images, and below 2 D images in
all (or in very wide latents) covariances are diagonal.

A sample's draw depends on (seed, number, class) alone. A mixture is stored as safetensors: plain arrays, no code.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.core.context import generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.evaluation.metrics.latents import Latents

COMPONENTS = 10
_LARGEST_FULL = 512
"""Latent numbers up to which covariances are full."""
_FIT_WORK = 100_000_000_000
"""Most N * K * D^2 multiplications in one round of the fit; of more images every n-th is taken."""
_DIAGONAL_IMAGES = 10
"""Images for each diagonal component, at least."""
_SEEDS = 2**32


class MixtureParameters(NamedTuple):
    """One mixture of K components over D numbers, fp64."""

    weights: NDArray[np.float64]
    """(K,), sum 1."""
    means: NDArray[np.float64]
    """(K, D)."""
    factors: NDArray[np.float64]
    """(K, D, D) lower triangles L with L L' the covariance; (K, D) standard deviations of diagonal ones."""


@dataclass(frozen=True)
class Mixture:
    """A density of latents."""

    parts: tuple[MixtureParameters, ...]
    """One; of a conditional model one for each class."""
    shape: tuple[int, ...]
    """Of one latent."""
    images: int
    """How many it was fitted to."""

    def __str__(self) -> str:
        counts = sorted({len(part.weights) for part in self.parts})
        number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        kind = "full" if self.parts[0].factors.ndim == 3 else "diagonal"
        each = f" for each of {len(self.parts)} classes" if len(self.parts) > 1 else ""
        return (
            f"Gaussian mixture of {number} components ({kind} covariances){each}, fitted to {self.images:,} training "
            "latents"
        )

    def sample(
        self,
        n: int,
        *,
        seed: int,
        first: int = 0,
        label: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """(n, *shape) fp32 latents; number i depends on (seed, first + i, its class) alone.

        Args:
            n, seed, first: As for a variant's `sample`.
            label: The class of each, where there is a mixture for each class.
            temperature: Spread around the mean of each component.

        Raises:
            NotDefined: a class is asked of a mixture that has none for it.
        """
        rows = []
        for i in range(n):
            part = self.parts[0]
            if len(self.parts) > 1:
                if label is None or not 0 <= label[i] < len(self.parts):
                    raise NotDefined(
                        "samples without a class are not defined, because each class has a Gaussian mixture of its "
                        "own: name a class"
                    )
                part = self.parts[label[i]]
            draw = generator("mixture", seed, first + i)
            uniform = float(torch.rand((), generator=draw, dtype=torch.float64))
            chosen = min(
                int(np.searchsorted(np.cumsum(part.weights), uniform, side="right")), len(part.weights) - 1
            )
            noise = (
                temperature * torch.randn(part.means.shape[1], generator=draw, dtype=torch.float64).numpy()
            )
            factor = part.factors[chosen]
            rows.append(part.means[chosen] + (factor @ noise if factor.ndim == 2 else factor * noise))
        return torch.from_numpy(np.stack(rows)).float().unflatten(1, self.shape)

    # On disk

    def to_bytes(self, stamp: Mapping[str, str | int]) -> bytes:
        """A safetensors file; `stamp` says what the mixture was fitted to, and `from_bytes` requires the same."""
        from safetensors.numpy import save

        arrays = {
            f"{number}.{name}": np.ascontiguousarray(getattr(part, name))
            for number, part in enumerate(self.parts)
            for name in MixtureParameters._fields
        }
        note = {"stamp": dict(stamp), "shape": list(self.shape), "images": self.images}
        return save(arrays, {"vaedist": json.dumps(note, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, stamp: Mapping[str, str | int], where: object) -> Mixture:
        """What `to_bytes` wrote.

        Raises:
            UserError: it is damaged, of another making, or was fitted to something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(content)
            size = int.from_bytes(content[:8], "little")
            note = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["vaedist"])
            shape = tuple(int(side) for side in note["shape"])
            parts = tuple(
                MixtureParameters(*(arrays[f"{number}.{name}"] for name in MixtureParameters._fields))
                for number in range(len(arrays) // len(MixtureParameters._fields))
            )
            sound = bool(parts) and all(_is_sound(part, int(np.prod(shape))) for part in parts)
            mixture = cls(parts, shape, int(note["images"]))
            right = note["stamp"] == dict(stamp)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            sound = right = False
        if not (sound and right):
            why = "is damaged" if not sound else "was fitted to other weights or data"
            raise UserError(
                f"{where} {why}: remove it, and the density is fitted anew from the training data"
            )
        return mixture


def _is_sound(part: MixtureParameters, dimensions: int) -> bool:
    count = len(part.weights)
    return (
        all(array.dtype == np.float64 and np.isfinite(array).all() for array in part)
        and part.weights.shape == (count,)
        and bool((part.weights >= 0).all())
        and abs(float(part.weights.sum()) - 1) < 1e-6
        and part.means.shape == (count, dimensions)
        and part.factors.shape in ((count, dimensions), (count, dimensions, dimensions))
    )


def fit_mixture(
    latents: Latents, *, classes: int | None = None, components: int = COMPONENTS, seed: int = 0
) -> Mixture:
    """The mixture of the training images' latents.

    Args:
        latents: Of the training split.
        classes: How many, where the model is conditional: a mixture for each.
        components: At most; fewer where images are few.
        seed: Of the start.

    Raises:
        UserError: a class has fewer than two images, or a latent is not finite.
    """
    if not torch.isfinite(latents.samples).all():
        raise UserError("latents are not finite: the weights are damaged or training diverged")
    dimensions = latents.samples.shape[1]
    work = len(latents.samples) * components * dimensions**2
    latents = latents.every(-(-work // _FIT_WORK))
    rows = latents.samples.double().numpy()
    labels = latents.labels.numpy()
    groups = [rows] if classes is None else [rows[labels == label] for label in range(classes)]
    few = [label for label, group in enumerate(groups) if len(group) < 2]
    if few:
        where = "the training data" if classes is None else f"class {few[0]} of the training data"
        raise UserError(f"{where} has too few images to fit a density to its latents: 2 are needed")
    smallest = min(map(len, groups))
    full = 2 * dimensions <= smallest and dimensions <= _LARGEST_FULL
    return Mixture(
        tuple(_fit(group, components, full=full, seed=seed) for group in groups), latents.shape, len(rows)
    )


def _fit(rows: NDArray[np.float64], components: int, *, full: bool, seed: int) -> MixtureParameters:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    each = 2 * rows.shape[1] if full else _DIAGONAL_IMAGES
    count = max(1, min(components, len(rows) // each))
    mixture = GaussianMixture(
        count, covariance_type="full" if full else "diag", random_state=seed % _SEEDS, max_iter=100
    )
    with warnings.catch_warnings():
        # A fit that still creeps after 100 rounds is a fine density, and a component may vanish from a small set.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(rows)
    factors = np.linalg.cholesky(mixture.covariances_) if full else np.sqrt(mixture.covariances_)
    return MixtureParameters(
        np.asarray(mixture.weights_, np.float64) / float(np.sum(mixture.weights_)),
        np.asarray(mixture.means_, np.float64),
        np.asarray(factors, np.float64),
    )
