"""Opening a trained run: what every command that reads one gets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from vaedist.config.job import Job, Spec
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.evaluation.metrics.posterior_collapse import Collapse
from vaedist.models.contract import Variant, build
from vaedist.runs.checkpoint import load_checkpoint
from vaedist.runs.checkpoint_paths import resolve_checkpoint, run_folder_of
from vaedist.runs.resume_rules import compare_jobs
from vaedist.runs.weights import chosen_weights

_SEED_SETTINGS = {"seed", "model.tokenizer.sha256", "model.tokenizer.seed"}
"""What may differ between repetitions of one experiment; a prior's tokenizer may be a repetition too."""
_LENGTH_SETTINGS = {"train.steps", "train.epochs"}


class Run(NamedTuple):
    """A trained model and what it knows of itself."""

    model: Variant
    """In eval mode, with the chosen weights."""
    job: Job
    spec: Spec
    step: int
    weights: str
    """`ema` or `raw`."""
    data_identity: str
    data_path: str
    classes: tuple[str, ...]
    checkpoint: Path
    folder: Path
    """Where commands write: the run folder, or the checkpoint's own for one that was moved out of its run."""
    collapse: Collapse | None = None
    """The alarm of the last validation before the checkpoint."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def title(self) -> str:
        """The run folder, kind, step and weights, for a line about it."""
        return f"{self.folder} ({self.job.kind}, step {self.step}, {self.weights} weights)"


def open_run(path: str | Path, *, weights: str | None = None, device: torch.device | str = "cpu") -> Run:
    """A trained model from a run folder (its best checkpoint, else its newest) or from a checkpoint folder.

    Args:
        path: Either folder.
        weights: `ema` or `raw`; default: what the job says everything downstream uses.
        device: Where the model goes.

    Raises:
        UserError: there is no such run, or the checkpoint is damaged or of another making.
    """
    loaded = load_checkpoint(resolve_checkpoint(path))
    try:
        saved, data = loaded.state["job"], loaded.state["data"]
        channels, height, width = (int(size) for size in data["shape"])
        classes = tuple(str(name) for name in data["classes"])
        identity, data_path = str(data["identity"]), str(data["path"])
        state = chosen_weights(loaded.state, weights)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"checkpoint {loaded.path} lacks what vaedist-train writes: it is of another making"
        ) from None
    job = parse(Job, saved, where=str(loaded.path))
    spec = Spec(channels, (height, width), len(classes))
    model = build(job.model, spec, job.seed)
    model.to(device, torch.float64 if job.train.precision == "fp64" else torch.float32)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights in {loaded.path} do not fit its model {job.kind!r}: {reason}") from None
    model.eval().requires_grad_(False)
    return Run(
        model=model,
        job=job,
        spec=spec,
        step=loaded.step,
        weights=weights or job.train.chosen_weights,
        data_identity=identity,
        data_path=data_path,
        classes=classes,
        checkpoint=loaded.path,
        folder=run_folder_of(loaded.path) or loaded.path,
        collapse=Collapse.from_json(loaded.state.get("collapse"), loaded.path),
    )


def same_experiment(one: Run, other: Run) -> bool:
    """Whether two runs differ in nothing that matters but their seed: repetitions, whose spread is worth stating."""
    data = [
        {"identity": run.data_identity, "shape": list(run.spec.image_shape), "classes": list(run.classes)}
        for run in (one, other)
    ]
    differences = compare_jobs(one.job, other.job, *data)
    changed = {change.key for change in differences.free + differences.override + differences.fixed}
    free = {change.key for change in differences.free} - _LENGTH_SETTINGS
    return one.weights == other.weights and changed - free <= _SEED_SETTINGS
