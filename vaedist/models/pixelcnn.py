"""Gated PixelCNN over a frozen tokenizer's codes: see `vaedist.nets.pixelcnn` and `vaedist.models.bases.code_prior`."""

from __future__ import annotations

from torch import nn

from vaedist.models.bases.code_prior import CodePrior
from vaedist.models.pixelcnn_config import Config
from vaedist.nets.pixelcnn import GatedPixelCnn


class Model(CodePrior):
    """See the module."""

    config: Config

    def network(self, codes: int, grid: tuple[int, int], labels: int) -> nn.Module:
        return GatedPixelCnn(self.config.net, codes, grid, labels)
