"""`vaedist-evaluate RUN`: how good a trained model is on a split that it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaedist.errors import UserError, door

if TYPE_CHECKING:
    from vaedist.data.index import Index, Split
    from vaedist.metrics.baselines import Baselines
    from vaedist.metrics.evaluation import Evaluation
    from vaedist.training.run import Run

BASELINE_BYTES = 2 << 30
"""Most memory for the training images that the baselines are fitted on; of a larger set, every n-th image."""
SHOWN_GROUPS = 40
SHOWN_PAIRS = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaedist-evaluate",
        description="Measure a trained model on every image of a split: SSIM, PSNR, MSE, MAE, the terms of its "
        "loss, and the codes it uses; per subject and per class too. Writes metrics.json, images.jsonl (one line "
        "per image) and pairs.png, replacing those of an earlier evaluation of the same split.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run folder (its best checkpoint), or one checkpoint in it"
    )
    parser.add_argument("--split", default="test", help="which split (default: %(default)s)")
    parser.add_argument(
        "--data", metavar="DIR", help="where the packed data are now (default: where the run read them)"
    )
    parser.add_argument(
        "--other-data",
        action="store_true",
        help="allow data that the run was not trained from; metrics.json says so",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (default: what the job says)"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="beside the model: black, the training mean, the nearest training image, PCA-32",
    )
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="means per group too: lines `case column column ...`, such as a patient and a contrast",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of the split")
    parser.add_argument(
        "--out", metavar="DIR", help="where results are written (default: RUN/evaluation/SPLIT)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    return parser


@door
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit is {arguments.limit}; give at least 1")

    import json

    import torch

    from vaedist.data.stream import EvaluationStream
    from vaedist.metrics.evaluation import evaluate, pairs, pick_evenly
    from vaedist.metrics.figures import pair_figure, pair_title
    from vaedist.metrics.groups import read_groups
    from vaedist.pictures import write_whole
    from vaedist.training.run import open_run

    files = read_groups(arguments.groups) if arguments.groups else {}
    device = pick_device(arguments.device)
    run = open_run(arguments.run, weights=arguments.weights, device=device)
    index = _open_data(run, arguments.data, arguments.other_data)
    split = index.split(arguments.split)

    def stream(name: str, limit: int | None = None) -> EvaluationStream:
        # A batch of about a million pixels keeps the activations of a wide network in memory.
        rows = max(1, min(256, (1 << 20) // (run.spec.height * run.spec.width)))
        return EvaluationStream(index, name, batch_size=rows, workers=1, device=device, limit=limit)

    fitted = None
    if arguments.baselines:
        fitted = _fit_baselines(index, run.job.data.train_split, stream(run.job.data.train_split))
    batches = stream(arguments.split, arguments.limit)
    with _bar(batches.count) as bar:
        found = evaluate(
            run.model,
            batches,
            seed=run.job.seed,
            step=run.step,
            baselines=fitted,
            progress=lambda done: bar.update(done - bar.n),
        )
    groups = _groups(found, split, index.classes, files)

    folder = Path(arguments.out) if arguments.out else run.folder / "evaluation" / arguments.split
    document: dict[str, Any] = {
        "format": 1,
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "weights": run.weights,
        "kind": run.job.model["kind"],
        "data": {
            "path": str(index.folder),
            "identity": index.identity,
            "other_data": index.identity != run.data_identity,
            "split": arguments.split,
            "split_images": split.count,
            "shape": list(index.shape),
        },
        "torch": torch.__version__,
        **found.document(),
        "groups": groups,
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder}: {error.strerror}; choose another with --out"
        ) from None
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in found.lines())
    contents = {
        "metrics.json": (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
        "images.jsonl": lines.encode(),
    }
    if run.model.reconstructs:
        rows = pick_evenly(found.rows, SHOWN_PAIRS)
        originals, others = pairs(run.model, batches, [row.sample for row in rows])
        titles = [f"{row.key[:24]}\n{pair_title(row.metrics)}" for row in rows]
        heading = (
            f"{run.job.name}, {run.job.model['kind']}, step {run.step}: {arguments.split}, worst to best"
        )
        contents["pairs.png"] = pair_figure(originals, others, titles, heading=heading)
    for name, content in contents.items():
        write_whole(folder / name, content)

    _print(run, document, found)
    print("\n" + "\n".join(f"wrote {folder / name}" for name in contents))
    return 0


def pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; use --device cpu")
    return name


def _open_data(run: Run, given: str | None, other_data: bool) -> Index:
    """The packed folder, proven to be the one that the run was trained from unless another is allowed."""
    from vaedist.data.index import INDEX_NAME, Index

    if given is None and not (Path(run.data_path) / INDEX_NAME).exists():
        raise UserError(
            f"the run was trained from {run.data_path}, which is not here: say with --data where the data are now"
        )
    index = Index.open(given or run.data_path)
    if index.identity != run.data_identity and not other_data:
        raise UserError(
            f"{index.folder} does not hold the data that the run was trained from (data identity "
            f"{index.identity[:12]}, the run has {run.data_identity[:12]}): give their folder with --data, or allow "
            "these with --other-data"
        )
    expected = (run.spec.channels, run.spec.height, run.spec.width)
    if index.shape != expected:
        raise UserError(
            f"{index.folder} has images of shape {index.shape} (C, H, W) and the model takes {expected}: pack them "
            f"with --size {run.spec.height} and {'--rgb' if run.spec.channels == 3 else '--gray'}"
        )
    if run.model.conditional and index.classes != run.classes:
        raise UserError(
            f"{index.folder} has classes {index.classes} and the model was trained on {run.classes}"
        )
    return index


def _fit_baselines(index: Index, name: str, batches: Any) -> Baselines:
    from vaedist.metrics.baselines import Baselines
    from vaedist.metrics.evaluation import training_images

    count = index.split(name).count
    every = -(-count * index.spec.pixels // BASELINE_BYTES)
    if every > 1:
        print(f"baselines: fitted on every {every}th of the {count} images of {name}, to fit in memory")
    return Baselines(training_images(batches, every))


def _bar(total: int) -> Any:
    import sys

    from tqdm import tqdm

    return tqdm(total=total, unit=" images", desc="evaluate", disable=not sys.stderr.isatty(), leave=False)


def _groups(
    found: Evaluation, split: Split, classes: tuple[str, ...], files: dict[str, dict[str, str]]
) -> dict[str, dict[str, Any]]:
    """Per subject, per class, and per column of the groups file: means of each group that holds several images."""
    from vaedist.metrics.groups import group_of

    subjects = {row.sample: split.subject(row.sample) for row in found.rows}
    labels = {row.sample: split.label(row.sample) for row in found.rows}
    groups = {"subject": found.by(lambda row: subjects[row.sample] or None)}
    if len(groups["subject"]) == len(found.rows) > 1:
        del groups["subject"]  # every image is its own subject: those are the rows of images.jsonl
    if classes:
        groups["class"] = found.by(
            lambda row: classes[labels[row.sample]] if labels[row.sample] >= 0 else None
        )
    for column, names in files.items():
        groups[column] = found.by(lambda row, names=names: group_of(names, row.key, subjects[row.sample]))  # type: ignore[misc]
        members = sum(group["images"] for group in groups[column].values())
        if members == 0:
            raise UserError(
                f"--groups: no image is in any group; its first column holds names such as {next(iter(names))!r}, "
                f"the images have keys such as {found.rows[0].key!r}"
            )
        if members < len(found.rows):
            print(f"note: {len(found.rows) - members} images have no {column} in the groups file")
    return {name: members for name, members in groups.items() if members}


def _print(run: Run, document: dict[str, Any], found: Evaluation) -> None:
    from vaedist.metrics.tables import metrics_table, terms_table

    images, data = document["images"], document["data"]
    shape = "x".join(str(size) for size in data["shape"])
    part = "" if images == data["split_images"] else f" of {data['split_images']}"
    print(f"run    {run.folder}: {document['kind']}, step {run.step}, {run.weights} weights")
    print(f"data   {data['path']}: {data['split']}, {images}{part} images of {shape}")
    if data["other_data"]:
        print("note   these are not the data that the run was trained from (--other-data)")
    rows = {"this run": (images, document["metrics"])}
    rows |= {name: (images, metrics) for name, metrics in document["baselines"].items()}
    if any(metrics for _, metrics in rows.values()):
        print("\nmean ±spread (standard deviation over images); foreground: where the original is > 0")
        print(metrics_table(rows))
    print("\n" + terms_table(document["terms"], document["units"], images))
    for name, value in found.batch_terms.items():
        print(f"{name} {value:.6g} (a statistic of whole batches: depends on their size)")
    if found.codes is not None:
        codes = found.codes
        print(
            f"\ncodes used {codes['used']} of {codes['codes']} ({100 * codes['used_share']:.1f} %), perplexity "
            f"{codes['perplexity']:.1f}, over {codes['vectors']} vectors"
        )
    for name, groups in document["groups"].items():
        if len(groups) > SHOWN_GROUPS:
            print(f"\nper {name}: {len(groups)} groups, in metrics.json")
            continue
        lines = {group: (values["images"], values["metrics"]) for group, values in groups.items()}
        print("\n" + metrics_table(lines, f"per {name}", spread=False))
    for reason in found.not_defined.values():
        print(reason)


if __name__ == "__main__":
    raise SystemExit(main())
