"""`vaedist-sample RUN`: new images from a trained model, its latent space, or the user's own images through it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vaedist.cli.sample_options import FRAMES, MANIFOLD, build_parser, check_sample_options
from vaedist.core.errors import NotDefined, cli_command
from vaedist.core.terminal import ProgressBars, colored, echo_unless

if TYPE_CHECKING:
    from vaedist.data.format.resize import Fit
    from vaedist.inference.picture_files import PictureResult
    from vaedist.inference.sampling import Sampler
    from vaedist.runs.open_run import Run


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    mode = check_sample_options(arguments)

    from vaedist.distributed.memory import keep_freed_memory
    from vaedist.runs.open_data import pick_device
    from vaedist.runs.open_run import open_run

    keep_freed_memory()
    run = open_run(arguments.run, weights=arguments.weights, device=pick_device(arguments.device))
    echo = echo_unless(arguments.quiet)
    if run.collapse:
        echo(f"{colored('ALARM:', 'yellow')} {run.collapse}")
    if arguments.info_only:
        from vaedist.inference.run_info import run_info

        print(run_info(run))
        return 0
    try:
        with ProgressBars(quiet=arguments.quiet, verbose=arguments.verbose) as bars:
            result = _write(run, mode, arguments, bars)
    except NotDefined as error:
        instead = ""
        if mode == "samples" and run.model.reconstructs and not run.model.samples:
            instead = "; its reconstructions are: --reconstruct FILE ..."
        raise NotDefined(f"{run.folder} ({run.job.kind}): {error}{instead}") from None
    echo("\n".join([*result.lines, *(f"wrote {path}" for path in result.files)]))
    return 0


def _write(run: Run, mode: str, arguments: argparse.Namespace, bars: ProgressBars) -> PictureResult:
    """Make and write what was asked for."""
    from vaedist.inference.latent_pictures import write_interpolation, write_manifold, write_traversal
    from vaedist.inference.picture_files import PictureFiles
    from vaedist.inference.reconstructions import write_reconstructions
    from vaedist.inference.sample_files import write_samples
    from vaedist.inference.sampling import class_numbers, single_class

    between = "sampler gmm" if arguments.sampler == "gmm" else mode
    if run.model.latent == "codes" and between in ("interpolate", "traverse", "manifold", "sampler gmm"):
        raise NotDefined(
            f"--{between} is not defined, because the latent is a map of codes, with nothing between one and the next: "
            "leave it away"
        )
    classes = class_numbers(run, arguments.classes)
    label = single_class(classes)
    target = PictureFiles(arguments.out, arguments.npz)
    fit: Fit = arguments.fit or "pad"
    columns, frames = arguments.grid_size, arguments.frames or FRAMES
    temperature, codes = arguments.temperature, bool(arguments.codes)
    if mode == "reconstruct":
        return write_reconstructions(
            run, arguments.reconstruct, target, columns=columns, label=label, fit=fit, codes=codes
        )
    if mode == "traverse":
        return write_traversal(
            run, arguments.traverse, target, frames=frames, label=label, temperature=temperature
        )
    if mode == "manifold":
        side = arguments.frames or MANIFOLD
        return write_manifold(run, target, side=side, label=label, temperature=temperature)
    sampler = _sampler(run, arguments, bars)
    if mode == "interpolate":
        return write_interpolation(
            run, sampler, arguments.interpolate, target, frames=frames, label=label, fit=fit
        )
    return write_samples(
        run,
        sampler,
        target,
        count=arguments.num_samples,
        columns=columns,
        classes=classes,
        tar=arguments.tar,
        bars=bars,
    )


def _sampler(run: Run, arguments: argparse.Namespace, bars: ProgressBars) -> Sampler:
    from vaedist.inference.sampling import Sampler
    from vaedist.inference.stored_mixture import load_or_fit_mixture
    from vaedist.runs.open_data import open_data

    options = {name: getattr(arguments, name) for name in ("top_k", "top_p", "guidance")}
    mixture = None
    if arguments.sampler == "gmm":
        mixture = load_or_fit_mixture(
            run, lambda: open_data(run, arguments.data, other_data=None), bars.start
        )
    return Sampler(
        run.model,
        seed=arguments.seed,
        temperature=arguments.temperature,
        options={name: value for name, value in options.items() if value is not None},
        mixture=mixture,
        codes=bool(arguments.codes),
    )


if __name__ == "__main__":
    raise SystemExit(main())
