"""The packed data of a finished run, wherever they lie now, and the device to run it on."""

from __future__ import annotations

from pathlib import Path

import torch

from vaedist.core.errors import UserError
from vaedist.data.format.index import INDEX_NAME, Index
from vaedist.runs.open_run import Run


def pick_device(name: str) -> str:
    """The torch device of `--device` auto, cpu or cuda.

    Raises:
        UserError: `cuda` where there is no GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: use --device cpu, or ask the allocation for one")
    return name


def open_data(run: Run, given: str | None, other_data: bool | None) -> Index:
    """The packed folder, checked to be the one that the run was trained from unless another is allowed.

    Args:
        run: The run.
        given: Its folder now; None: where the run read it.
        other_data: Whether another is allowed; None: the command has no such option.

    Raises:
        UserError: the folder is not there, or its identity, image shape or classes do not fit the run.
    """
    if given is None and not (Path(run.data_path) / INDEX_NAME).exists():
        raise UserError(
            f"the run was trained from {run.data_path}, which is not here: say with --data where the data are now"
        )
    index = Index.open(given or run.data_path)
    if index.identity != run.data_identity and not other_data:
        raise UserError(
            f"{index.folder} does not hold the data that the run was trained from (data identity "
            f"{index.identity[:12]}, the run has {run.data_identity[:12]}): give their folder with --data"
            + ("" if other_data is None else ", or allow these with --other-data")
        )
    expected = run.spec.image_shape
    if index.shape != expected:
        raise UserError(
            f"{index.folder} has images of shape {index.shape} (C, H, W) and the model takes {expected}: pack them "
            f"with --size {run.spec.shape[0]} and {'--rgb' if run.spec.channels == 3 else '--gray'}"
        )
    if run.model.conditional and index.classes != run.classes:
        raise UserError(
            f"{index.folder} has classes {index.classes} and the model was trained on {run.classes}"
        )
    return index
