"""`vaedist-shard`: from images to a packed folder that `vaedist-train` reads.

vaedist-shard INPUT --out DIR [options]     pack a folder, idx files, volumes, or the word `phantom`
vaedist-shard DIR --verify                  read everything and check it
vaedist-shard DIR --remove-samples KEY...   take samples out of the index
vaedist-shard DIR --index                   index tars that other tools wrote
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaedist.cli.shard_options import build_parser
from vaedist.core.errors import EXIT_FINISHED, UserError, cli_command
from vaedist.core.terminal import ProgressBars, echo_unless

if TYPE_CHECKING:
    from vaedist.data.format.image_files import Limits
    from vaedist.data.format.index import Index
    from vaedist.data.packing.pack import PackingConfig


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.old_option is not None:
        raise UserError("--strike and --strike-file are now --remove-samples and --remove-samples-file")
    task = _task(arguments)
    return {"pack": _pack, "verify": _verify, "remove-samples": _remove, "index": _index}[task](arguments)


_ALSO_ALLOWED = {
    "verify": set[str](),
    "remove-samples": {"remove_samples", "verify", "remove_samples_file"},
    "index": {"skip_bad", "max_pixels", "max_bytes"},
}


def _task(arguments: argparse.Namespace) -> str:
    """Which of the four tasks is asked for; options of another one are refused, not ignored."""
    given = {
        name
        for name, value in vars(arguments).items()
        if value not in (None, False) and name not in ("input", "quiet", "verbose")
    }
    removes = given & {"remove_samples", "remove_samples_file"}
    task = "remove-samples" if removes else next((name for name in _ALSO_ALLOWED if name in given), "pack")
    if task == "pack":
        return task
    unused = sorted(given - {task} - _ALSO_ALLOWED[task])
    if unused:
        option = "--gray or --rgb" if unused[0] == "channels" else f"--{unused[0].replace('_', '-')}"
        raise UserError(f"{option} has no meaning with --{task}: leave it away")
    return task


def _verify(arguments: argparse.Namespace) -> int:
    from vaedist.data.format.index import Index
    from vaedist.data.packing.verify import damage_error, verify

    index = Index.open(arguments.input)
    with _progress(arguments) as bars:
        damages = verify(index, bars.callback("checking"))
    echo = echo_unless(arguments.quiet)
    _describe(index, echo)
    if not damages:
        echo("sound      every byte and image is as it was packed")
        return EXIT_FINISHED
    for damage in damages[:20]:
        echo(f"damaged    {damage}")
    raise damage_error(arguments.input, damages)


def _remove(arguments: argparse.Namespace) -> int:
    from vaedist.data.format.index import Index
    from vaedist.data.packing.remove_samples import read_keys, remove_damaged_samples, remove_samples

    index = Index.open(arguments.input)
    keys = list(arguments.remove_samples or [])
    if arguments.remove_samples_file:
        keys += read_keys(Path(arguments.remove_samples_file))
    if bool(keys) == arguments.verify:
        raise UserError(
            "--verify --remove-samples removes what is damaged: leave the keys away"
            if keys
            else "say which samples: --remove-samples KEY..., --remove-samples-file FILE, or --verify --remove-samples"
        )
    if keys:
        opened, count = remove_samples(index, keys)
    else:
        with _progress(arguments) as bars:
            opened, count = remove_damaged_samples(index, bars.callback("checking"))
    echo = echo_unless(arguments.quiet)
    _describe(opened, echo)
    in_all = len(opened.info.removed)
    echo(f"removed    {count} now, {in_all} in all; the data identity was {index.identity[:12]}...")
    return EXIT_FINISHED


def _index(arguments: argparse.Namespace) -> int:
    from vaedist.data.packing.external_tars import index_tars

    folder = Path(arguments.input)
    with _progress(arguments, "tars") as bars:
        limits, progress = _limits(arguments), bars.callback("indexing")
        index, rejected = index_tars(folder, skip_bad=arguments.skip_bad, limits=limits, progress=progress)
    echo = echo_unless(arguments.quiet)
    _describe(index, echo)
    if rejected:
        echo(f"left out   {rejected} samples: see {folder / 'rejected.jsonl'}")
    echo(f"next       vaedist-train JOB.yaml data.path={folder}")
    return EXIT_FINISHED


def _progress(arguments: argparse.Namespace, unit: str = "images") -> ProgressBars:
    return ProgressBars(unit, quiet=arguments.quiet, verbose=arguments.verbose)


def _limits(arguments: argparse.Namespace) -> Limits:
    from vaedist.data.format.image_files import MAX_BYTES, MAX_PIXELS, Limits

    return Limits(arguments.max_pixels or MAX_PIXELS, arguments.max_bytes or MAX_BYTES)


def _pack(arguments: argparse.Namespace) -> int:
    from vaedist.data.packing.pack import pack

    with _progress(arguments) as bars:
        report = pack(_config(arguments), bars.callback("packing"))
    echo = echo_unless(arguments.quiet)
    if report.already:
        echo(f"{arguments.out} is packed already; nothing to do")
    _describe(report.index, echo)
    if report.rejected:
        echo(f"left out   {report.rejected} files: see {report.index.folder / 'rejected.jsonl'}")
    if report.duplicates:
        echo(f"note       {report.duplicates} images outside train have exactly the pixels of one in train")
    if report.letterboxed[0]:
        count, looked_at = report.letterboxed
        echo(
            f"note       black bars make {count} of {looked_at} images looked at square; to cut images "
            "instead pack with --fit crop, to squeeze them with --fit stretch"
        )
    echo(f"next       vaedist-train JOB.yaml data.path={arguments.out}")
    return EXIT_FINISHED


def _config(arguments: argparse.Namespace) -> PackingConfig:
    from vaedist.data.packing.pack import PackingConfig
    from vaedist.data.sources import SourceSettings

    if arguments.out is None:
        raise UserError("say where to pack to: --out DIR")
    given = {name: value for name, value in vars(arguments).items() if value is not None}

    def options(kind: Any) -> dict[str, Any]:
        return {field.name: given[field.name] for field in fields(kind) if field.name in given}

    settings = SourceSettings(**options(SourceSettings) | {"limits": _limits(arguments)})
    return PackingConfig(**options(PackingConfig), settings=settings)


def _describe(index: Index, echo: Callable[[str], None]) -> None:
    """Print what a packed folder holds."""
    channels, height, width = index.shape
    color = "gray" if channels == 1 else f"{channels} channels"
    origin = index.source.get("source", "elsewhere")
    echo(f"packed     {index.folder}: {width} x {height}, {color}, from {origin}")
    for split in index.splits.values():
        number = len(split.subjects())
        subjects = f", {number:,} subjects" if number else ""
        size = sum(shard.bytes for shard in split.shards) / 2**20
        echo(f"{split.name:<10} {split.count:,} images{subjects}, {len(split.shards)} shards, {size:.1f} MiB")
    if index.classes:
        shown = ", ".join(index.classes[:12]) + (", ..." if len(index.classes) > 12 else "")
        echo(f"classes    {len(index.classes)}: {shown}")
    echo(f"identity   {index.identity}")
    echo(f"look at    {index.folder / f'contact-{next(iter(index.splits))}.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
