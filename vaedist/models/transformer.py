"""Causal transformer over a frozen tokenizer's codes: `vaedist.nets.transformer`, `vaedist.models.bases.code_prior`."""

from __future__ import annotations

from torch import nn

from vaedist.models.bases.code_prior import CodePrior
from vaedist.models.transformer_config import Config
from vaedist.nets.transformer import CausalTransformer


class Model(CodePrior):
    """See the module."""

    config: Config

    def network(self, codes: int, grid: tuple[int, int], labels: int) -> nn.Module:
        return CausalTransformer(self.config.net, codes, grid, labels)
