"""The layer table counts every parameter once."""

from __future__ import annotations

from typing import Any

import pytest

from vaedist.config.job import Job, Spec
from vaedist.config.settings import parse
from vaedist.models.bases.layer_table import layer_table
from vaedist.models.contract import build

BODY = {"kind": "conv", "width": 8, "depth": 1, "downsample": 2}


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "vae", "encoder": {"kind": "resnet", "width": 8}, "decoder": {"kind": "resnet", "width": 8}},
        {"kind": "vqvae", "encoder": BODY, "decoder": BODY},
        {"kind": "gan", "generator": BODY, "discriminator": BODY, "latent": 3},
    ],
    ids=lambda section: section["kind"],
)
def test_every_parameter_is_counted_once(section: dict[str, Any]) -> None:
    job = parse(Job, {"model": section, "train": {"steps": 1}}, "test")
    model = build(job.model, Spec(1, (16, 16)), 0).eval()
    header, *rows, total = layer_table(model).splitlines()
    assert header.split() == ["layer", "type", "output", "parameters"]
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == expected
    assert f"{section['kind']} on 1x16x16: {expected:,} parameters" in total
    assert not any(layer._forward_hooks for layer in model.modules())
