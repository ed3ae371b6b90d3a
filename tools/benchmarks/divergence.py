"""The MMD of a global batch and its gradient: time, and peak memory beyond that of `import torch`.

Ours (seven scales, by matrix products) beside the earlier systems' way, which writes out B x B x D differences for one
kernel. D = 128.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Question, Rate, peak_mib

BATCH, DIMENSIONS = 1024, 128
TILED = "tiled B x B x D, one kernel"


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    from vaedist.nets.divergences_config import Imq

    ways: dict[str, Callable[[Any, Any], Any]] = {
        "vaedist, unbiased, seven scales": lambda x, y: ours(x, y, None),
        f"vaedist, blocks of {BATCH // 8}": lambda x, y: ours(x, y, BATCH // 8),
        TILED: tiled,
    }
    assert Imq().block is None
    title = f"MMD and its gradient, B = {BATCH:,}, D = {DIMENSIONS}"
    yield Question(title, "s", {name: seconds(way) for name, way in ways.items()}, TILED)
    calls = (
        "once(lambda x, y: ours(x, y, None))",
        f"once(lambda x, y: ours(x, y, {BATCH // 8}))",
        "once(tiled)",
    )
    yield Question(
        f"Memory of the MMD, B = {BATCH:,}, D = {DIMENSIONS}",
        "MiB",
        {name: memory(call) for name, call in zip(ways, calls, strict=True)},
        TILED,
        once=True,
    )


def ours(x: Any, y: Any, block: int | None) -> Any:
    from vaedist.nets.divergences import mmd
    from vaedist.nets.divergences_config import Imq

    return mmd(x, y, Imq(block=block))


def tiled(x: Any, y: Any) -> Any:
    """exp(-|x - y|^2 / D^2) with every difference written out."""

    def mean(a: Any, b: Any) -> Any:
        gaps = a[:, None, :] - b[None, :, :]
        return (-gaps.square().mean(2) / a.shape[1]).exp().mean()

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def once(way: Callable[[Any, Any], Any]) -> None:
    import torch

    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, DIMENSIONS, generator=numbers).requires_grad_()
    y = torch.randn(BATCH, DIMENSIONS, generator=numbers)
    way(x, y).backward()


def seconds(way: Callable[[Any, Any], Any]) -> Rate:
    def rate() -> float:
        start = time.perf_counter()
        once(way)
        return time.perf_counter() - start

    return rate


def memory(call: str) -> Rate:
    """Beyond that of a process that takes a small product in the same libraries."""

    def mib() -> float:
        imports = "import torch, vaedist.nets.divergences; from benchmarks.divergence import *"
        small = "torch.ones(8, 8, requires_grad=True).matmul(torch.ones(8, 8)).sum().backward()"
        return peak_mib(f"{imports}; {call}") - peak_mib(f"{imports}; {small}")

    return mib
