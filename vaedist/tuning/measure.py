"""A trial's numbers: what `vaedist-evaluate --split validate` says of the same run, digit for digit.

They are taken from the run's best checkpoint (by its own monitor; its newest where none is best yet), with the weights
that everything downstream uses, by the functions of `vaedist.evaluation`. The validation split is what a search may
look at; the test split is left for the one that it chooses.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vaedist.core.errors import NotDefined, UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import whole_split
from vaedist.evaluation.metrics import likelihood
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.per_image import evaluate_images, summarize_images, training_images
from vaedist.evaluation.metrics.sample_metrics import Reference, sample_metrics
from vaedist.evaluation.sample_quality import draw_samples
from vaedist.runs.open_run import open_run
from vaedist.tuning.objectives import METRICS, value_of
from vaedist.tuning.space import Space


def measure(run_folder: Path, space: Space, *, device: torch.device | str = "cpu") -> dict[str, float]:
    """Everything that is cheap to know of a run, and what the objectives ask for.

    Args:
        run_folder: Of a trial that has a checkpoint.
        space: For the objectives and how they are measured.
        device: Where the model runs.

    Returns:
        Name to mean over the validation images; numbers that are not finite are left out.

    Raises:
        UserError: the model has no such objective, or its numbers are not finite.
    """
    run = open_run(run_folder, device=device)
    index = Index.open(run.data_path)
    batches = whole_split(
        index, run.job.data.validation_split, run.job, device=device, limit=space.measure.images
    )
    found = evaluate_images(run.model, batches, seed=run.job.seed, step=run.step)
    summary = summarize_images(found.rows)
    numbers = {
        name: section["mean"] for part in ("terms", "metrics") for name, section in summary[part].items()
    }
    numbers |= found.batch_terms
    if found.codes is not None:
        numbers["codes_used"], numbers["perplexity"] = found.codes["used"], found.codes["perplexity"]
        numbers["positions"] = math.prod(run.model.latent_shape)
        numbers["bits_per_image"] = numbers["positions"] * math.log2(run.model.num_codes)
    asked = [objective.metric for objective in space.objectives]
    of_samples = [name for name in asked if METRICS[name].part == "samples"]
    if of_samples and run.model.samples:
        features = default_extractor(device)
        real = Reference(training_images(batches), features)
        made = draw_samples(run.model, space.measure.samples)
        numbers |= sample_metrics(real, made, features, seed=0, only=of_samples)
    if "iwae" in asked:
        try:
            evidence = likelihood.measure_likelihood(
                run.model, batches, draws=space.measure.importance, seed=run.job.seed
            )
        except NotDefined as error:
            raise UserError(f"the objective iwae: {error}") from None
        if evidence.name == "surrogate":
            raise UserError(f"iwae cannot be an objective here, because {evidence.why()}")
        numbers["iwae"] = evidence.document()["nll"]["mean"]
    finite = {
        name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)
    }
    for name in asked:
        if value_of(finite, name) is None:
            raise UserError(
                f"the objective {name} has no value here: {_why(name, run.model, found.not_defined)}"
            )
    return finite


def _why(name: str, model: object, reasons: dict[str, str]) -> str:
    part = METRICS[name].part
    operation = {"samples": "sample", "reconstructions": "reconstruct", "codes": "codes"}.get(part, name)
    if name in reasons:
        return reasons[name]
    if operation in reasons:
        return reasons[operation]
    if part == "samples":
        return str(model.not_defined("sample"))  # type: ignore[attr-defined]
    return "this model has no such term, or it is not finite"
