"""What a run is: its facts, layers and settings as text."""

from __future__ import annotations

import yaml

from vaedist.models.bases.layer_table import layer_table
from vaedist.runs.open_run import Run


def run_info(run: Run) -> str:
    """Facts, a table of layers, and the job as YAML."""
    shape = "x".join(str(size) for size in run.spec.image_shape)
    data = f"{run.data_path}: images of {shape}, {len(run.classes)} classes, identity {run.data_identity}"
    facts = {
        "run": run.folder,
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "weights": run.weights,
        "data": data,
        "parameters": f"{sum(parameter.numel() for parameter in run.model.parameters()):,}",
        "samples": "from the prior" if run.model.samples else run.model.not_defined("sample"),
    }
    lines = [f"{name:<11} {value}" for name, value in facts.items()]
    job = yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False)
    return "\n".join([*lines, "", layer_table(run.model), "", job.rstrip()])
