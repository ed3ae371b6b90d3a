"""Hashes that say which images a packed folder holds, whatever its codec, shards and order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from vaedist.data.format.split import Split


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """SHA-256 of a decoded image, (C, H, W) uint8: the `pixels` column."""
    assert image.dtype == np.uint8 and image.ndim == 3
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def sample_digests(splits: Iterable[Split]) -> Iterator[tuple[str, str, int, bytes]]:
    """(split, key, label, pixel digest) of every sample: what `data_identity` hashes."""
    for split in splits:
        for columns in split.all_columns():
            for key, label, digest in zip(columns.keys, columns.label.tolist(), columns.pixels, strict=True):
                yield split.name, key, label, digest.tobytes()


def data_identity(samples: Iterable[tuple[str, str, int, bytes]], shape: tuple[int, ...]) -> str:
    """The data identity: 64 hex digits, whatever the codec, the shards and the order of `samples`.

    Args:
        samples: (split, key, label, pixel digest) of every sample. 32 bytes of memory each.
        shape: (C, H, W) of the images.
    """
    rows = bytearray()
    for split, key, label, digest in samples:
        rows += hashlib.sha256(f"{split}\0{key}\0{label}\0".encode() + digest).digest()
    ordered = np.sort(np.frombuffer(bytes(rows), "S32"))
    return hashlib.sha256(f"vaedist {tuple(shape)} {len(ordered)}\0".encode() + ordered.tobytes()).hexdigest()
