"""Seconds that an image's metrics take, beside the model that made the reconstruction.

SSIM with both windows, their foreground values, MS-SSIM, PSNR, MSE and MAE of a batch of reconstructions on one thread:
ours, a batch at a time, and scikit-image's, a pair at a time. The forward pass is that of a VQ-VAE of jobs/vqvae_oasis.

Likelihood by 5,000 importance samples, of eight images of the pretrained VAE of MNIST. The forward pass decodes as many
latents, so many at once, and throws them away.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.common import Question, Rate

FORWARD = "the model's forward pass"
DRAWS, IMAGES = 5000, 8


def questions(_folder: Path, _asked: argparse.Namespace) -> Iterator[Question]:
    for side, rows in ((32, 64), (256, 8)):
        yield Question(f"Metrics of an image, {side}x{side}", "ms", ways(side, rows), FORWARD)
    title = f"Likelihood of an image, {DRAWS:,} importance samples, pretrained VAE of MNIST"
    yield Question(title, "s", likelihoods(), FORWARD)


def likelihoods() -> dict[str, Rate]:
    """Seconds of one image."""
    import torch

    from vaedist.core.context import Batch
    from vaedist.evaluation.metrics.likelihood import measure_likelihood
    from vaedist.runs.open_run import open_run

    torch.set_num_threads(1)
    run = open_run(Path(__file__).resolve().parents[2] / "jobs" / "pretrained" / "vae_mnist")
    spec, together = run.spec, 256
    image = torch.randint(
        0, 256, (IMAGES, *spec.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    names = [str(number) for number in range(IMAGES)]
    batch: Batch = {
        "image": image,
        "label": torch.zeros(IMAGES, dtype=torch.int64),
        "key": names,
        "sample": list(range(IMAGES)),
        "mask": torch.ones(IMAGES, dtype=torch.bool),
    }

    def estimated() -> None:
        measure_likelihood(run.model, [batch], draws=DRAWS)

    def forward() -> None:
        with torch.no_grad():
            run.model.encode(image)
            for _ in range(IMAGES * DRAWS // together):
                assert len(run.model.decode(torch.randn(together, *run.model.latent_shape)).mean) == together

    def seconds(call: Callable[[], object]) -> Rate:
        def measured() -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) / IMAGES

        return measured

    return {"vaedist, all images at once": seconds(estimated), FORWARD: seconds(forward)}


def ways(side: int, rows: int) -> dict[str, Rate]:
    import torch

    from vaedist.config.job import Spec, load_job
    from vaedist.evaluation.metrics.image_quality import batch_metrics, pair_metrics
    from vaedist.models.contract import build

    torch.set_num_threads(1)
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    model = build(load_job(jobs / "vqvae_oasis.yaml", ["data.path=none"]).model, Spec(1, (side, side)), 0)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randint(0, 256, (rows, 1, side, side), dtype=torch.uint8, generator=generator) for _ in range(2)
    )

    def milliseconds(call: Callable[[], object]) -> Rate:
        def measured() -> float:
            start = time.perf_counter()
            with torch.no_grad():
                call()
            return 1e3 * (time.perf_counter() - start) / rows

        return measured

    return {
        "vaedist, the whole batch": milliseconds(lambda: batch_metrics(x, y)),
        "scikit-image, pair by pair": milliseconds(
            lambda: [pair_metrics(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
        ),
        FORWARD: milliseconds(lambda: model.reconstruct(x)),
    }
