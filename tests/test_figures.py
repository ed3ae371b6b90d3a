"""tools/figures draws from the files that runs leave; what it makes of real runs is looked at, in the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import ROOT, small_job, write_job


@pytest.mark.parametrize("name", ["gan_faces"])
def test_a_figure_is_drawn_from_what_runs_leave(name: str, tmp_path: Path) -> None:
    for run in ("gan_s0", "gan_vae_s0", "gan_vae_s1"):
        (tmp_path / run).mkdir()
        write_job(tmp_path / run / "job.yaml", small_job(tmp_path, steps=4))
        rows = [
            f'{{"step": {step}, "kind": "validate", "kid[x]": {1 / step}}}\n{{"step": {step}, "kind": "train"}}\n'
            for step in (2, 4)
        ]
        (tmp_path / run / "metrics.jsonl").write_text("".join(rows))
    picture = tmp_path / "figure.png"
    subprocess.run([sys.executable, ROOT / "tools/figures", name, tmp_path, picture], check=True)
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 300
        lines = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20)}
    assert {(0x7A, 0x87, 0x93), (0xB3, 0x20, 0x2A)} <= lines
