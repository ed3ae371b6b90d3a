"""Small search spaces for tests: a job that trains in a second, and whatever the test wants to be different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vaedist.config.settings import parse
from vaedist.tuning.objectives import METRICS
from vaedist.tuning.space import Space
from vaedist.tuning.trial_log import Status, Trial

MODEL: dict[str, Any] = {
    "kind": "vae",
    "encoder": {"kind": "mlp", "width": 16, "depth": 1},
    "latent": 2,
    "beta": {"start": 0.0, "end": 1.0, "steps": 4},
}
TRAIN: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "log_every": 4,
    "validate_every": 4,
    "save_every": 4,
    "threads": 1,
}
DIMENSIONS: dict[str, Any] = {
    "model.beta.end": {"kind": "loguniform", "low": 0.1, "high": 10.0},
    "model.latent": {"kind": "choice", "values": [2, 4]},
}


def content(data: Path | str = "shards/nowhere", **changes: Any) -> dict[str, Any]:
    """A space as its file would hold it; `train` changes single settings of the base job's loop."""
    train = TRAIN | changes.pop("train", {})
    space: dict[str, Any] = {
        "name": "small",
        "data": {"path": str(data), "make": "vaedist-shard phantom --out shards/phantom", "phantom": 16},
        "base": {"seed": 3, "model": MODEL, "train": train},
        "dimensions": DIMENSIONS,
        "objectives": [{"metric": "rate"}, {"metric": "distortion"}],
        "search": {"kind": "tpe", "startup": 2},
        "trials": 3,
    }
    return space | changes


def small_space(data: Path | str = "shards/nowhere", **changes: Any) -> Space:
    return parse(Space, content(data, **changes), where="the test's space")


def write_space(path: Path, space: Space) -> Path:
    path.write_text(yaml.safe_dump(space.model_dump(mode="json"), sort_keys=False))
    return path


def ended(number: int, settings: dict[str, Any], status: Status = "finished", **measures: float) -> Trial:
    """A trial that has ended."""
    assert all(name.partition("[")[0] in METRICS for name in measures)
    return Trial(number, settings, status, measures)
