"""One `TrainStep` without a run around it."""

from __future__ import annotations

import torch

from vaedist.config.job import Job, Spec
from vaedist.data.loading.inputs import Inputs
from vaedist.distributed.process_group import Group
from vaedist.models.contract import Variant, build
from vaedist.training.step import TrainStep

SPEC = Spec(1, (8, 8))
BATCH = 8


def new_train_step(job: Job) -> tuple[TrainStep, Variant]:
    """A step in one process on batches of 8 images of 8x8, and its model in fp64."""
    model = build(job.model, SPEC, job.seed).double()
    return TrainStep(job, Group(torch.device("cpu")), model, 8, (0, BATCH), Inputs(job)), model
