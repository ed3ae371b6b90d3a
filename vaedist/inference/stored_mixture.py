"""The Gaussian mixture of a run's latents, fitted once and kept with the run: see `vaedist.inference.mixture`.

It lies at `RUN/density/gmm-<hash>.safetensors`, named after what it was fitted to: the chosen weights, the data and
how they were shown. Other weights of the same run get another file, and a stale one is never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from vaedist.core.errors import UserError
from vaedist.core.imaging import write_atomic
from vaedist.core.terminal import StartBar
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import whole_split
from vaedist.evaluation.metrics.latents import collect_latents
from vaedist.inference.mixture import COMPONENTS, Mixture, fit_mixture
from vaedist.inference.sampling import require_numeric_latent
from vaedist.runs.open_run import Run
from vaedist.runs.weights import weights_digest

log = logging.getLogger("vaedist")


def mixture_stamp(run: Run) -> dict[str, str | int]:
    """What a mixture of this run's latents depends on."""
    return {
        "weights": weights_digest(run.model.state_dict()),
        "data": run.data_identity,
        "split": run.job.data.train_split,
        "binarise": run.job.data.binarise,
        "seed": run.job.seed,
        "components": COMPONENTS,
    }


def mixture_path(run: Run) -> Path:
    """Where the run keeps, or would keep, its mixture."""
    text = json.dumps(mixture_stamp(run), sort_keys=True)
    return run.folder / "density" / f"gmm-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def load_mixture(run: Run) -> Mixture | None:
    """The mixture that was fitted before, if one was.

    Raises:
        UserError: its file is damaged.
    """
    path = mixture_path(run)
    if not path.exists():
        return None
    return Mixture.from_bytes(path.read_bytes(), mixture_stamp(run), path)


def load_or_fit_mixture(
    run: Run, data: Callable[[], Index], bar: StartBar = lambda *_: lambda _: None
) -> Mixture:
    """The mixture kept with the run; fitted now if there is none.

    Args:
        run: Opened.
        data: Opens the data that it was trained from, if they are needed.
        bar: Begins a progress bar over the training images.

    Raises:
        NotDefined: the variant gives no posterior over numbers.
        UserError: the stored file is damaged, or `data` are not those that the run was trained from.
    """
    require_numeric_latent(run.model, "encode")
    held = load_mixture(run)
    if held is not None:
        return held
    index = data()
    if index.identity != run.data_identity:
        raise UserError(
            f"--sampler gmm is fitted to the data that {run.folder} was trained from, and {index.folder} holds others: "
            f"fit it first, with `vaedist-sample {run.folder} --sampler gmm`"
        )
    count = index.split(run.job.data.train_split).count
    return fit_and_store_mixture(run, index, bar("latents of the training images", count))


def fit_and_store_mixture(run: Run, index: Index, progress: Callable[[int], None] | None = None) -> Mixture:
    """Fit a mixture to the training split's latents and store it with the run.

    Args:
        run: Opened; its variant gives each image a posterior over numbers.
        index: The data it was trained from.
        progress: Called with the number of images done.

    Raises:
        NotDefined: the variant has no such posterior.
    """
    require_numeric_latent(run.model, "encode")
    batches = whole_split(index, run.job.data.train_split, run.job, device=run.device)
    latents = collect_latents(run.model, batches, seed=run.job.seed, progress=progress)
    classes = run.spec.classes if run.model.conditional else None
    mixture = fit_mixture(latents, classes=classes, seed=run.job.seed)
    path = mixture_path(run)
    try:
        write_atomic(path, mixture.to_bytes(mixture_stamp(run)))
    except UserError as error:  # a run that only its owner may write to can still be sampled
        log.warning("%s: the density is fitted anew each time", error)
    return mixture
