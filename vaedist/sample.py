"""`vaedist-sample RUN`: new images from a trained model, or the user's own images through it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaedist.errors import NotDefined, UserError, door

if TYPE_CHECKING:
    from vaedist.pictures import Pixels
    from vaedist.training.run import Run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaedist-sample",
        description="Draw images from a trained model's prior into one grid (image i depends on the seed and i "
        "alone), or show the model's reconstructions of image files beside the originals.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run folder (its best checkpoint), or one checkpoint in it"
    )
    parser.add_argument("--num-samples", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--grid-size",
        type=int,
        default=8,
        metavar="N",
        help="images per row of the grid (default: %(default)s)",
    )
    parser.add_argument(
        "--output-path",
        metavar="PNG",
        help="the picture (default: samples.png, or reconstructions.png with --reconstruct)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="spread of the latents around the prior's mean; less is more typical (default: %(default)s)",
    )
    parser.add_argument(
        "--reconstruct",
        nargs="+",
        metavar="FILE",
        help="image files (png, jpg, ...) to pass through the model: original left, reconstruction right",
    )
    parser.add_argument(
        "--fit",
        choices=("pad", "crop", "stretch"),
        default="pad",
        help="how --reconstruct makes a file square (default: %(default)s)",
    )
    parser.add_argument(
        "--npz", metavar="NPZ", help="write the images as arrays too: uint8 (N, C, H, W), for numpy.load"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (default: what the job says)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    parser.add_argument(
        "--info-only", action="store_true", help="print what the run is and its layers, and write nothing"
    )
    return parser


@door
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    _check(arguments)

    from vaedist.evaluate import pick_device
    from vaedist.training.run import open_run

    run = open_run(arguments.run, weights=arguments.weights, device=pick_device(arguments.device))
    if run.collapse:
        print(f"ALARM: {run.collapse}")
    if arguments.info_only:
        _info(run)
        return 0
    if arguments.reconstruct:
        arrays, picture = _reconstruct(run, arguments)
    else:
        arrays, picture = _sample(run, arguments)
    _write(arguments, arrays, picture)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("num_samples", "grid_size"):
        value = getattr(arguments, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; give a whole number from 0 to 2^63 - 1")
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise UserError(
            f"--temperature is {arguments.temperature}; give a number of at least 0 (1: the prior)"
        )
    default = "reconstructions.png" if arguments.reconstruct else "samples.png"
    arguments.output_path = arguments.output_path or default
    if Path(arguments.output_path).suffix.lower() != ".png":
        raise UserError(
            f"--output-path is {arguments.output_path!r}; pictures are PNG files: let it end in .png"
        )


def _sample(run: Run, arguments: argparse.Namespace) -> tuple[dict[str, Any], bytes]:
    import numpy as np

    from vaedist.pictures import as_numpy, channels_last, grid, png_bytes, to_uint8

    if not run.model.samples:
        reason = run.model.not_defined("sample")
        possible = "; its reconstructions are: --reconstruct FILE ..." if run.model.reconstructs else ""
        raise NotDefined(f"{run.folder} ({run.job.model['kind']}): {reason}{possible}")
    images = as_numpy(
        run.model.sample(arguments.num_samples, seed=arguments.seed, temperature=arguments.temperature)
    )
    if not np.isfinite(images).all():
        raise UserError(f"{run.folder}: samples are not finite: the weights are damaged or training diverged")
    pixels = to_uint8(images)
    print(
        f"{len(pixels)} samples of {_name(run)}, seed {arguments.seed}, temperature {arguments.temperature:g}"
    )
    return {"images": pixels}, png_bytes(grid(channels_last(pixels), arguments.grid_size))


def _reconstruct(run: Run, arguments: argparse.Namespace) -> tuple[dict[str, Any], bytes]:
    import numpy as np
    import torch

    from vaedist.context import Batch
    from vaedist.metrics.evaluation import reconstruct
    from vaedist.metrics.figures import pair_sheet
    from vaedist.metrics.images import pair_metrics, summaries
    from vaedist.metrics.tables import metrics_table
    from vaedist.training.inputs import Inputs

    if not run.model.reconstructs:
        raise NotDefined(f"{run.folder} ({run.job.model['kind']}): {run.model.not_defined('reconstruct')}")
    files = list(arguments.reconstruct)
    read = np.stack([_read(file, run, arguments.fit) for file in files])
    # What a model of binarised images is to be asked: the static draw of each file's name.
    keys = [Path(file).name for file in files]
    originals = Inputs(run.job).binarised(torch.from_numpy(read), keys).numpy()
    device = next(run.model.parameters()).device
    parts = []
    for start in range(0, len(files), 16):
        part = slice(start, start + 16)
        image = torch.from_numpy(originals[part]).to(device)
        label = torch.zeros(len(image), dtype=torch.int64, device=device)
        with torch.no_grad():
            parts.append(reconstruct(run.model, Batch(image=image, label=label, key=files[part])))
    others = np.concatenate(parts)
    names = [Path(file).name for file in files]
    names = names if len(set(names)) == len(names) else files
    rows = {
        name: (1, summaries([pair_metrics(*pair)]))
        for name, *pair in zip(names, originals, others, strict=True)
    }
    print(f"reconstructions by {_name(run)}")
    print(metrics_table(rows, "file", spread=False))
    arrays = {"originals": originals, "reconstructions": others}
    return arrays, pair_sheet(originals, others, max(1, arguments.grid_size // 2))


def _read(file: str, run: Run, fit: Any) -> Pixels:
    """One of the user's files as uint8 (C, H, W) of the run's size, by the rules that packing follows."""
    from vaedist.data.images import (
        BadImage,
        Limits,
        channels_first,
        decode,
        fit_square,
        read_file,
        resize,
        to_channels,
    )

    spec = run.spec
    limits = Limits()
    try:
        picture = to_channels(decode(read_file(file, limits), limits), spec.channels, convert=True)
    except BadImage as error:
        raise UserError(f"{file} {error}") from None
    if spec.height == spec.width:
        return channels_first(fit_square(picture, spec.height, fit))
    return channels_first(resize(picture, spec.height, spec.width))


def _write(arguments: argparse.Namespace, arrays: dict[str, Any], picture: bytes) -> None:
    import io

    import numpy as np

    from vaedist.pictures import write_whole

    contents = {arguments.output_path: picture}
    if arguments.npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        contents[arguments.npz] = buffer.getvalue()
    for path, content in contents.items():
        write_whole(path, content)
        print(f"wrote {path}")


def _info(run: Run) -> None:
    import yaml

    from vaedist.metrics.tables import columns
    from vaedist.nets.bodies import layer_table

    shape = "x".join(str(size) for size in run.spec[:3])
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


def _name(run: Run) -> str:
    return f"{run.folder} ({run.job.model['kind']}, step {run.step}, {run.weights} weights)"


if __name__ == "__main__":
    raise SystemExit(main())
