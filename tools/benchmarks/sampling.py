"""Codes/s of a prior that draws maps of 32x32 codes, K = 512.

With its cache (whole maps) and by definition, one full forward per code (the first few codes: every forward costs the
same). Default networks, 1 and 16 maps at once.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.common import Question, Rate

FULL = "one full forward per code"


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    for kind in ("pixelcnn", "transformer"):
        for rows in (1, 16):
            title = f"Sampling, {kind}, 32x32 codes, {rows} at once"
            yield Question(title, "codes/s", samplers(kind, rows), FULL)


def samplers(kind: str, rows: int) -> dict[str, Rate]:
    """Draw `rows` maps at once; a number is codes of all maps per second."""
    import torch

    from vaedist.nets.autoregressive import (
        AutoregressiveNetwork,
        LogitSampler,
        SamplingState,
        UncachedSamplingState,
        generate,
    )
    from vaedist.nets.pixelcnn import GatedPixelCnn
    from vaedist.nets.pixelcnn_config import PixelCnn
    from vaedist.nets.transformer import CausalTransformer
    from vaedist.nets.transformer_config import Transformer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    grid, codes = (32, 32), 512
    network: AutoregressiveNetwork = (
        GatedPixelCnn(PixelCnn(), codes, grid)
        if kind == "pixelcnn"
        else CausalTransformer(Transformer(), codes, grid)
    )
    uniform = torch.rand(rows, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))

    def drawing(begin: Callable[[], SamplingState], count: int) -> Rate:
        def rate() -> float:
            start = time.perf_counter()
            generate(begin(), uniform[:, :count], LogitSampler())
            return rows * count / (time.perf_counter() - start)

        return rate

    return {
        "cached": drawing(lambda: network.start_sampling(rows), uniform.shape[1]),
        FULL: drawing(lambda: UncachedSamplingState(network, rows, None, "cpu"), 4),
    }
