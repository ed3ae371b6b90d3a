"""Losses that look at the whole batch, or draw by name: two processes have the loss and gradient of one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.models.contract import build

MLP = {"kind": "mlp", "width": 16, "depth": 1}
SHARED = {"encoder": MLP, "latent": 3}
SECTIONS: dict[str, dict[str, Any]] = {
    "free bits": {"kind": "vae", "free_bits": 0.05, **SHARED},
    "conditional IWAE": {
        "kind": "vae",
        "condition": {"dropout": 0.5, "prior": "per_class"},
        "num_importance": 3,
        **SHARED,
    },
    "InfoVAE": {"kind": "infovae", "mmd_weight": 30.0, "condition": {"prior": "per_class"}, **SHARED},
    "MMD in blocks": {
        "kind": "infovae",
        "alpha": 1.0,
        "deterministic": True,
        "kernel": {"kind": "imq", "block": 4},
        **SHARED,
    },
}
B, LANES = 12, 4
MASK = torch.arange(B) < 5

RANK = """
import json, sys
import torch
from tests.models.test_ranks import B, LANES, MASK, SECTIONS, batch, model_of, numbers
from vaedist.data.loading.order import slice_bounds
from vaedist.distributed.contexts import DistributedLaneContext, DistributedSampleContext
from vaedist.distributed.process_group import Group

group = Group.join("cpu", 60)
start, stop = slice_bounds(B, group.rank, group.world)
seen = {}
for name in SECTIONS:
    model = model_of(name)
    ctx = DistributedLaneContext(group, seed=1, step=2, batch_size=B, lanes=LANES, rows=(start, stop))
    parallel = group.parallel(model, 1)
    terms = parallel(batch(start, stop), ctx)
    (terms["loss"].sum() * group.world / B).backward()
    means = {
        term: group.total(value.detach().sum() if value.ndim else value.detach() * (stop - start)) / B
        for term, value in terms.items()
    }
    seen[name] = numbers(model, means)
    # Evaluation: the last rows only pad, so one rank may have none of its own.
    model.eval()
    shown = DistributedSampleContext(group, seed=1, samples=range(start, stop), batch_size=B)
    with torch.no_grad():
        for term, value in model({**batch(start, stop), "mask": MASK[start:stop]}, shown).items():
            total = torch.where(MASK[start:stop], value, 0.0).sum()
            seen[name][f"evaluated {term}"] = (group.total(total) / MASK.sum()).item()
print(json.dumps(seen))
group.close()
"""


def model_of(name: str) -> Any:
    return build(model_config(SECTIONS[name]), Spec(1, (8, 8), 3), 0).double()


def batch(start: int = 0, stop: int = B) -> Any:
    image = torch.randint(0, 256, (B, 1, 8, 8), generator=generator("ranks"), dtype=torch.uint8)
    return {"image": image[start:stop], "label": (torch.arange(B) % 3)[start:stop]}


def numbers(model: Any, means: dict[str, Any]) -> dict[str, Any]:
    values = {name: value.tolist() for name, value in means.items()}
    return values | {f"gradient of {name}": p.grad.flatten().tolist() for name, p in model.named_parameters()}


def test_two_processes_have_the_loss_and_gradient_of_one() -> None:
    outputs = [json.loads(output) for output in run_ranks(RANK, 2)]
    for name in SECTIONS:
        model = model_of(name)
        terms = model(batch(), LaneContext(seed=1, step=2, batch_size=B, lanes=LANES))
        terms["loss"].mean().backward()
        alone = numbers(model, {term: value.detach().mean() for term, value in terms.items()})
        model.eval()
        with torch.no_grad():
            shown = model({**batch(), "mask": MASK}, SampleContext(seed=1, samples=range(B)))
            fewer = model(batch(0, 5), SampleContext(seed=1, samples=range(5)))
        for term, value in shown.items():
            alone[f"evaluated {term}"] = float(torch.where(MASK, value, 0.0).sum() / MASK.sum())
            assert alone[f"evaluated {term}"] == pytest.approx(float(fewer[term].mean()), rel=1e-9), term
        for output in outputs:
            assert output[name].keys() == alone.keys()
            for key, value in alone.items():
                assert output[name][key] == pytest.approx(value, rel=1e-9, abs=1e-11), f"{name}: {key}"
