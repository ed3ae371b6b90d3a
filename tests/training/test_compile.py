"""`train.compile` compiles the bodies, and the numbers stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.run_commands import curve, small_job
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_bodies_train_alike(phantom: Path, tmp_path: Path) -> None:
    graphs = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        job = small_job(phantom, "vqvae", steps=4, compile=compiled, validate_every=4)
        fit(job, tmp_path / str(compiled), options=FitOptions(quiet=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 0
    assert graphs[1] >= 2, "encoder and decoder"
    for plain, fast in zip(curve(tmp_path / "False"), curve(tmp_path / "True"), strict=True):
        assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-4)
