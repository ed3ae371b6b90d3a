"""vaedist: from a folder of images to trained, evaluated and sampled variational autoencoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vaedist.inference.trained_model import TrainedModel

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, *, weights: str | None = None, device: str = "cpu") -> TrainedModel:
    """Open a trained run, to sample, reconstruct, encode and decode: see `vaedist.inference.trained_model`.

    Args:
        path: A run folder (its best checkpoint), or one checkpoint in it, or an exported folder.
        weights: `ema` or `raw`; default: what the job says everything downstream uses.
        device: `cpu` or `cuda`.

    Raises:
        UserError: there is no such run, or it is damaged.
    """
    from vaedist.inference.trained_model import TrainedModel  # not earlier: commands start without torch

    return TrainedModel.open(path, weights=weights, device=device)
