"""Before anything is started: does the space fit the data, its models and its objectives, and where are the rungs?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from vaedist.config.job import Job
from vaedist.config.model_section import kind_module
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import whole_split
from vaedist.evaluation.metrics.per_image import evaluate_images
from vaedist.models.contract import Variant, build
from vaedist.tuning import asha
from vaedist.tuning.dimensions import Categorical, Setting
from vaedist.tuning.objectives import METRICS, check_objectives
from vaedist.tuning.space import Asha, Space

_TRIED_IMAGES = 2
"""Images that the untrained base model is tried on."""


class SearchPlan(NamedTuple):
    """What a search knows beforehand."""

    rungs: tuple[int, ...]
    """Steps at which trials are compared; none without ASHA."""
    length: int
    """Steps of a trial."""
    warning: str = ""
    """One sentence where trials end before their schedules do; the search may go on."""


def plan_search(space: Space, index: Index) -> SearchPlan:
    """Check a space against the data that it searches on.

    Raises:
        UserError: the base is no job, its model lacks an objective, or the scheduler has no rung.
    """
    check_objectives(space)
    data = str(index.folder)
    base = space.job({}, data, space.name)
    _objectives_exist(space, base, index)
    _models_exist(space, index)
    length = steps(base, index)
    ends = schedules_end(space, index)
    warning = _schedule_warning(space, base, length, ends)
    if not isinstance(space.scheduler, Asha):
        return SearchPlan((), length, warning)
    rungs = asha.rungs(space.scheduler, length, base.train.validate_every, ends)
    if not rungs:
        raise UserError(
            f"space {space.name!r}: asha has no rung: the schedules end by step {ends}, a trial has {length} steps and "
            f"is validated every {base.train.validate_every}: shorten the schedules, validate more often, or set "
            "scheduler.kind: none"
        )
    return SearchPlan(rungs, length, warning)


def _schedule_warning(space: Space, base: Job, length: int, ends: int) -> str:
    """What is cut off where trials are shorter than their schedules: as a rule `train.steps` of a quick try."""
    late = {
        f"the learning rate of {name!r} warms up for {phase.schedule.warmup} steps": phase.schedule.warmup
        for name, phase in base.train.optim.items()
        if phase.schedule.warmup >= length
    }
    if ends > length:
        late[f"weights of the loss move, or a phase begins, until step {ends}"] = ends
    if not late:
        return ""
    return (
        f"a trial of space {space.name!r} has {length} steps, but {' and '.join(late)}: its numbers will not be those "
        f"of its settings; for more than a try set train.steps to well above {max(late.values())}, or shorten the "
        "schedules"
    )


def steps(job: Job, index: Index) -> int:
    """Optimizer steps of a job on these data."""
    per_epoch = index.split(job.data.train_split).count // job.train.batch_size
    return job.train.steps or math.ceil((job.train.epochs or 0) * per_epoch)


def check_settings(space: Space, settings: Mapping[str, Setting], index: Index) -> None:
    """Refuse settings that make no job or no model; nothing is computed.

    Raises:
        UserError: what is wrong with them.
    """
    _meta_model(space.job(settings, str(index.folder), space.name), index)


def _meta_model(job: Job, index: Index) -> Variant:
    """The job's model without its numbers."""
    with torch.device("meta"):
        model: Variant = kind_module(job.kind).Model(job.model, index.spec)
    return model


def schedules_end(space: Space, index: Index) -> int:
    """The last step at which a loss weight of any trial still moves, or a phase has not begun.

    Taken at the ends of every dimension and at every choice: a schedule is longest at one of them.
    """
    latest = 0
    for settings in _corners(space):
        try:
            job = space.job(settings, str(index.folder), space.name)
            latest = max(latest, _meta_model(job, index).schedule_end)
        except UserError:
            continue  # such settings make no model; a trial that draws them is told so
        latest = max([latest, *(phase.start for phase in job.train.optim.values())])
    return latest


def _corners(space: Space) -> Iterator[dict[str, Setting]]:
    last = math.nextafter(1.0, 0.0)
    for everything in (0.0, last):
        ends = dict.fromkeys(space.dimensions, everything)
        yield space.settings_of(ends)
        for key, dimension in space.dimensions.items():
            parts = [0.0, last]
            if isinstance(dimension, Categorical):
                count = len(dimension.options)
                parts = [(place + 0.5) / count for place in range(count)]
            for part in parts:
                yield space.settings_of({**ends, key: part})


def _models_exist(space: Space, index: Index) -> None:
    """Refuse a space none of whose corners makes a model, as a misspelt key of it makes none."""
    first: UserError | None = None
    for settings in _corners(space):
        try:
            return check_settings(space, settings, index)
        except UserError as error:
            first = first or error
    raise UserError(f"space {space.name!r}: none of its settings makes a model: {first}")


def _objectives_exist(space: Space, base: Job, index: Index) -> None:
    """Ask the untrained base model for each objective's part, on two images."""
    model = build(base.model, index.spec, base.seed)
    model.eval().requires_grad_(False)
    parts = {METRICS[objective.metric].part for objective in space.objectives}
    known: set[str] = set()
    if "terms" in parts:
        images = whole_split(index, base.data.validation_split, base, limit=_TRIED_IMAGES)
        known = {name for row in evaluate_images(model, images, seed=base.seed).rows for name in row.terms}
    for objective in space.objectives:
        name = objective.metric
        part = METRICS[name].part
        missing = (
            (part == "samples" and model.not_defined("sample") if not model.samples else None)
            or (part == "reconstructions" and not model.reconstructs and model.not_defined("reconstruct"))
            or (part == "codes" and model.latent != "codes" and model.not_defined("codes"))
            or (
                part == "terms"
                and name not in known
                and f"the model has the terms {', '.join(sorted(known))}"
            )
            or (part == "iwae" and _no_likelihood(model, base))
        )
        if missing:
            raise UserError(
                f"space {space.name!r}: the objective {name} does not fit its base job: {missing}"
            )


def _no_likelihood(model: Variant, base: Job) -> str | None:
    if model.latent not in ("vector", "map") or not model.reconstructs:
        return "the model has no likelihood of images given a latent"
    if not getattr(model, "stochastic", True):
        return "a deterministic encoder has no bound on the likelihood"
    zero = torch.zeros((1, *model.latent_shape), dtype=next(model.parameters()).dtype)
    evidence = model.decode(zero, torch.zeros(1, dtype=torch.int64) if model.conditional else None).evidence
    if evidence == "surrogate" or (evidence == "binary" and base.data.binarise == "none"):
        return "its likelihood is no probability of these images: binarise them, or choose a logistic one"
    return None
