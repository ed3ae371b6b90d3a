"""`vaedist-sample RUN`: new images from a trained model, its latent space, or the user's own images through it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from vaedist.cli.parser import Parser, add_loudness
from vaedist.core.errors import NotDefined, UserError, cli_command
from vaedist.core.terminal import ProgressBars, colored, echo_unless

if TYPE_CHECKING:
    from vaedist.inference.mixture import Mixture
    from vaedist.inference.sampling import Sampler
    from vaedist.inference.show import Page
    from vaedist.runs.open_run import Run

FRAMES = 11
MANIFOLD = 20

# Options that belong to some modes only; `modes` are the options that choose one, or `samples`.
_MODES = ("reconstruct", "interpolate", "traverse", "manifold")
_OF_MODES: dict[str, tuple[str, ...]] = {
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
_OUTPUTS = {
    "samples": "samples.png",
    "reconstruct": "reconstructions.png",
    "interpolate": "interpolation.png",
    "traverse": "traversal.png",
    "manifold": "manifold.png",
}


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-sample",
        description="Draw images from a trained model into one grid (image i depends on the seed, i and its class "
        "alone; a conditional model's grid has a class in each row), show its latent space, or show its "
        "reconstructions of image files beside the originals.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run folder (its best checkpoint), or one checkpoint in it"
    )
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
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--sampler",
        choices=("prior", "gmm"),
        help="where latents come from: the model's prior (default), or a Gaussian mixture fitted to the training "
        "images' latents, kept with the run",
    )
    drawing.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="spread of the latents, or of a prior over codes; less is more typical (default: %(default)s)",
    )
    drawing.add_argument(
        "--class",
        action="append",
        dest="classes",
        metavar="NAME|NUMBER",
        help="which class a conditional model draws or decodes; `none`: without one, where it learned that; given "
        "several times, the rows take turns",
    )
    drawing.add_argument(
        "--top-k", type=int, metavar="K", help="only the K most probable codes at each place"
    )
    drawing.add_argument(
        "--top-p", type=float, metavar="P", help="only the most probable codes that make up P at each place"
    )
    drawing.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="how far a prior over codes is pulled to the class (1: as it is)",
    )
    drawing.add_argument(
        "--data",
        metavar="DIR",
        help="where the packed training data are now, for --sampler gmm (default: where the run read them)",
    )
    looking = parser.add_mutually_exclusive_group()
    looking.add_argument(
        "--reconstruct",
        nargs="+",
        metavar="FILE",
        help="image files (png, jpg, ...) to pass through the model: the original framed, then its reconstruction",
    )
    looking.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("A", "B"),
        help="a strip from A to B, and a GIF beside it; each is an image file or the number of a sample",
    )
    looking.add_argument(
        "--traverse",
        nargs="+",
        type=int,
        metavar="DIM",
        help="a row for each latent dimension (channel of a map), from -3 to 3 standard deviations times the "
        "temperature",
    )
    looking.add_argument(
        "--manifold",
        action="store_true",
        help="of a model with two latent numbers: all it can draw, by quantiles",
    )
    parser.add_argument(
        "--fit",
        choices=("pad", "crop", "stretch"),
        help="how the user's files are made square (default: pad)",
    )
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
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (default: what the job says)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default: auto)",
    )
    add_loudness(parser, verbose="also say of each stage how long it took")
    parser.add_argument(
        "--info-only", action="store_true", help="print what the run is and its layers, and write nothing"
    )
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    mode = _check(arguments)

    from vaedist.distributed.memory import keep_freed_memory
    from vaedist.runs.open_data import pick_device
    from vaedist.runs.open_run import open_run

    keep_freed_memory()
    run = open_run(arguments.run, weights=arguments.weights, device=pick_device(arguments.device))
    tell = echo_unless(arguments.quiet)
    if run.collapse:
        tell(f"{colored('ALARM:', 'yellow')} {run.collapse}")
    if arguments.info_only:
        _info(run)
        return 0
    try:
        with ProgressBars(quiet=arguments.quiet, verbose=arguments.verbose) as bars:
            page = _page(run, mode, arguments, bars)
    except NotDefined as error:
        possible = "; its reconstructions are: --reconstruct FILE ..." if run.model.reconstructs else ""
        told = f"{run.folder} ({run.job.kind}): {error}"
        raise NotDefined(told + (possible if mode == "samples" and not run.model.samples else "")) from None
    tell("\n".join([*page.told, *(f"wrote {path}" for path in page.written)]))
    return 0


def _page(run: Run, mode: str, arguments: argparse.Namespace, bars: ProgressBars) -> Page:
    """Make and write what was asked for."""
    from vaedist.inference import show

    between = "sampler gmm" if arguments.sampler == "gmm" else mode
    if run.model.latent == "codes" and between in ("interpolate", "traverse", "manifold", "sampler gmm"):
        raise NotDefined(
            f"--{between} is not defined, because the latent is a map of codes, with nothing between one and the next: "
            "leave it away"
        )
    classes = show.class_numbers(run, arguments.classes)
    target = show.Target(arguments.out, arguments.npz)
    if mode == "reconstruct":
        return show.reconstructions(
            run,
            arguments.reconstruct,
            target,
            columns=arguments.grid_size,
            classes=classes,
            fit=arguments.fit or "pad",
            codes=bool(arguments.codes),
        )
    if mode == "traverse":
        frames, reach = arguments.frames or FRAMES, arguments.temperature
        return show.traversal(
            run, arguments.traverse, target, frames=frames, classes=classes, temperature=reach
        )
    if mode == "manifold":
        side, reach = arguments.frames or MANIFOLD, arguments.temperature
        return show.manifold(run, target, side=side, classes=classes, temperature=reach)
    sampler = _sampler(run, arguments, bars)
    if mode == "interpolate":
        return show.interpolation(
            run,
            sampler,
            arguments.interpolate,
            target,
            frames=arguments.frames or FRAMES,
            classes=classes,
            fit=arguments.fit or "pad",
        )
    return show.samples(
        run,
        sampler,
        target,
        count=arguments.num_samples,
        columns=arguments.grid_size,
        classes=classes,
        tar=arguments.tar,
        bars=bars,
    )


def _check(arguments: argparse.Namespace) -> str:
    """Refuse what means nothing; the mode: an option of `_MODES`, or `samples`."""
    mode = next((name for name in _MODES if getattr(arguments, name)), "samples")
    for name, modes in _OF_MODES.items():
        if getattr(arguments, name) is not None and mode not in modes:
            now = "for samples" if mode == "samples" else f"with --{mode}"
            raise UserError(f"{_option(name)} has no meaning {now}: leave it away")
    least = {"num_samples": 1, "grid_size": 1, "frames": 2, "top_k": 1}
    for name, bound in least.items():
        value = getattr(arguments, name)
        if value is not None and value < bound:
            raise UserError(f"{_option(name)} is {value}; give at least {bound}")
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
    arguments.out = arguments.out or _OUTPUTS[mode]
    if Path(arguments.out).suffix.lower() != ".png":
        raise UserError(f"--out is {arguments.out!r}; pictures are PNG files: let it end in .png")
    return mode


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _sampler(run: Run, arguments: argparse.Namespace, bars: ProgressBars) -> Sampler:
    from vaedist.inference.sampling import Sampler

    options = {name: getattr(arguments, name) for name in ("top_k", "top_p", "guidance")}
    given = {name: value for name, value in options.items() if value is not None}
    return Sampler(
        run.model,
        seed=arguments.seed,
        temperature=arguments.temperature,
        options=given,
        mixture=_mixture(run, arguments.data, bars) if arguments.sampler == "gmm" else None,
        codes=bool(arguments.codes),
    )


def _mixture(run: Run, data: str | None, bars: ProgressBars) -> Mixture:
    """The density stored with the run; fitted now if there is none."""
    from vaedist.inference.stored_mixture import density
    from vaedist.runs.open_data import open_data

    return density(run, lambda: open_data(run, data, other_data=None), bars.start)


def _info(run: Run) -> None:
    import yaml

    from vaedist.evaluation.metrics.tables import columns
    from vaedist.nets.bodies import layer_table

    shape = "x".join(str(size) for size in run.spec.image_shape)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    facts = [
        ("run", run.folder),
        ("checkpoint", run.checkpoint.name),
        ("step", run.step),
        ("weights", run.weights),
        (
            "data",
            f"{run.data_path}: images of {shape}, {len(run.classes)} classes, identity {run.data_identity}",
        ),
        ("parameters", f"{parameters:,}"),
        ("samples", "from the prior" if run.model.samples else run.model.not_defined("sample")),
    ]
    print("\n".join(f"{name:<11} {value}" for name, value in facts))
    print("\n" + columns([("layer", "kind", "parameters"), *layer_table(run.model)]))
    print("\n" + yaml.safe_dump(run.job.model_dump(mode="json"), sort_keys=False).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
