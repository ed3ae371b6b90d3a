"""Gated PixelCNN over a frozen tokenizer's codes: see `vaedist.nets.pixelcnn` and `vaedist.models.bases.code_prior`."""

from __future__ import annotations

from typing import Literal

from torch import nn

from vaedist.models.bases.code_prior import CodePrior, PriorConfig
from vaedist.nets.pixelcnn import GatedPixelCnn, PixelCnn


class Config(PriorConfig):
    """Settings of `kind: pixelcnn`."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    net: PixelCnn = PixelCnn()


class Model(CodePrior):
    """See the module."""

    config: Config

    def network(self, codes: int, grid: tuple[int, int], labels: int) -> nn.Module:
        return GatedPixelCnn(self.config.net, codes, grid, labels)
