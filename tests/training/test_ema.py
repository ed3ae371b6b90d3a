"""The weight average: its half-life in images, its ramp, and what it copies instead of averaging."""

from __future__ import annotations

import pytest
import torch

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.models.contract import build
from vaedist.training.ema import RAMP, WeightAverage

SPEC = Spec(1, (8, 8))


def test_a_weight_counts_half_after_its_half_life_at_every_batch_size() -> None:
    model = build(model_config({"kind": "vae", "latent": 2, "encoder": {"kind": "mlp", "width": 4}}), SPEC, 0)
    for batch_size in (10, 50):
        average = WeightAverage(model, half_life=1000)
        images = 1_000_000  # the ramp has ended
        kept = 1.0
        for _ in range(1000 // batch_size):
            kept *= average.decay(images, batch_size)
        assert kept == pytest.approx(0.5)


def test_the_ramp_keeps_a_young_average_young() -> None:
    model = build(model_config({"kind": "vae", "latent": 2, "encoder": {"kind": "mlp", "width": 4}}), SPEC, 0)
    average = WeightAverage(model, half_life=100_000)
    assert average.decay(32, 32) == pytest.approx(0.5 ** (1 / RAMP)), (
        "the first step all but replaces the start"
    )
    assert average.decay(20_000, 32) == pytest.approx(0.5 ** (32 / 1000))
    assert average.decay(10**9, 32) == pytest.approx(0.5 ** (32 / 100_000))


def test_parameters_are_averaged_and_codebooks_and_buffers_copied() -> None:
    codebook = {"kind": "gradient", "codes": 4, "dim": 2}
    body = {"kind": "conv", "width": 4, "downsample": 2}
    model = build(model_config({"kind": "vqvae", "encoder": body, "codebook": codebook}), SPEC, 0)
    average = WeightAverage(model, half_life=100)
    before = {name: value.clone() for name, value in average.model.named_parameters()}
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    average.update(images=10**6, batch_size=50)
    for name, value in average.model.named_parameters():
        moved = 1 if name.startswith("quantizer.") else 1 - 0.5**0.5
        torch.testing.assert_close(value, before[name] + moved)
    for mine, theirs in zip(average.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(value.requires_grad for value in average.model.parameters())
