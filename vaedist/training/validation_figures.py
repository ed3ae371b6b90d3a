"""What validation leaves to be looked at: pictures, TensorBoard's projector, the use of each latent unit, the alarm.

| in the run folder | what |
|---|---|
| figures/validation-STEP.png | originals (framed in red), what a denoiser was given, reconstructions; samples |
| tensorboard/projector/ | posterior means of up to 512 images with thumbnails, of the last validation only |
| latents.jsonl | a row per validation: `step`, `kl` (nats) and `variance` (of the posterior's mean) of each unit |
| collapse.json | the alarm of the last validation, if any: `vaedist.evaluation.metrics.posterior_collapse` |

Samples come from always the same noise. TensorBoard has the pictures and a histogram of the KL per unit. The alarm goes
into every checkpoint too, because whoever draws samples from it should know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vaedist.config.job import Job
from vaedist.core.files import as_json, disk_errors, replace_file
from vaedist.core.imaging import GRAY, Pixels, as_numpy, channels_last, framed, grid, png_bytes
from vaedist.evaluation.metrics.posterior_collapse import Collapse
from vaedist.models.contract import Variant
from vaedist.runs.run_folder import RunFolder
from vaedist.training.run_log import SilentLog
from vaedist.training.validation import SHOWN, ValidationSamples

SAMPLES = 2 * SHOWN
PROJECTOR = "projector"


class ValidationFigures:
    """Keeps the alarm, and on rank 0 writes what a validation has shown.

    Args:
        run: The run folder; None on every process but rank 0, which then writes nothing.
        log: For TensorBoard and the console.
        job: For the seed of the samples.
        classes: Names of the labels.
        saved: The state of the checkpoint that the run goes on from, if any.
    """

    def __init__(
        self,
        run: RunFolder | None,
        log: SilentLog,
        job: Job,
        classes: Sequence[str],
        saved: Mapping[str, Any] | None,
    ) -> None:
        self.run, self.log, self.job, self.classes = run, log, job, tuple(classes)
        self.collapse = Collapse.from_json((saved or {}).get("collapse"), "the checkpoint")
        if run is not None:
            self._write_alarm(run)

    def state(self) -> dict[str, Any] | None:
        """For the checkpoint."""
        return self.collapse.to_json() if self.collapse else None

    @torch.no_grad()
    def update(self, step: int, model: Variant, samples: ValidationSamples) -> None:
        """Take in a validation of `model` after `step` steps; called on every rank with the same `samples`."""
        before = self.collapse
        if samples.usage is not None:
            self.collapse = samples.usage.collapse(step)
        if self.run is None:
            return
        with disk_errors("what validation shows", self.run.path):
            self._show(step, pictures(model, samples, self.job.seed))
            if samples.latents:
                self._embed(samples)
            if samples.usage is not None:
                usage = samples.usage
                row = {"step": step, "kl": usage.kl, "variance": usage.variance}
                with self.run.latents.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
                if usage.kl is not None:
                    self.log.histogram(step, "kl_per_unit", np.array(usage.kl))
                self._write_alarm(self.run)
                self._sound(step, before)

    def _sound(self, step: int, before: Collapse | None) -> None:
        """Say it when it begins, grows, shrinks or ends; not again at every validation."""
        now = self.collapse
        if now is not None and (before is None or before.active != now.active):
            self.log.alarm(str(now))
        elif now is None and before is not None:
            self.log.message(f"step {step}: all {before.units} latent {before.what} are active again")

    def _write_alarm(self, run: RunFolder) -> None:
        if self.collapse is None:
            run.collapse.unlink(missing_ok=True)
        else:
            replace_file(run.collapse, as_json(self.collapse.to_json()))

    def _show(self, step: int, rows: dict[str, Pixels]) -> None:
        """Rows of pictures, as one numbered file and for TensorBoard."""
        assert self.run is not None
        if not rows:
            return
        made = [row for name, row in rows.items() if name != "samples"]
        if made:
            self.log.images(step, "reconstructions", grid(np.concatenate(made), SHOWN))
        if "samples" in rows:
            self.log.images(step, "samples", grid(rows["samples"], SHOWN))
        sheet = grid(np.concatenate(list(rows.values())), SHOWN)
        replace_file(self.run.figures / f"validation-{step:09d}.png", png_bytes(sheet))

    def _embed(self, samples: ValidationSamples) -> None:
        """TensorBoard's projector reads plain files; those of the validation before are replaced."""
        assert self.run is not None
        folder = self.run.tensorboard / PROJECTOR
        folder.mkdir(mode=0o700, exist_ok=True)
        means, thumbnails = as_numpy(samples.latents["mean"]), channels_last(samples.latents["thumbnail"])
        labels, numbers = samples.latents["label"].tolist(), samples.latents["sample"].tolist()
        names = [self.classes[label] if label < len(self.classes) else "" for label in labels]
        tensors = "".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in means)
        lines = [f"{_one_line(name)}\t{sample}\n" for name, sample in zip(names, numbers, strict=True)]
        # A square sheet: the projector derives the number of thumbnails in a row from their count.
        side = math.ceil(math.sqrt(len(thumbnails)))
        blank = np.zeros((side * side - len(thumbnails), *thumbnails.shape[1:]), np.uint8)
        height, width = thumbnails.shape[1:3]
        replace_file(folder / "tensors.tsv", tensors.encode())
        replace_file(folder / "metadata.tsv", ("class\tsample\n" + "".join(lines)).encode())
        replace_file(folder / "sprite.png", png_bytes(grid(np.concatenate([thumbnails, blank]), side, pad=0)))
        config = (
            f'embeddings {{\n  tensor_name: "latent"\n  tensor_path: "{PROJECTOR}/tensors.tsv"\n'
            f'  metadata_path: "{PROJECTOR}/metadata.tsv"\n  sprite {{\n    image_path: "{PROJECTOR}/sprite.png"\n'
            f"    single_image_dim: {width}\n    single_image_dim: {height}\n  }}\n}}\n"
        )
        replace_file(self.run.tensorboard / "projector_config.pbtxt", config.encode())


def pictures(model: Variant, samples: ValidationSamples, seed: int) -> dict[str, Pixels]:
    """Rows of 8 pictures (8 n, H, W, 3) by what they show, all of one size; only originals have a red frame.

    `originals`, `inputs` (of a denoiser) and `reconstructions` where the model reconstructs, `samples` from always the
    same noise where it samples.
    """
    rows: dict[str, Pixels] = {}
    if model.reconstructs and samples.pictures:
        image, label = samples.pictures["image"], samples.pictures["label"]
        rows["originals"] = _row(framed(channels_last(samples.pictures.get("target", image))))
        if "target" in samples.pictures:
            rows["inputs"] = _row(framed(channels_last(image), GRAY))
        made = model.reconstruct(image, label if model.conditional else None)
        rows["reconstructions"] = _row(framed(channels_last(made), GRAY))
    if model.samples:
        rows["samples"] = _row(framed(channels_last(model.sample(SAMPLES, seed=seed)), GRAY))
    return rows


def _row(images: Pixels) -> Pixels:
    """Filled up to whole rows with nothing, in the grey of the sheet."""
    missing = -len(images) % SHOWN
    return np.concatenate([images, np.full((missing, *images.shape[1:]), GRAY[0], np.uint8)])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for it."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in row.items()}
