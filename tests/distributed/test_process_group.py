"""A group of real processes: gradients of batch statistics, agreement, and rendezvous that names who is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ranks import ROOT, run_ranks
from vaedist.core.errors import UserError
from vaedist.distributed.process_group import Group

GRADIENTS = """
import torch
from torch import nn
from vaedist.data.loading.order import slice_bounds
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group
torch.set_num_threads(1)
group = Group.join("cpu", 60)
B = 7
data = torch.randn(B, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64))
    def forward(self, rows, ctx):
        y = torch.tanh(rows * self.w)
        per_row = (y ** 2).sum(1)
        everyone = ctx.gather(y)
        pairs = (everyone[:, None] - everyone[None]).square().sum(-1).exp().mean()
        variance = ctx.mean(y ** 2) - ctx.mean(y) ** 2
        total = ctx.sum(y.sum()) ** 2
        return per_row + pairs + variance.log().sum() + total
net = Net()
start, stop = slice_bounds(B, group.rank, group.world)
ctx = DistributedLaneContext(group, seed=0, step=0, batch_size=B, lanes=1, rows=(start, stop))
parallel = group.parallel(net, 1)
loss = parallel(data[start:stop], ctx)
(loss.sum() * group.world / B).backward()
value = group.total(loss.detach().sum()) / B
print(value.item().hex(), *[g.hex() for g in net.w.grad.tolist()])
group.close()
"""


def numbers(output: str) -> list[float]:
    return [float.fromhex(word) for word in output.split()]


def test_batch_statistics_have_the_gradient_of_one_process_even_with_unequal_shares() -> None:
    [alone] = run_ranks(GRADIENTS, 1)
    for world in (2, 3):
        for output in run_ranks(GRADIENTS, world):
            assert numbers(output) == pytest.approx(numbers(alone), rel=1e-12)


STATISTICS = """
import sys
import torch
from vaedist.data.loading.order import slice_bounds
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group

B, begun = 7, sys.argv[1] == "begun"
group = Group.join("cpu", 60)
start, stop = slice_bounds(B, group.rank, group.world)
ctx = DistributedLaneContext(group, seed=0, step=0, batch_size=B, lanes=1, rows=(start, stop))
for first, last in [(0, 1), (1, stop - start)]:
    part = ctx.micro_batch(first, last)
    part.accumulate("same name", torch.full((2,), float(last - first), requires_grad=True))
    part.collect("same name", torch.arange(start + first, start + last)[:, None] * torch.ones(1, 3))
if begun:
    ctx.begin()
largest = group.begin_largest(torch.tensor([float(group.rank), float("nan")]))
print(group.total(torch.ones(1)).item(), "others may meet meanwhile")
ctx.finish()
met = group.stall_monitor.collectives
print(ctx.total("same name").tolist(), ctx.total("same name").requires_grad)
print(ctx.collected("same name").tolist())
assert group.stall_monitor.collectives == met, "nobody is waited for when they are read"
print(largest().tolist())
group.close()
"""


@pytest.mark.parametrize("begun", ["begun", "never"])
def test_statistics_travel_between_forward_and_their_use(begun: str) -> None:
    for world in (1, 2, 3):
        rows = [[float(row)] * 3 for row in range(7)]
        for output in run_ranks(STATISTICS, world, begun):
            assert output.splitlines() == [
                f"{float(world)} others may meet meanwhile",
                "[7.0, 7.0] False",
                str(rows),
                f"[{world - 1.0}, nan]",
            ]


POISON = """
import json
import torch
from vaedist.config.job import Job, Spec
from vaedist.data.loading.order import slice_bounds
from vaedist.config.model_section import model_config
from vaedist.models.contract import build
from vaedist.distributed.process_group import Group
from vaedist.data.loading.inputs import Inputs
from vaedist.training.step import TrainStep

class Poison(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")

group = Group.join("cpu", 60)
model = {"kind": "vae", "latent": 2, "encoder": {"kind": "mlp", "width": 8}}
job = Job.model_validate({"model": model, "train": {"steps": 9, "batch_size": 8}})
model = build(job.model, Spec(1, (8, 8)), 0)
sound = model.forward

def forward(batch, ctx):
    terms = sound(batch, ctx)
    if (group.rank, ctx.step) == (1, 1):
        terms["loss"] = Poison.apply(terms["loss"])
    if (group.rank, ctx.step) == (0, 2):
        terms["loss"] = terms["loss"] * float("inf")
    return terms

model.forward = forward
bounds = slice_bounds(8, group.rank, group.world)
train_step = TrainStep(job, group, model, 8, bounds, Inputs(job))
rows = range(*bounds)
image = torch.arange(8 * 64).view(8, 1, 8, 8).to(torch.uint8)[bounds[0] : bounds[1]]
label = torch.zeros(len(rows), dtype=torch.int64)
batch = {"image": image, "label": label, "key": [""] * len(rows), "sample": list(rows)}
for step in range(4):
    result = train_step(batch, step, 9, step == 3 and group.rank == 1)
    print(result.accepted, result.refused_because, result.stop)
print(sum(parameter.double().sum() for parameter in model.parameters()).item().hex())
group.close()
"""


def test_what_one_rank_finds_all_ranks_refuse() -> None:
    """Step 1: the second rank's gradient is NaN, its loss is not; step 2: the first rank's loss; step 3: a stop."""
    first, second = run_ranks(POISON, 2)
    assert first == second
    assert first.splitlines()[:-1] == [
        "True  False",
        "False gradient of phase 'main' False",
        "False loss, gradient of phase 'main' False",
        "True  True",
    ]


AGREEMENT = """
import torch
from vaedist.core.errors import DataError
from vaedist.distributed.process_group import Group
group = Group.join("cpu", 60)
rank = group.rank
awkward = torch.tensor([0.1, 1e16, -1e16, 0.3], dtype=torch.float64) * (rank + 1) ** 0.5
print(group.total(awkward).numpy().tobytes().hex(), group.largest(torch.tensor([float(rank)])).item())
print(group.from_leader(lambda: b"x" * 100_000 + bytes([rank])).hex()[-4:])
try:
    def fail():
        raise DataError(f"broken on rank {rank}")
    group.from_leader(fail)
except DataError as error:
    print(type(error).__name__, error)
group.barrier()
group.close()
"""


def test_ranks_agree_to_the_bit_and_share_rank_0s_errors() -> None:
    outputs = run_ranks(AGREEMENT, 3)
    assert outputs[0] == outputs[1] == outputs[2]
    lines = outputs[0].splitlines()
    assert lines[0].endswith(" 2.0")
    assert lines[1] == "7800"
    assert lines[2] == "DataError broken on rank 0"


def test_a_missing_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from vaedist.distributed.process_group import Group; Group.join('cpu', 2.0)"
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "these never came: 1, 2" in done.stderr


def test_stale_slurm_variables_join_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_ID": "9",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    group = Group.join("cpu")
    assert (group.rank, group.world) == (0, 1)
    assert group.from_leader(lambda: b"alone") == b"alone"


def test_half_an_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="MASTER_ADDR is not"):
        Group.join("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no CUDA GPU here"):
        Group.join("cuda")


SECRET = """
import os
import sys
from vaedist.distributed.process_group import Group
if sys.argv[1] == os.environ["RANK"]:
    os.environ["VAEDIST_STORE_SECRET"] = "another"
try:
    group = Group.join("cpu", 60)
    group.barrier()
    group.close()
    print("joined")
except Exception as error:  # the one who finds out ends, and with rank 0 the store
    print(type(error).__name__, error)
"""


def test_a_rank_that_does_not_know_the_secret_is_found_before_the_first_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VAEDIST_STORE_SECRET", "ours")
    assert run_ranks(SECRET, 3, "nobody") == ["joined\n"] * 3
    told = run_ranks(SECRET, 3, "2")
    assert "joined\n" not in told
    assert told[0].startswith("UserError what called itself rank 2 at 127.0.0.1:")
    assert "does not know this run's secret" in told[0]
