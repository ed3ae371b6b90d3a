"""`vaedist-evaluate RUN ...`: how good trained models are on a split that they have not seen, and which is better."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_device, add_verbosity, add_weights
from vaedist.core.errors import UserError, cli_command
from vaedist.core.terminal import ProgressBars, echo_unless

if TYPE_CHECKING:
    from vaedist.data.format.index import Index
    from vaedist.evaluation.comparison import RunEvaluation
    from vaedist.evaluation.evaluate_model import Batches, EvaluationConfig, EvaluationResult
    from vaedist.evaluation.html_report.sections import RunReport
    from vaedist.runs.open_run import Run

SHOWN_PAIRS = 8
AUDITED = 1000


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-evaluate",
        description="Measure trained models on every image of a split: reconstructions (SSIM, MS-SSIM, PSNR, MSE, "
        "MAE) beside baselines, the terms of the loss, likelihood by importance sampling, latents, codes, priors over "
        "codes, and samples; per subject and per class too. What a model has not is named with the reason. Writes "
        "metrics.json, images.jsonl (one line per image) and pictures, replacing those of an earlier evaluation of the "
        "same split. Several runs are compared in one table, runs that differ only in their seed as one row.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run folder (its best checkpoint), or one checkpoint in it; several are compared",
    )
    parser.add_argument("--split", help="which split (default: test; where the data have none, validate)")
    parser.add_argument(
        "--data", metavar="DIR", help="where the packed data are now (default: where the run read them)"
    )
    parser.add_argument(
        "--other-data",
        action="store_true",
        help="allow data that the run was not trained from; metrics.json says so",
    )
    add_weights(parser)
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside reconstructions: black, the training mean, the nearest training image, PCA with as many "
        "components as the latent has numbers (default: on)",
    )
    parser.add_argument(
        "--importance",
        type=int,
        default=200,
        metavar="K",
        help="importance samples per image of the likelihood; 0: no likelihood and latents (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="estimates of the likelihood with new draws each, to see their spread (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="importance samples decoded at once: memory, not numbers (default: about a million pixel values)",
    )
    parser.add_argument(
        "--num-samples",
        "--samples",
        dest="samples",
        type=int,
        default=0,
        metavar="N",
        help="draw N samples and measure them against the split: KID, Frechet distance, precision, recall, density, "
        "coverage, sliced Wasserstein distance (default: none)",
    )
    parser.add_argument(
        "--sampler",
        choices=("prior", "gmm"),
        default="prior",
        help="where the latents of --num-samples come from: the model's prior (default), or a Gaussian mixture fitted "
        "to the training images' latents and kept with the run",
    )
    parser.add_argument(
        "--features",
        metavar="FILE",
        help="a TorchScript file as the extractor of sample metrics; it is code, and it is run (default: our own)",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help=f"does the model repeat training images? On --num-samples N (default here: {AUDITED})",
    )
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="means per group too: lines `case column column ...`, such as a patient and a contrast",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of the split")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where results are written (default: RUN/evaluation/SPLIT); of several runs a folder each, and "
        "comparison.json and comparison.txt",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="all of it as one HTML file, with curves, pictures and settings, to copy and to send",
    )
    add_device(parser)
    add_verbosity(
        parser,
        quiet="no progress bars, and no tables: they are in the files",
        verbose="also say of each stage how long it took",
    )
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)

    from vaedist.distributed.memory import keep_freed_memory
    from vaedist.evaluation.comparison import Comparison
    from vaedist.evaluation.groups import read_groups
    from vaedist.runs.checkpoint_paths import resolve_checkpoint
    from vaedist.runs.open_data import pick_device

    keep_freed_memory()
    files = read_groups(arguments.groups) if arguments.groups else {}
    device = pick_device(arguments.device)
    for path in arguments.runs:
        resolve_checkpoint(path)  # before the first of them is measured for an hour
    wanted = _wanted(arguments, device)
    tell = echo_unless(arguments.quiet)
    folders = _folders(arguments)
    entries: list[RunEvaluation] = []
    opened: list[Run] = []
    shown: list[RunReport] = []
    for path, out in zip(arguments.runs, folders, strict=True):
        entries.append(_evaluate(path, out, arguments, wanted, files, device, opened, shown))
        tell("")
    if len(entries) > 1:
        comparison = Comparison(entries)
        tell(text := comparison.text())
        if arguments.out:
            import json

            document = {"format": 1, "tables": comparison.document()}
            contents = {
                "comparison.json": (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
                "comparison.txt": f"{text}\n".encode(),
            }
            tell("\n" + "\n".join(_write(Path(arguments.out), contents)))
    if arguments.report:
        from vaedist.evaluation.html_report.page import page

        report = Path(arguments.report)
        tell("\n" + "\n".join(_write(report.parent, {report.name: page(opened, entries, shown)})))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("rounds", 1), ("chunk", 1), ("importance", 0), ("samples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            option = "--num-samples" if name == "samples" else f"--{name}"
            raise UserError(f"{option} is {value}; give at least {least}")
    if arguments.features and not (arguments.samples or arguments.audit):
        raise UserError("--features is for sample metrics: say with --num-samples N how many to draw")
    if arguments.report and Path(arguments.report).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report is {arguments.report!r}; it is an HTML file: let it end in .html")
    for option, folder in (("--out", arguments.out), ("--report", arguments.report)):
        if folder is not None:
            _takes_files(option, Path(folder) if option == "--out" else Path(folder).parent)
    if arguments.sampler != "prior" and not (arguments.samples or arguments.audit):
        raise UserError("--sampler is for sample metrics: say with --num-samples N how many to draw")


def _takes_files(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is measured for it."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{option} leads through {there}, which is a file: choose another folder")


def _wanted(arguments: argparse.Namespace, device: str) -> EvaluationConfig:
    from vaedist.evaluation.evaluate_model import EvaluationConfig
    from vaedist.evaluation.metrics.features import Extractor, default_extractor

    samples = arguments.samples or (AUDITED if arguments.audit else 0)
    features = None
    if samples:
        given = arguments.features
        features = Extractor.from_torchscript(given, device) if given else default_extractor(device)
    return EvaluationConfig(
        baselines=arguments.baselines,
        importance=arguments.importance,
        rounds=arguments.rounds,
        chunk=arguments.chunk,
        samples=samples,
        features=features,
        audit=arguments.audit,
    )


def _folders(arguments: argparse.Namespace) -> list[Path | None]:
    """Where each run's results go; None: into the run."""
    if arguments.out is None:
        return [None] * len(arguments.runs)
    out = Path(arguments.out)
    if len(arguments.runs) == 1:
        return [out]
    names = [Path(run).resolve().name for run in arguments.runs]
    return [
        out / (name if names.count(name) == 1 else f"{number}-{name}") for number, name in enumerate(names, 1)
    ]


def _evaluate(
    path: str,
    out: Path | None,
    arguments: argparse.Namespace,
    wanted: EvaluationConfig,
    files: dict[str, dict[str, str]],
    device: str,
    opened: list[Run],
    shown: list[RunReport],
) -> RunEvaluation:
    """Measure, write and print one run; `opened`, and `shown` for the report, hold those before it and get this one."""
    import json

    import torch

    from vaedist.data.loading.inputs import whole_split
    from vaedist.evaluation.comparison import RunEvaluation
    from vaedist.evaluation.evaluate_model import TrainingSplit, evaluate
    from vaedist.evaluation.groups import metrics_by_group
    from vaedist.evaluation.text_report import format_report
    from vaedist.inference.stored_mixture import load_or_fit_mixture
    from vaedist.runs.open_data import open_data
    from vaedist.runs.open_run import open_run

    run = open_run(path, weights=arguments.weights, device=device)
    index = open_data(run, arguments.data, arguments.other_data)
    name, train = _split(index, arguments.split), run.job.data.train_split
    split = index.split(name)
    if arguments.audit and name == train:
        raise UserError(
            f"--audit measures by held-out images, and {run.folder} was trained on {train!r}: choose another --split"
        )

    batches = whole_split(index, name, run.job, device=device, limit=arguments.limit)
    whole = whole_split(index, train, run.job, device=device)
    training = TrainingSplit(whole, index.split(train), run.spec.pixels, print)
    with ProgressBars(quiet=arguments.quiet, verbose=arguments.verbose) as bars:
        if arguments.sampler == "gmm":
            wanted = replace(wanted, mixture=lambda: load_or_fit_mixture(run, lambda: index, bars.start))
        found = evaluate(
            run.model, batches, training, wanted, seed=run.job.seed, step=run.step, bar=bars.start
        )
    document: dict[str, Any] = {
        "format": 1,
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "step": run.step,
        "weights": run.weights,
        "kind": run.job.kind,
        "tokenizer": run.job.model.tokenizer.sha256 if run.model.reads == "codes" else None,  # type: ignore[attr-defined]
        "data": {
            "path": str(index.folder),
            "identity": index.identity,
            "other_data": index.identity != run.data_identity,
            "split": name,
            "split_images": split.count,
            "shape": list(index.shape),
            "binarise": batches.inputs.binarization,
        },
        "collapse": run.collapse.to_json() if run.collapse else None,
        "torch": torch.__version__,
        **found.document(),
        "groups": metrics_by_group(found.evaluation, split, index.classes, files, print),
    }
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in found.evaluation.lines())
    contents = {
        "metrics.json": (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
        "images.jsonl": lines.encode(),
        **found.pictures,
    }
    if run.model.reconstructs:
        contents["pairs.png"] = _pairs(run, batches, found, name)
    written = _write(out or run.folder / "evaluation" / name, contents)
    tell = echo_unless(arguments.quiet)
    tell(format_report(document))
    tell("\n" + "\n".join(written))
    opened.append(run)
    if arguments.report:
        from vaedist.evaluation.html_report.sections import run_report

        shown.append(run_report(run, index, batches, found, document))
    return RunEvaluation(run.job.name, run.job.seed, _experiment(opened), document)


def _split(index: Index, given: str | None) -> str:
    """Which split is measured. Own images often come without a test split; this is said wherever it matters."""
    if given is not None or "test" in index.splits or "validate" not in index.splits:
        return given or "test"
    print(
        f"note: {index.folder} has no test split (vaedist-shard --test-fraction 0.1 holds one apart): measured on "
        "validate, by which the checkpoint was chosen, so the numbers are somewhat too good",
        file=sys.stderr,
    )
    return "validate"


def _pairs(run: Run, batches: Batches, found: EvaluationResult, split: str) -> bytes:
    from vaedist.evaluation.metrics.per_image import pairs, pick_evenly
    from vaedist.inference.figures import pair_figure, pair_title

    rows = pick_evenly(found.evaluation.rows, SHOWN_PAIRS)
    originals, others = pairs(run.model, batches, [row.sample for row in rows])
    titles = [f"{row.key[:24]}\n{pair_title(row.metrics)}" for row in rows]
    heading = f"{run.job.name}, {run.job.kind}, step {run.step}: {split}, worst to best"
    return pair_figure(originals, others, titles, heading=heading)


def _experiment(opened: list[Run]) -> int:
    """Number of the first run that differs from the last one by its seed alone."""
    from vaedist.runs.open_run import same_experiment

    return next(number for number, run in enumerate(opened) if same_experiment(run, opened[-1]))


def _write(folder: Path, contents: dict[str, bytes]) -> list[str]:
    """Write files into a folder that is private to the user; a line for each."""
    from vaedist.core.imaging import write_atomic

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from None
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [f"wrote {folder / name}" for name in contents]


if __name__ == "__main__":
    raise SystemExit(main())
