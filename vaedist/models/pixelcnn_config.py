"""Settings of `vaedist.models.pixelcnn`, importable without torch."""

from __future__ import annotations

from typing import Literal

from vaedist.models.bases.code_prior_config import PriorConfig
from vaedist.nets.pixelcnn_config import PixelCnn


class Config(PriorConfig):
    """Settings of `kind: pixelcnn`."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    net: PixelCnn = PixelCnn()
