"""Four reconstructions that need no training: what a score is worth is what it adds to these.

| name | the "reconstruction" of a test image |
|---|---|
| `black` | zeros |
| `training mean` | the pixelwise mean of the training images |
| `nearest training image` | the training image at the smallest Euclidean distance |
| `PCA-32` | projection onto the first 32 principal components of the training images |

The principal components come from a randomised subspace iteration (Halko, Martinsson, Tropp: Finding structure with
randomness, 2011): Q = orth((X^T X)^q X^T Omega) with a fixed Gaussian Omega, then the eigenvectors of the small
matrix (X Q)^T (X Q). It reads the training images a chunk at a time, so that memory stays at the uint8
images plus one chunk, whatever their number and size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.pictures import Pixels, to_uint8

NAMES = ("black", "training mean", "nearest training image", "PCA-32")
COMPONENTS = 32
_EXTRA = 32
_ITERATIONS = 10
_CHUNK_BYTES = 64 << 20

_Floats = NDArray[np.floating[Any]]


class Baselines:
    """The four baselines, fitted on training images.

    Args:
        training: uint8 (N, C, H, W), N >= 1; kept, not copied.
    """

    def __init__(self, training: Pixels) -> None:
        assert training.dtype == np.uint8 and training.ndim == 4 and len(training) > 0
        self.shape = training.shape[1:]
        self._training = training.reshape(len(training), -1)
        self._mean = self._training.mean(axis=0, dtype=np.float64).astype(np.float32) / 255
        self._squares = np.concatenate([(chunk**2).sum(axis=1) for chunk in self._centred()])
        self._components = self._principal_components()

    def reconstruct(self, images: Pixels) -> dict[str, Pixels]:
        """Name to uint8 (B, C, H, W), for uint8 (B, C, H, W)."""
        assert images.shape[1:] == self.shape, f"images of {images.shape[1:]}, fitted on {self.shape}"
        flat = images.reshape(len(images), -1).astype(np.float32) / 255 - self._mean
        projected = flat @ self._components @ self._components.T + self._mean
        mean = np.broadcast_to(to_uint8(self._mean), flat.shape)
        found = {
            "black": np.zeros_like(images),
            "training mean": mean,
            "nearest training image": self._training[self._nearest(flat)],
            f"PCA-{COMPONENTS}": to_uint8(projected),
        }
        return {name: pictures.reshape(images.shape) for name, pictures in found.items()}

    def _centred(self) -> Iterator[_Floats]:
        """The training images minus their mean, float32 (n, D), a chunk at a time."""
        rows = max(1, _CHUNK_BYTES // (4 * self._training.shape[1]))
        for start in range(0, len(self._training), rows):
            yield self._training[start : start + rows].astype(np.float32) / 255 - self._mean

    def _nearest(self, flat: _Floats) -> NDArray[np.intp]:
        """Row number of the nearest training image; the first one where several are equally near."""
        # |x - t|^2 = |x|^2 - 2 x.t + |t|^2, and |x|^2 is the same for every t.
        products = np.concatenate([flat @ chunk.T for chunk in self._centred()], axis=1)
        return np.argmin(self._squares - 2 * products, axis=1)

    def _principal_components(self) -> _Floats:
        """Orthonormal columns (D, k), k = 32 or what the training images span."""
        count, size = self._training.shape
        wide = min(COMPONENTS + _EXTRA, count, size)
        generator = np.random.Generator(np.random.PCG64(0))
        basis = generator.standard_normal((size, wide), dtype=np.float32)
        for _ in range(_ITERATIONS):
            basis, _ = np.linalg.qr(self._scatter(basis))
        _, vectors = np.linalg.eigh(basis.T @ self._scatter(basis))
        kept = min(COMPONENTS, wide)
        components: _Floats = basis @ vectors[:, ::-1][:, :kept]
        return components

    def _scatter(self, basis: _Floats) -> _Floats:
        """X^T X basis for the centred training images X (N, D)."""
        total = np.zeros_like(basis)
        for chunk in self._centred():
            total += chunk.T @ (chunk @ basis)
        return total
