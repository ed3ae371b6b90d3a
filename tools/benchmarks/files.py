"""Images/s of samples that end in files, beside those of the decoder alone.

One thread, two models: the pretrained VAE of MNIST, whose 28x28 images cost less than the headers of a tar, and the
convolutional VAE of jobs/vae_phantom.yaml at 64x64, untrained. Each into one npz file, into WebDataset tars, and
decoded and thrown away. Each image's latents come from a generator of its own (image i depends on the seed and on i
alone), for which the decoder's row does not pay.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Question, Rate, packed

JOBS = Path(__file__).resolve().parents[2] / "jobs"
ALONE = "the decoder alone"


def questions(folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    import torch

    from vaedist.runs.open_run import open_run

    torch.set_num_threads(1)
    pretrained = open_run(JOBS / "pretrained" / "vae_mnist")
    yield Question("4,096 samples of the pretrained VAE of MNIST", "images/s", ways(pretrained, 4096), ALONE)
    untrained = open_run(one_step(folder))
    yield Question("4,096 samples of a VAE of 64x64", "images/s", ways(untrained, 4096), ALONE)


def one_step(folder: Path) -> Path:
    """A run of jobs/vae_phantom.yaml, made once."""
    from vaedist.config.job import load_job
    from vaedist.distributed.process_group import Group
    from vaedist.runs.fit_options import FitOptions
    from vaedist.training.loop import fit

    run = folder / "vae_phantom"
    if not run.exists():
        overrides = [
            f"data.path={packed(folder, size=64, train=640)}",
            "train.epochs=null",
            "train.threads=1",
        ]
        overrides += [f"train.{name}=1" for name in ("steps", "log_every", "validate_every", "save_every")]
        job = load_job(JOBS / "vae_phantom.yaml", overrides)
        fit(job, run, group=Group.join("cpu"), options=FitOptions(quiet=True))
    return run


def ways(run: Any, count: int) -> dict[str, Rate]:
    """Contestants that draw `count` images of a run; a multiple of those that are drawn together."""
    import torch

    from vaedist.inference.picture_files import PictureFiles
    from vaedist.inference.sample_files import write_samples
    from vaedist.inference.sampling import SAMPLE_BATCH, Sampler

    assert count % SAMPLE_BATCH == 0

    def files(kind: str) -> Rate:
        def rate() -> float:
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch)
                start = time.perf_counter()
                write_samples(
                    run,
                    Sampler(run.model, seed=0),
                    PictureFiles(str(place / "s.png"), str(place / "s.npz") if kind == "npz" else None),
                    count=count,
                    columns=32,
                    tar=str(place / "tars") if kind == "tars" else None,
                )
                return count / (time.perf_counter() - start)

        return rate

    def alone() -> float:
        latents = torch.randn(SAMPLE_BATCH, *run.model.latent_shape)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count // SAMPLE_BATCH):
                pixels = run.model.decode(latents).mean
                assert len(pixels) == SAMPLE_BATCH
        return count / (time.perf_counter() - start)

    return {"into an npz file": files("npz"), "into tars": files("tars"), ALONE: alone}
