"""tools/figures draws from the files that runs leave; what it makes of real runs is looked at, in the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.commands.conftest import MLP, pack_phantom, trained
from tests.run_commands import ROOT, small_job, write_job


def draw(name: str, runs: Path, picture: Path) -> Image.Image:
    subprocess.run([sys.executable, ROOT / "tools/figures", name, runs, picture], check=True)
    with Image.open(picture) as drawn:
        return drawn.convert("RGB")


def test_patients_through_every_variant(tmp_path: Path) -> None:
    """What is right of the errors are samples, in every row."""
    data = pack_phantom(tmp_path / "data")
    encoder = {"kind": "conv", "width": 16, "depth": 0, "downsample": 4}
    codes = {"kind": "vqvae", "encoder": encoder, "codebook": {"kind": "ema", "codes": 8, "dim": 4}}
    runs = tmp_path / "runs"
    trained(runs / "vqvae_oasis_k512_32", data, codes)
    net = {"width": 8, "layers": 2, "hidden": 8}
    tokenizer = str(runs / "vqvae_oasis_k512_32")
    trained(runs / "pixelcnn_oasis", data, {"kind": "pixelcnn", "tokenizer": tokenizer, "net": net})
    for name, model in {
        "infovae_oasis64": {"kind": "infovae"},
        "vae_oasis": {"kind": "vae"},
        "mmdvae_oasis": {"kind": "infovae", "alpha": 1.0},
    }.items():
        trained(runs / name, data, {**model, "encoder": MLP, "latent": 3})
    hybrid = {"kind": "vaegan", "discriminator": encoder, "encoder": MLP, "latent": 3}
    phases: dict[str, Any] = {"discriminator": {}, "encoder": {}, "decoder": {}}
    trained(runs / "vaegan_oasis", data, hybrid, optim=phases, monitor={"metric": "mse/encoder"})
    drawn = np.asarray(draw("patients", runs, tmp_path / "figure.png"))
    right = drawn[:, int(drawn.shape[1] * 0.7) :].mean(axis=(1, 2))
    for row in np.array_split(right[len(right) // 10 :], 5):
        assert row.min() < 200


def test_samples_of_three_runs_stand_in_rows(tmp_path: Path) -> None:
    data = pack_phantom(tmp_path / "data")
    for name in ("vae_s0", "gan_s0", "gan_vae_s0"):
        trained(tmp_path / name, data, {"kind": "vae", "encoder": MLP, "latent": 3})
    assert draw("gan_faces_samples", tmp_path, tmp_path / "figure.png").size == (16 * 34 + 2, 6 * 34 + 2)


def test_the_gans_have_a_line_each(tmp_path: Path) -> None:
    for run in ("gan_s0", "gan_vae_s0", "gan_vae_s1"):
        (tmp_path / run).mkdir()
        write_job(tmp_path / run / "job.yaml", small_job(tmp_path, steps=4))
        rows = [
            f'{{"step": {step}, "kind": "validate", "kid[x]": {1 / step}}}\n{{"step": {step}, "kind": "train"}}\n'
            for step in (2, 4)
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(rows))
    drawn = draw("gan_faces", tmp_path, tmp_path / "figure.png")
    assert drawn.width > drawn.height > 300
    lines = {colour for _, colour in drawn.getcolors(1 << 20)}
    assert {(0x7A, 0x87, 0x93), (0xB3, 0x20, 0x2A)} <= lines
