"""Four reconstructions that need no training: what a score is worth is what it adds to these.

| name | the "reconstruction" of a test image |
|---|---|
| `black` | zeros |
| `training mean` | the pixelwise mean of the training images |
| `nearest training image` | the training image at the smallest Euclidean distance |
| `PCA-k` | projection onto the first k principal components of the training images |

k is the number of latent numbers of the model it stands beside (`latent_size`), so both pass an image through a
bottleneck of the same width; of a map of codes it is the number of codes, although a code holds far less than a
component. Fewer training images than components span fewer: k is then what they span. The name says k.

Where the training images are few, or their pixels, the components are exact: eigenvectors of X X^T or X^T X, whichever
is smaller. Else they are 256 at most, from a randomized subspace iteration (Halko, Martinsson, Tropp: Finding structure
with randomness, 2011): Q = orth((X^T X)^q X^T Omega) with a fixed Gaussian Omega, then the eigenvectors of the small
matrix (X Q)^T (X Q). Both read the training images a chunk at a time, so that memory stays at the uint8
images plus one chunk, whatever their number and size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaedist.core.imaging import Pixels, to_uint8
from vaedist.models.contract import Variant

COMPONENTS = 32
_EXTRA = 32
_LARGEST_EXACT = 4096
_MOST_ITERATED = 256
"""Components of the iteration: its cost grows with them."""
_ITERATIONS = 10
_CHUNK_BYTES = 64 << 20

_Floats = NDArray[np.floating[Any]]


@torch.no_grad()
def latent_size(model: Variant) -> int:
    """Numbers in a latent of the model, or codes; 32 where it has none."""
    if model.latent == "codes":
        device = next(model.parameters()).device
        black = torch.zeros((1, *model.spec.image_shape), dtype=torch.uint8, device=device)
        return model.codes(black).numel()
    return math.prod(model.latent_shape) if model.latent_shape else COMPONENTS


class Baselines:
    """The four baselines, fitted on training images.

    Args:
        training: uint8 (N, C, H, W), N >= 1; kept, not copied.
        components: Most principal components.
    """

    def __init__(self, training: Pixels, components: int = COMPONENTS) -> None:
        assert training.dtype == np.uint8 and training.ndim == 4 and len(training) > 0
        self.shape = training.shape[1:]
        self._training = training.reshape(len(training), -1)
        self._mean = self._training.mean(axis=0, dtype=np.float64).astype(np.float32) / 255
        self._squares = np.concatenate([(chunk**2).sum(axis=1) for _, chunk in self._centered()])
        self._components = self._principal_components(min(components, len(training) - 1, self._mean.size))
        self.names = ("black", "training mean", "nearest training image", f"PCA-{self._components.shape[1]}")

    def reconstruct(self, images: Pixels) -> dict[str, Pixels]:
        """Name to uint8 (B, C, H, W), for uint8 (B, C, H, W)."""
        assert images.shape[1:] == self.shape, f"images of {images.shape[1:]}, fitted on {self.shape}"
        flat = images.reshape(len(images), -1).astype(np.float32) / 255 - self._mean
        projected = flat @ self._components @ self._components.T + self._mean
        mean = np.broadcast_to(to_uint8(self._mean), flat.shape)
        found = (np.zeros_like(images), mean, self._training[self._nearest(flat)], to_uint8(projected))
        named = zip(self.names, found, strict=True)
        return {name: pictures.reshape(images.shape) for name, pictures in named}

    def _centered(self) -> Iterator[tuple[slice, _Floats]]:
        """The training images minus their mean, float32 (n, D), and their numbers, a chunk at a time."""
        rows = max(1, _CHUNK_BYTES // (4 * self._training.shape[1]))
        for start in range(0, len(self._training), rows):
            part = self._training[start : start + rows]
            yield slice(start, start + len(part)), part.astype(np.float32) / 255 - self._mean

    def _nearest(self, flat: _Floats) -> NDArray[np.intp]:
        """Row number of the nearest training image; the first one where several are equally near."""
        # |x - t|^2 = |x|^2 - 2 x.t + |t|^2, and |x|^2 is the same for every t.
        products = np.concatenate([flat @ chunk.T for _, chunk in self._centered()], axis=1)
        return np.argmin(self._squares - 2 * products, axis=1)

    def _principal_components(self, kept: int) -> _Floats:
        """Orthonormal columns (D, k), k = `kept` or what the iteration may take."""
        count, size = self._training.shape
        if kept == 0:
            return np.zeros((size, 0), np.float32)
        # The exact way costs `small` passes over the images, the iteration two of `wide` columns each.
        wide = min(min(kept, _MOST_ITERATED) + _EXTRA, count, size)
        small = min(count, size)
        if small <= min(_LARGEST_EXACT, max(kept, 2 * (_ITERATIONS + 1) * wide)):
            return self._exact(kept)
        generator = np.random.Generator(np.random.PCG64(0))
        basis = generator.standard_normal((size, wide), dtype=np.float32)
        for _ in range(_ITERATIONS):
            basis, _ = np.linalg.qr(self._scatter(basis))
        _, vectors = np.linalg.eigh(basis.T @ self._scatter(basis))
        components: _Floats = basis @ vectors[:, ::-1][:, : min(kept, _MOST_ITERATED)]
        return components

    def _exact(self, kept: int) -> _Floats:
        count, size = self._training.shape
        if size <= count:
            _, vectors = np.linalg.eigh(self._scatter(np.eye(size, dtype=np.float32)))
            return np.ascontiguousarray(vectors[:, ::-1][:, :kept])
        gram = np.zeros((count, count), np.float64)
        for rows, part in self._centered():
            for columns, other in self._centered():
                if columns.start > rows.start:
                    break
                gram[rows, columns] = part @ other.T
                gram[columns, rows] = gram[rows, columns].T
        _, vectors = np.linalg.eigh(gram)
        chosen = vectors[:, ::-1][:, :kept].astype(np.float32)
        total = np.zeros((size, kept), np.float32)
        for rows, part in self._centered():
            total += part.T @ chosen[rows]
        # Columns of the smallest eigenvalues would carry rounding alone: made orthonormal again, they cannot harm.
        basis, _ = np.linalg.qr(total)
        return basis

    def _scatter(self, basis: _Floats) -> _Floats:
        """X^T X basis for the centered training images X (N, D)."""
        total = np.zeros_like(basis)
        for _, chunk in self._centered():
            total += chunk.T @ (chunk @ basis)
        return total
