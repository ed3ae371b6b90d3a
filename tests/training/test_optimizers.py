"""Our optimizers: torch's arithmetic, bit for bit, without its compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_commands import ROOT
from vaedist.training import optimizers


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("fused", [True, False])
def test_it_moves_as_torch_does(name: str, fused: bool) -> None:
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    options = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.01, "fused": fused}
    mine, torchs = (
        getattr(optimizers, name)([ours], **options),
        getattr(torch.optim, name)([theirs], **options),
    )
    for step in range(5):
        ours.grad, theirs.grad = ours.detach().sin() * step, theirs.detach().sin() * step
        mine.step()
        torchs.step()
        assert torch.equal(ours, theirs) and not ours.grad_fn
    # The states are each other's.
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    torchs.load_state_dict(copy.deepcopy(mine.state_dict()))
    mine.step()
    torchs.step()
    assert torch.equal(ours, theirs)


def test_a_run_of_one_process_does_without_the_compiler(phantom: Path, tmp_path: Path) -> None:
    train = [
        sys.executable,
        "-c",
        "import sys; from vaedist.train import main; main(); print(sorted(sys.modules))",
    ]
    job = [
        ROOT / "jobs/vae_phantom.yaml",
        f"data.path={phantom}",
        "--run-dir",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    settings = ["train.steps=3", "train.batch_size=8", "train.ema_half_life=8"]
    done = subprocess.run([*train, *job, *settings], check=True, capture_output=True, text=True, cwd=tmp_path)
    modules = done.stdout.splitlines()[-1]
    assert "'torch.optim.adam'" in modules and "finished after 3 steps" in done.stdout
    assert "'torch._dynamo'" not in modules
