"""Golden curves: the first steps of each variant in fp64, as text. A refactor leaves them identical.

After a change that is meant to alter them: `VAEDIST_WRITE_GOLDEN=1 pytest tests/test_golden.py`, look at the
difference, and say in the commit why it is right.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit

GOLDEN = Path(__file__).parent / "golden"
NOT_COMPARED = {"step", "kind", "epoch", "time", "images_per_second", "data_wait", "active_units"}
"""And the norms of single modules: they follow from the weights and gradients whose curve is compared."""
BODY = {"kind": "resnet", "width": 8, "depth": 1, "downsample": 4}
DISCRIMINATOR = {"kind": "resnet", "width": 8, "depth": 1, "downsample": 4, "norm": "none"}
MODELS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "latent": 4, "encoder": BODY, "beta": {"start": 0.1, "end": 1.0, "steps": 10}},
    "infovae": {"kind": "infovae", "latent": 4, "encoder": BODY, "alpha": 0.5, "mmd_weight": 100.0},
    "vqvae": {"kind": "vqvae", "encoder": BODY, "codebook": {"kind": "ema", "codes": 16, "dim": 4}},
    "vqvae_gradient": {
        "kind": "vqvae",
        "encoder": BODY,
        "codebook": {"kind": "gradient", "codes": 16, "dim": 4},
    },
    "vqvae_fsq": {"kind": "vqvae", "encoder": BODY, "codebook": {"kind": "fsq", "levels": [5, 3]}},
    "vqvae_residual": {
        "kind": "vqvae",
        "encoder": BODY,
        "codebook": {"kind": "ema", "codes": 8, "dim": 4, "residual_levels": 2},
    },
    "gan": {
        "kind": "gan",
        "latent": 4,
        "generator": BODY,
        "discriminator": DISCRIMINATOR,
        "r1_every": 4,
        "diffaugment": ["translation", "cutout"],
    },
    "vaegan": {
        "kind": "vaegan",
        "latent": 4,
        "encoder": BODY,
        "discriminator": DISCRIMINATOR,
        "r1_every": 4,
        "pixel": 0.1,
        "diffaugment": ["translation"],
    },
    "pixelcnn": {"kind": "pixelcnn", "net": {"width": 8, "layers": 2, "hidden": 8, "dropout": 0.1}},
    "transformer": {"kind": "transformer", "net": {"width": 16, "layers": 2, "heads": 2, "dropout": 0.1}},
}


OPTIM: dict[str, Any] = {"learning_rate": 2e-3, "clip": 1e5, "schedule": {"kind": "cosine", "warmup": 4}}
PHASES = {"gan": ("discriminator", "generator"), "vaegan": ("discriminator", "encoder", "decoder")}
"""What is trained in turn; of the others, one: `main`."""
LATER = {"generator", "decoder"}
"""Phases that begin at step 4, as the shipped jobs let the discriminator warm up."""
MONITORS = {"gan": "kid", "vaegan": "distortion/encoder"}
PRIORS = {"pixelcnn", "transformer"}
"""They read the codes of a run, which is trained first."""


def train(folder: Path, data: Path, name: str, model: dict[str, Any]) -> None:
    """Train 20 steps in fp64, each of them logged."""
    phases = PHASES.get(name, ("main",))
    content = {
        "seed": 1,
        "data": {"path": str(data), "workers": 0},
        "model": model,
        "train": {
            "steps": 20,
            "batch_size": 8,
            "precision": "fp64",
            "ema_half_life": 1000,
            "log_every": 1,
            "validate_every": 10,
            "save_every": 100,
            "monitor": {"metric": MONITORS.get(name, "loss")},
            "optim": {phase: OPTIM | ({"start": 4} if phase in LATER else {}) for phase in phases},
        },
    }
    fit(parse(Job, content, "golden"), folder, options=FitOptions(quiet=True))


@pytest.mark.parametrize("name", MODELS)
def test_golden_curve(name: str, phantom: Path, tmp_path: Path) -> None:
    model = MODELS[name]
    if name in PRIORS:
        train(tmp_path / "tokenizer", phantom, "vqvae", MODELS["vqvae"])
        model = {**model, "tokenizer": str(tmp_path / "tokenizer")}
    train(tmp_path / "run", phantom, name, model)
    lines = []
    for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        kept = sorted(name for name in row.keys() - NOT_COMPARED if "_norm/" not in name)
        numbers = " ".join(f"{key}={row[key]:.9e}" for key in kept)
        lines.append(f"{row['kind']} {row['step']} {numbers}")
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("VAEDIST_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        pytest.skip(f"written to {path}: look at it, then run again")
    golden = path.read_text().splitlines()
    assert len(lines) == len(golden)
    for ours, theirs in zip(lines, golden, strict=True):
        # Digits, not bits: another processor adds in another order. fp64 leaves nine digits beyond doubt.
        for mine, kept in zip(ours.split(), theirs.split(), strict=True):
            name_, _, value = mine.partition("=")
            kept_name, _, kept_value = kept.partition("=")
            assert name_ == kept_name
            if value:
                rel = 1e-3 if "[" in name_ else 1e-7  # a measure of samples: its extractor computes in fp32
                assert float(value) == pytest.approx(float(kept_value), rel=rel, abs=1e-12), (
                    f"{ours}\n{theirs}"
                )
