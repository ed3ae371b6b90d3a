"""Settings of `vaedist.models.transformer`, importable without torch."""

from __future__ import annotations

from typing import Literal

from vaedist.models.bases.code_prior_config import PriorConfig
from vaedist.nets.transformer_config import Transformer


class Config(PriorConfig):
    """Settings of `kind: transformer`."""

    kind: Literal["transformer"] = "transformer"
    net: Transformer = Transformer()
