"""Validation sees every sample once, and its numbers do not know about batches or processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.run_commands import small_job
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import SourceSettings
from vaedist.distributed.process_group import Group
from vaedist.runs.fit_options import FitOptions
from vaedist.runs.open_run import open_run
from vaedist.training.loop import fit
from vaedist.training.validation import validate

NUMBERS = """
import json, sys
from vaedist.config.job import Job
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.config.model_section import model_config
from vaedist.models.contract import build
from vaedist.distributed.process_group import Group
from vaedist.training.validation import validate
import torch
torch.set_num_threads(1)
job = Job.model_validate_json(sys.argv[1])
group = Group.join("cpu", 60)
index = Index.open(job.data.path)
model = build(job.model, index.spec, 0).double()
told = []
for batch_size in (7, 128):
    config = EvaluationStreamConfig(batch_size=batch_size, rank=group.rank, world=group.world, limit=128)
    numbers, first = validate(model, EvaluationInputs(EvaluationStream(index, "train", config), job), job, group, 0)
    told.append(numbers)
if group.leads:
    print(json.dumps(told))
group.close()
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "shards"
    settings = SourceSettings(size=16, count={"train": 128, "validate": 8, "test": 8})
    pack(PackingConfig(input="phantom", out=folder, size=16, settings=settings))
    return folder


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_128_samples_give_the_same_numbers_on_1_2_and_3_processes(kind: str, images: Path) -> None:
    assert Index.open(images).split("train").count == 128
    job = small_job(images, kind, steps=1, precision="fp64").model_dump_json()
    told = [numbers for world in (1, 2, 3) for numbers in json.loads(run_ranks(NUMBERS, world, job)[0])]
    assert {"loss", "distortion", "mse"} <= told[0].keys()
    for other in told[1:]:
        assert other == pytest.approx(told[0], rel=1e-12)


def test_after_200_steps_averaged_weights_are_no_worse_than_raw_ones(phantom: Path, tmp_path: Path) -> None:
    job = small_job(
        phantom, steps=200, ema_half_life=10_000, validate_every=200, save_every=200, log_every=50
    )
    outcome = fit(job, tmp_path / "run", options=FitOptions(quiet=True))
    raw = open_run(tmp_path / "run", weights="raw")
    group = Group.join("cpu")
    index = Index.open(phantom)
    stream = EvaluationStream(index, job.data.validation_split, EvaluationStreamConfig(batch_size=16))
    numbers, _ = validate(raw.model, EvaluationInputs(stream, raw.job), raw.job, group, 200)
    # This loss is positive (Bernoulli): 5 % more would be worse.
    assert outcome.metrics["loss"] < 1.05 * numbers["loss"]
    assert outcome.metrics["loss"] != numbers["loss"], "the run validates averaged weights"
