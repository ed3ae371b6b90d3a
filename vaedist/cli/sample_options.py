"""The command line of vaedist-sample, and which of its options go together. It loads nothing but argparse."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_device, add_fit, add_run, add_verbosity, add_weights
from vaedist.core.errors import UserError

FRAMES = 11
MANIFOLD = 20

OUTPUTS = {
    "reconstruct": "reconstructions.png",
    "interpolate": "interpolation.png",
    "traverse": "traversal.png",
    "manifold": "manifold.png",
    "samples": "samples.png",
}
"""The picture of each mode: an option, or `samples` where none of these is given."""

_MODES_OF_OPTION: dict[str, tuple[str, ...]] = {
    "num_samples": ("samples",),
    "tar": ("samples",),
    "top_k": ("samples",),
    "top_p": ("samples",),
    "guidance": ("samples",),
    "sampler": ("samples", "interpolate"),
    "data": ("samples", "interpolate"),
    "codes": ("samples", "reconstruct"),
    "fit": ("reconstruct", "interpolate"),
    "frames": ("interpolate", "traverse", "manifold"),
}
"""Options that have a meaning in some modes only."""


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-sample",
        description="Draw images from a trained model into one grid (image i depends on the seed, i and its class "
        "alone; a conditional model's grid has a class in each row), show its latent space, or show its "
        "reconstructions of image files beside the originals.",
    )
    add_run(parser)
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="default: 64, of a conditional model a row for each class",
    )
    parser.add_argument(
        "--grid-size",
        type=int,
        default=8,
        metavar="N",
        help="images per row of the grid (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        "--output-path",
        dest="out",
        metavar="PNG",
        help="the picture (default: samples.png, reconstructions.png, interpolation.png, ...)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    _add_drawing_options(parser.add_argument_group("drawing"))
    _add_modes(parser.add_mutually_exclusive_group())
    add_fit(parser, "the user's files are made square")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"images from A to B, in a row of --traverse, or along a side of --manifold (default: {FRAMES}, {FRAMES}, "
        f"{MANIFOLD})",
    )
    parser.add_argument(
        "--codes",
        action="store_true",
        default=None,
        help="beside each image its map of codes, a colour for each",
    )
    parser.add_argument(
        "--npz", metavar="NPZ", help="write the images as arrays too: uint8 (N, C, H, W), for numpy.load"
    )
    parser.add_argument(
        "--tar",
        metavar="DIR",
        help="write the samples as a packed folder too: WebDataset tars that vaedist-evaluate and vaedist-train read "
        "(one split, train)",
    )
    add_weights(parser)
    add_device(parser)
    add_verbosity(parser, verbose="also say of each stage how long it took")
    parser.add_argument(
        "--info-only", action="store_true", help="print what the run is and its layers, and write nothing"
    )
    return parser


def _add_drawing_options(group: Any) -> None:
    group.add_argument(
        "--sampler",
        choices=("prior", "gmm"),
        help="where latents come from: the model's prior (default), or a Gaussian mixture fitted to the training "
        "images' latents, kept with the run",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="spread of the latents, or of a prior over codes; less is more typical (default: %(default)s)",
    )
    group.add_argument(
        "--class",
        action="append",
        dest="classes",
        metavar="NAME|NUMBER",
        help="which class a conditional model draws or decodes; `none`: without one, where it learned that; given "
        "several times, the rows take turns",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="only the K most probable codes at each place")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only the most probable codes that make up P at each place"
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="how far a prior over codes is pulled to the class (1: as it is)",
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="where the packed training data are now, for --sampler gmm (default: where the run read them)",
    )


def _add_modes(group: Any) -> None:
    """Options that choose another picture in place of samples."""
    group.add_argument(
        "--reconstruct",
        nargs="+",
        metavar="FILE",
        help="image files (png, jpg, ...) to pass through the model: the original framed, then its reconstruction",
    )
    group.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help="a strip from A to B, and a GIF beside it; each is an image file or the number of a sample",
    )
    group.add_argument(
        "--traverse",
        nargs="+",
        type=int,
        metavar="DIM",
        help="a row for each latent dimension (channel of a map), from -3 to 3 standard deviations times the "
        "temperature",
    )
    group.add_argument(
        "--manifold",
        action="store_true",
        help="of a model with two latent numbers: all it can draw, by quantiles",
    )


def check_sample_options(arguments: argparse.Namespace) -> str:
    """Refuse options that do not go together, and set the default of `--out`; the mode, a key of `OUTPUTS`.

    Raises:
        UserError: an option has no meaning in this mode, or a value is out of range.
    """
    mode = next((name for name in OUTPUTS if getattr(arguments, name, False)), "samples")
    for name, modes in _MODES_OF_OPTION.items():
        if getattr(arguments, name) is not None and mode not in modes:
            now = "for samples" if mode == "samples" else f"with --{mode}"
            raise UserError(f"{_option(name)} has no meaning {now}: leave it away")
    for name, least in {"num_samples": 1, "grid_size": 1, "frames": 2, "top_k": 1}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"{_option(name)} is {value}; give at least {least}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; give a whole number from 0 to 2^63 - 1")
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise UserError(
            f"--temperature is {arguments.temperature}; give a number of at least 0 (1: the prior)"
        )
    if arguments.classes and len(arguments.classes) > 1 and mode != "samples":
        raise UserError(f"--class is given {len(arguments.classes)} times; --{mode} takes one class")
    if arguments.data and arguments.sampler != "gmm":
        raise UserError(
            "--data is for --sampler gmm, which may have to fit to the training data: leave it away"
        )
    arguments.out = arguments.out or OUTPUTS[mode]
    if Path(arguments.out).suffix.lower() != ".png":
        raise UserError(f"--out is {arguments.out!r}; pictures are PNG files: let it end in .png")
    return mode


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
