"""The model card of an export: what it is, what it was trained on, what it reaches, and what it is not for.

After Mitchell et al., "Model cards for model reporting" (2019). Facts that vaedist does not know (licences,
intended use) are `not stated`, to be filled in by hand; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaedist.evaluation.metrics.tables import metrics_rows
from vaedist.inference.export.programs import usage_example
from vaedist.runs.open_run import Run
from vaedist.runs.provenance import read_starts

NOT_STATED = "not stated"


def model_card(
    run: Run, *, licence: str, data_licence: str, missing: Mapping[str, str] | None, onnx: bool = False
) -> str:
    """Markdown.

    Args:
        run: Opened.
        licence, data_licence: Of the weights, and of the images that they were trained on; empty: not stated.
        missing: Programs that are not there, and why; None: none were made.
        onnx: Whether they are there as ONNX too.
    """
    shape = " x ".join(str(axis) for axis in run.spec.image_shape)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    about = (
        f"A `{run.job.kind}` of {shape} images (channels, height, width), {parameters:,} parameters, trained "
        f"with vaedist for {run.step:,} steps; `{run.weights}` weights."
    )
    parts = [
        f"# {run.job.name}",
        about,
        *([f"**Alarm:** {run.collapse}"] if run.collapse else []),
        "## Data",
        _lines(
            {
                "identity": f"`{run.data_identity}` (a hash of keys, labels, splits and pixels)",
                "classes": ", ".join(run.classes) or "none",
                "licence": data_licence or NOT_STATED,
            }
        ),
        "## Numbers",
        _numbers(run.folder),
        "## Use",
        _lines(
            {
                "licence of the weights": licence or NOT_STATED,
                "intended use": NOT_STATED,
                "not for": "decisions about people. Samples and reconstructions look like data and are not: of medical "
                "images they show no patient, and what they show of a patient may be wrong.",
                "limits": "it knows images like those that it was trained on, of this size and grey scale; other "
                "scanners, sites or populations were not measured unless the numbers say so. Whether it repeats its "
                "training images says the memorisation audit (`vaedist-evaluate --audit`), if it was made.",
            }
        ),
        "## Files",
        _files(run, missing, onnx),
        "## How it was made",
        _made(run),
    ]
    return "\n\n".join(parts) + "\n"


def _lines(values: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _numbers(folder: Path) -> str:
    """The reconstructions and samples of each evaluation that the run holds."""
    parts = []
    for path in sorted((folder / "evaluation").glob("*/metrics.json")):
        try:
            document = json.loads(path.read_bytes())
            images = document["images"]
            held = {"this model": document["metrics"], **document["baselines"]}
            head, *rows = metrics_rows(
                {name: (images, values) for name, values in held.items()}, spread=False
            )
            lines = [f"Split `{document['data']['split']}`, {images:,} images, step {document['step']:,}:"]
        except (OSError, ValueError, KeyError):
            continue
        if len(head) > 2:
            # How many images it is stands above the table.
            lines += ["", f"| | {' | '.join(head[2:])} |", "|---" + "|---:" * len(head[2:]) + "|"]
            lines += [f"| {title} | {' | '.join(cells)} |" for title, _, *cells in rows]
        samples: dict[str, Any] = document.get("samples", {}).get("metrics", {}).get("this run", {})
        if samples:
            lines += [
                "",
                "Samples: " + ", ".join(f"{name} {value:.4g}" for name, value in samples.items()) + ".",
            ]
        if "audit" in document:
            lines += ["", f"Memorisation audit: {document['audit']['verdict']}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "It was not evaluated: `vaedist-evaluate` was not run before the export."


def _files(run: Run, missing: Mapping[str, str] | None, onnx: bool) -> str:
    files = {
        "`weights.safetensors`, `config.json`": "the weights by name, and the settings of the model",
        "`manifest.json`, `state.pt`": "the same for vaedist: `vaedist-sample DIR`, `init_from`, `vaedist.load(DIR)`",
    }
    if missing is None:
        return _lines(files)
    files["`encoder.pt2`, `decoder.pt2`"] = (
        "programs for `torch.export.load`, which need torch and nothing else"
    )
    if onnx:
        files["`encoder.onnx`, `decoder.onnx`"] = (
            "the same for ONNX Runtime and others that read ONNX (inputs by the names below)"
        )
    files |= {f"`{name}` is not there": reason for name, reason in missing.items()}
    text = _lines(files)
    if not missing:
        text += f"\n\n```python\n{usage_example(run.model, run.spec.image_shape)}\n```"
    return text


def _made(run: Run) -> str:
    starts = read_starts(run.folder)
    if not starts:
        return "No record of its training lies beside the checkpoint."
    last = starts[-1]
    libraries = ", ".join(f"{name} {version}" for name, version in last.get("libraries", {}).items())
    return _lines(
        {
            "vaedist": f"{last.get('vaedist')}, commit {last.get('git_commit') or NOT_STATED}",
            "started": f"{len(starts)} times, last {last.get('time')}, {last.get('workers')} processes",
            "libraries": libraries,
            "settings": "`config.json`",
        }
    )
