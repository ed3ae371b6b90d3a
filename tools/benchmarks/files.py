"""Images/s of samples that end in files, beside those of the decoder alone.

The pretrained VAE of MNIST, one thread: into one npz file, into WebDataset tars, and decoded and thrown away. Each
image's latents come from a generator of its own (image i depends on the seed and i alone), for which the decoder's row
does not pay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Question, Rate

COUNT = 4096
ALONE = "the decoder alone"


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    yield Question(f"{COUNT:,} samples of the pretrained VAE of MNIST", "images/s", ways(), ALONE)


def ways() -> dict[str, Rate]:
    import torch

    from vaedist.metrics.drawing import TOGETHER, Sampler
    from vaedist.training import show
    from vaedist.training.run import open_run

    torch.set_num_threads(1)
    run = open_run(Path(__file__).resolve().parents[2] / "jobs" / "pretrained" / "vae_mnist")

    def files(kind: str) -> Rate:
        def rate() -> float:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                start = time.perf_counter()
                show.samples(
                    run,
                    Sampler(run.model, seed=0),
                    show.Target(str(place / "s.png"), str(place / "s.npz") if kind == "npz" else None),
                    count=COUNT,
                    columns=32,
                    tar=str(place / "tars") if kind == "tars" else None,
                )
                return COUNT / (time.perf_counter() - start)

        return rate

    def alone() -> float:
        latents = torch.randn(TOGETHER, 16)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(COUNT // TOGETHER):
                pixels = run.model.decode(latents).mean
        assert pixels.shape[1:] == (1, 28, 28)
        return COUNT / (time.perf_counter() - start)

    return {"into an npz file": files("npz"), "into tars": files("tars"), ALONE: alone}
