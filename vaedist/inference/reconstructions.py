"""The user's own images through a model: originals, each beside its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vaedist.core.context import Batch
from vaedist.core.imaging import Pixels, as_numpy, channels_last, code_maps, write_atomic
from vaedist.data.format.resize import Fit, open_fitting
from vaedist.data.loading.inputs import Inputs
from vaedist.evaluation.metrics.image_quality import pair_metrics, summaries
from vaedist.evaluation.metrics.per_image import reconstruct
from vaedist.evaluation.metrics.tables import metrics_table
from vaedist.inference.figures import framed_sheet
from vaedist.inference.picture_files import PictureFiles, PictureResult
from vaedist.runs.open_run import Run


def read_images(run: Run, files: Sequence[str], fit: Fit = "pad") -> Pixels:
    """Image files as uint8 (n, C, H, W), as the model is shown images.

    Raises:
        UserError: one cannot be read.
    """
    read = np.stack([open_fitting(file, run.spec.image_shape, fit) for file in files])
    # For a model of binarised images: the static draw of each file's name.
    keys = [Path(file).name for file in files]
    return Inputs(run.job).binarize(torch.from_numpy(read), keys).numpy()


def write_reconstructions(
    run: Run,
    files: Sequence[str],
    target: PictureFiles,
    *,
    columns: int,
    label: int | None = None,
    fit: Fit = "pad",
    codes: bool = False,
) -> PictureResult:
    """Originals in frames, each beside its reconstruction and, if wanted, its codes.

    Args:
        run: Its model reconstructs.
        files: Image files.
        target: Of the sheet.
        columns: Images in a row.
        label: None, or the class that the model is given.
        fit: How files are made square.
        codes: Whether codes are shown.

    Raises:
        NotDefined: the model does not reconstruct, or has no codes.
    """
    if not run.model.reconstructs:
        raise run.model.not_defined("reconstruct")
    if codes and run.model.latent != "codes":
        raise run.model.not_defined("codes")
    originals = read_images(run, files, fit)
    reconstructed, code_parts = [], []
    for start in range(0, len(files), 16):
        part = slice(start, start + 16)
        batch = Batch(image=torch.from_numpy(originals[part]).to(run.device), key=list(files[part]))
        if label is not None:
            batch["label"] = torch.full((len(batch["image"]),), label, dtype=torch.int64, device=run.device)
        with torch.no_grad():
            reconstructed.append(reconstruct(run.model, batch))
            if codes:
                code_parts.append(as_numpy(run.model.codes(batch["image"])))
    others = np.concatenate(reconstructed)
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else list(files)
    rows = {
        name: (1, summaries([pair_metrics(*pair)]))
        for name, *pair in zip(names, originals, others, strict=True)
    }
    arrays = {"originals": originals, "reconstructions": others}
    shown = [channels_last(originals), channels_last(others)]
    if codes:
        arrays["codes"] = np.concatenate(code_parts)
        shown.append(code_maps(arrays["codes"], *run.spec.shape))
    write_atomic(target.picture, framed_sheet(*shown, columns=max(1, columns // len(shown))))
    lines = [f"reconstructions by {run.title}", metrics_table(rows, "file", spread=False)]
    return PictureResult(lines, [target.picture, *target.write_arrays(**arrays)])
