"""A trained run as one small folder to give away: the chosen weights, the job, and what the data were.

The folder is a checkpoint (`manifest.json`, `state.pt`) that `open_run`, and so every command, reads like any other,
and that a new run can start from (`init_from`). It has no optimizer state and no path of the machine that trained it,
and it cannot be resumed. Beside it lie a model card (`vaedist.inference.export.model_card`) and, for use without
vaedist, the weights as safetensors, the settings as JSON, and programs (`vaedist.inference.export.programs`). The
density that `vaedist-sample --sampler gmm` stored with the run travels along, so that samples by it need no training
data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from vaedist.core.errors import UserError
from vaedist.core.files import as_json, disk_errors, temporary, writable
from vaedist.inference.export.model_card import model_card
from vaedist.inference.export.programs import check_programs, write_programs
from vaedist.inference.stored_mixture import mixture_path
from vaedist.runs.checkpoint import Checkpoints, load_checkpoint
from vaedist.runs.open_run import Run, open_run
from vaedist.runs.weights import chosen_weights


def export_run(
    run: str | Path,
    folder: str | Path,
    *,
    weights: str | None = None,
    programs: bool = False,
    onnx: bool = False,
    licence: str = "",
    data_licence: str = "",
) -> Path:
    """Write a run's chosen weights as a folder of their own.

    Args:
        run: A run folder (its best checkpoint), or one checkpoint in it.
        folder: A new folder.
        weights: `ema` or `raw`; default: what the job says everything downstream uses.
        programs: Also what is of use without vaedist: safetensors, JSON, and `torch.export`'s programs.
        onnx: These programs, and as ONNX too.
        licence, data_licence: Of the weights and of the training images, for the model card.

    Returns:
        The folder.

    Raises:
        UserError: there is no such run, the folder exists, or programs cannot be written here.
    """
    folder = Path(folder)
    if programs or onnx:
        check_programs(onnx=onnx)
    if folder.exists():
        raise UserError(f"{folder} is there already: give a new folder")
    opened = open_run(run, weights=weights)
    state = load_checkpoint(opened.checkpoint).state
    job = opened.job.model_dump(mode="json")
    job["train"]["weights"] = opened.weights
    kept = {
        "step": opened.step,
        "model": None,
        "ema": None,
        "job": _without_paths(job),
        "data": _without_paths(state["data"]),
        "collapse": state.get("collapse"),
    }
    kept["ema" if opened.weights == "ema" else "model"] = chosen_weights(state, opened.weights)
    mixture = mixture_path(opened)

    with writable(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary(folder.absolute())
    try:
        with disk_errors("the export", folder.absolute().parent):
            scratch.mkdir()
            checkpoint = Checkpoints(scratch).commit(kept, opened.step, guard=lambda: None)
            if mixture.exists():
                (checkpoint / "density").mkdir()
                shutil.copyfile(mixture, checkpoint / "density" / mixture.name)
            missing = _write_for_others(opened, checkpoint, onnx=onnx) if programs or onnx else None
            text = model_card(opened, licence=licence, data_licence=data_licence, missing=missing, onnx=onnx)
            (checkpoint / "README.md").write_text(text, encoding="utf-8")
            checkpoint.chmod(0o755)  # made to be given away, unlike a run folder
            os.replace(checkpoint, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_for_others(run: Run, folder: Path, *, onnx: bool) -> dict[str, str]:
    """Weights, settings and programs; programs that are not defined, and why."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in run.model.state_dict().items()}
    save_file(state, folder / "weights.safetensors", {"kind": run.job.kind})
    about = {
        "model": _without_paths(run.job.model.model_dump(mode="json")),
        "shape": list(run.spec.image_shape),
        "classes": list(run.classes),
        "step": run.step,
        "weights": run.weights,
        "data_identity": run.data_identity,
    }
    (folder / "config.json").write_bytes(as_json(about))
    return write_programs(run.model, run.spec.image_shape, folder, onnx=onnx)


def _without_paths(value: Any) -> Any:
    """JSON values with each absolute path cut to its last name."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name
    return value
