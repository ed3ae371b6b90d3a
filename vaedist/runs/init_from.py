"""What a new run takes from another run (`init_from`): weights, and on request the optimizers' state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vaedist.core.errors import UserError
from vaedist.runs.checkpoint import load_checkpoint
from vaedist.runs.checkpoint_manifest import checkpoint_from_bytes, checkpoint_to_bytes, state_sha256
from vaedist.runs.checkpoint_paths import resolve_checkpoint
from vaedist.runs.weights import chosen_weights


class SourceRun(NamedTuple):
    """What a new run takes from another one."""

    run: str
    """As the job names it."""
    path: str
    """Of its checkpoint, absolute."""
    step: int
    model: dict[str, Any]
    """Its job's `model` section."""
    weights: dict[str, Tensor]
    which: str
    """`ema` or `raw`."""
    sha256: str
    """Of the checkpoint's state file, from its manifest."""
    optim: dict[str, Any]
    """By phase; empty unless asked for."""


def source_to_bytes(path: Path, weights: str | None = None, *, optimizer: bool = False) -> bytes:
    """What a new run takes from another one, verified, as bytes for `source_from_bytes` in every process.

    Args:
        path: A run or checkpoint folder.
        weights: `ema` or `raw`; default: what its job says everything downstream uses.
        optimizer: Also the state of its optimizers.
    """
    loaded = load_checkpoint(resolve_checkpoint(path))
    try:
        content = {
            "path": str(loaded.path.absolute()),
            "model": loaded.state["job"]["model"],
            "which": weights or loaded.state["job"]["train"]["weights"],
            "sha256": state_sha256(loaded.path),
            "weights": chosen_weights(loaded.state, weights),
            "optim": loaded.state["optim"] if optimizer else {},
        }
    except (KeyError, TypeError):
        raise UserError(
            f"checkpoint {loaded.path} lacks what vaedist-train writes: it is of another making"
        ) from None
    return checkpoint_to_bytes(loaded._replace(state=content))


def source_from_bytes(data: bytes, run: str) -> SourceRun:
    """What `source_to_bytes` packed; `run` is how the job names it."""
    loaded = checkpoint_from_bytes(data)
    assert loaded is not None
    return SourceRun(run=run, step=loaded.step, **loaded.state)
