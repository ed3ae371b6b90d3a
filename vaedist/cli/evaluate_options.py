"""The command line of vaedist-evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path

from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_device, add_verbosity, add_weights
from vaedist.core.errors import UserError

AUDITED = 1000
"""Samples of `--audit` where no number is given."""


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-evaluate",
        description="Measure trained models on every image of a split: reconstructions (SSIM, MS-SSIM, PSNR, MSE, "
        "MAE) beside baselines, the terms of the loss, likelihood by importance sampling, latents, codes, priors over "
        "codes, and samples; per subject and per class too. What a model has not is named with the reason. Writes "
        "metrics.json, images.jsonl (one line per image) and pictures, replacing those of an earlier evaluation of the "
        "same split. Several runs are compared in one table, runs that differ only in their seed as one row.",
    )
    _add_runs(parser)
    _add_measures(parser)
    _add_samples(parser)
    _add_output(parser)
    return parser


def _add_runs(parser: Parser) -> None:
    text = "a run folder (its best checkpoint), or one checkpoint in it; several are compared"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=text)
    parser.add_argument("--split", help="which split (default: test; where the data have none, validate)")
    text = "where the packed data are now (default: where the run read them)"
    parser.add_argument("--data", metavar="DIR", help=text)
    text = "allow data that the run was not trained from; metrics.json says so"
    parser.add_argument("--other-data", action="store_true", help=text)
    add_weights(parser)


def _add_measures(parser: Parser) -> None:
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside reconstructions: black, the training mean, the nearest training image, PCA with as many "
        "components as the latent has numbers (default: on)",
    )
    text = (
        "importance samples per image of the likelihood; 0: no likelihood and latents (default: %(default)s)"
    )
    parser.add_argument("--importance", type=int, default=200, metavar="K", help=text)
    text = "estimates of the likelihood with new draws each, to see their spread (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help=text)
    text = "importance samples decoded at once: memory, not numbers (default: about a million pixel values)"
    parser.add_argument("--chunk", type=int, metavar="N", help=text)


def _add_samples(parser: Parser) -> None:
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
    text = (
        "a TorchScript file as the extractor of sample metrics; it is code, and it is run (default: our own)"
    )
    parser.add_argument("--features", metavar="FILE", help=text)
    text = f"does the model repeat training images? On --num-samples N (default here: {AUDITED})"
    parser.add_argument("--audit", action="store_true", help=text)


def _add_output(parser: Parser) -> None:
    text = "means per group too: lines `case column column ...`, such as a patient and a contrast"
    parser.add_argument("--groups", metavar="FILE", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of the split")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where results are written (default: RUN/evaluation/SPLIT); of several runs a folder each, and "
        "comparison.json and comparison.txt",
    )
    text = "all of it as one HTML file, with curves, pictures and settings, to copy and to send"
    parser.add_argument("--report", metavar="FILE", help=text)
    add_device(parser)
    text = "no progress bars, and no tables: they are in the files"
    add_verbosity(parser, quiet=text, verbose="also say of each stage how long it took")


def check_evaluate_options(arguments: argparse.Namespace) -> None:
    """Refuse what means nothing, and what would fail only after everything is measured."""
    for name, least in (("limit", 1), ("rounds", 1), ("chunk", 1), ("importance", 0), ("samples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            option = "--num-samples" if name == "samples" else f"--{name}"
            raise UserError(f"{option} is {value}; give at least {least}")
    if arguments.audit:
        arguments.samples = arguments.samples or AUDITED
    if arguments.features and not arguments.samples:
        raise UserError("--features is for sample metrics: say with --num-samples N how many to draw")
    if arguments.report and Path(arguments.report).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report is {arguments.report!r}; it is an HTML file: let it end in .html")
    folders = {"--out": arguments.out, "--report": arguments.report and Path(arguments.report).parent}
    for option, folder in folders.items():
        if folder is not None:
            path = Path(folder)
            existing = next(path for path in (path, *path.parents) if path.exists())
            if not existing.is_dir():
                raise UserError(f"{option} leads through {existing}, which is a file: choose another folder")
    if arguments.sampler != "prior" and not arguments.samples:
        raise UserError("--sampler is for sample metrics: say with --num-samples N how many to draw")
