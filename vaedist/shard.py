"""`vaedist-shard`: from images to a packed folder that `vaedist-train` reads.

vaedist-shard INPUT --out DIR [options]     pack a folder, idx files, volumes, or the word `phantom`
vaedist-shard DIR --verify                  read everything and check it
vaedist-shard DIR --strike KEY...           take samples out of the index
vaedist-shard DIR --index                   index tars that somebody else wrote
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from vaedist.cli.option_types import fraction, non_negative_int, positive_int
from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_fit, add_verbosity
from vaedist.core.errors import EXIT_FINISHED, DataError, UserError, cli_command
from vaedist.core.terminal import ProgressBars, echo_unless

if TYPE_CHECKING:
    from vaedist.data.format.image_files import Limits
    from vaedist.data.format.index import Index
    from vaedist.data.packing.maintenance import Damage
    from vaedist.data.packing.pack import Packing


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-shard",
        description="Pack images into WebDataset tars with an index; check, mend or index packed folders.",
        epilog="example: vaedist-shard phantom --out shards/phantom --size 64 --count "
        "train=9664,validate=1120,test=544",
    )
    parser.add_argument(
        "input", metavar="INPUT", help="folder of images, idx files, volumes or tars; `phantom`"
    )
    tasks = parser.add_argument_group("what to do (default: pack INPUT into --out)")
    tasks.add_argument("--verify", action="store_true", help="check every byte and image of a packed folder")
    tasks.add_argument(
        "--strike",
        nargs="*",
        metavar="KEY",
        help="take these samples out of the index; with --verify and no keys: the damaged ones",
    )
    tasks.add_argument("--strike-file", metavar="FILE", help="keys to strike, one per line")
    tasks.add_argument("--index", action="store_true", help="make index.json for tars made by others")
    packing = parser.add_argument_group("packing")
    packing.add_argument("--out", metavar="DIR", help="the packed folder to make")
    packing.add_argument("--source", metavar="NAME", help="kind of source; default: told by the layout")
    packing.add_argument("--size", type=positive_int, metavar="N", help="side of the square images in pixels")
    add_fit(packing, "rectangles become squares")
    colour = packing.add_mutually_exclusive_group()
    colour.add_argument("--gray", dest="channels", action="store_const", const=1, help="one channel")
    colour.add_argument("--rgb", dest="channels", action="store_const", const=3, help="three channels")
    packing.add_argument(
        "--codec", choices=("png", "npy"), help="lossless both; npy reads faster (default: png)"
    )
    packing.add_argument(
        "--samples-per-shard", type=positive_int, metavar="N", help="default: what fits in 64 MB"
    )
    packing.add_argument(
        "--order", choices=("random", "source"), help="order of packing (default: random, seeded)"
    )
    packing.add_argument(
        "--seed", type=non_negative_int, metavar="N", help="of order, chosen splits and phantom (default: 0)"
    )
    packing.add_argument(
        "--subjects",
        metavar="FILE",
        help="table of key (or its beginning) and subject, for names that do not tell",
    )
    packing.add_argument(
        "--validation-fraction",
        type=fraction,
        metavar="F",
        help="share to hold apart, by subject (default: 0.1 where the source has no such split)",
    )
    packing.add_argument("--test-fraction", type=fraction, metavar="F", help="likewise (default: 0)")
    packing.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: 1)")
    packing.add_argument(
        "--skip-bad", action="store_true", help="leave bad files out, listed in rejected.jsonl"
    )
    packing.add_argument(
        "--max-pixels", type=positive_int, metavar="N", help="per image (default: 67,108,864)"
    )
    packing.add_argument(
        "--max-bytes", type=positive_int, metavar="N", help="per file (default: 268,435,456)"
    )
    some = parser.add_argument_group("some sources only")
    some.add_argument("--match", metavar="GLOB", help="folder, volume: only paths below INPUT that match")
    some.add_argument(
        "--slices",
        type=_range,
        metavar="A:B",
        help="volume: from and to which share of the height (default: 0:1)",
    )
    some.add_argument(
        "--axis", type=int, choices=(0, 1, 2), help="volume: axis to cut along (default: 2, axial)"
    )
    some.add_argument(
        "--count",
        type=_counts,
        metavar="SPLIT=N,...",
        help="phantom: images (default: train=1024,validate=128,test=128)",
    )
    add_verbosity(
        parser,
        quiet="no progress bar, and no word of what was packed",
        verbose="also say of each stage how long it took",
    )
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    task = _task(arguments)
    return {"pack": _pack, "verify": _verify, "strike": _strike, "index": _index}[task](arguments)


_ALSO = {
    "verify": {"strike"},
    "strike": {"verify", "strike_file"},
    "index": {"skip_bad", "max_pixels", "max_bytes"},
}


def _task(arguments: argparse.Namespace) -> str:
    """Which of the four things is asked for; options of another one are refused, not ignored."""
    given = {
        name
        for name, value in vars(arguments).items()
        if value not in (None, False) and name not in ("input", "quiet", "verbose")
    }
    task = "strike" if given & {"strike", "strike_file"} else next((t for t in _ALSO if t in given), "pack")
    if task == "pack":
        return task
    foreign = sorted(given - {task} - _ALSO[task])
    if foreign:
        option = "--gray or --rgb" if foreign[0] == "channels" else f"--{foreign[0].replace('_', '-')}"
        raise UserError(f"{option} has no meaning with --{task}: leave it away")
    return task


def _verify(arguments: argparse.Namespace) -> int:
    from vaedist.data.format.index import Index

    index = Index.open(arguments.input)
    damages = _damages(index, arguments)
    tell = echo_unless(arguments.quiet)
    _describe(index, tell)
    if not damages:
        tell("sound      every byte and image is as it was packed")
        return EXIT_FINISHED
    for damage in damages[:20]:
        tell(f"damaged    {damage}")
    more = f" ({len(damages) - 20} more)" if len(damages) > 20 else ""
    if all(damage.key is not None for damage in damages):
        way = f"copy the folder again, or take them out: vaedist-shard {arguments.input} --verify --strike"
    else:
        way = "copy the folder again, or pack it again"
    raise DataError(f"{arguments.input}: {len(damages)} damages{more}; first: {damages[0]}; {way}")


def _damages(index: Index, arguments: argparse.Namespace) -> list[Damage]:
    from vaedist.data.packing.maintenance import verify

    with _bars(arguments) as bars:
        return verify(index, bars.callback("checking"))


def _strike(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from vaedist.data.format.index import Index
    from vaedist.data.packing.maintenance import read_keys, strike

    index = Index.open(arguments.input)
    keys = list(arguments.strike or [])
    if arguments.strike_file:
        keys += read_keys(Path(arguments.strike_file))
    reason = "asked for"
    if arguments.verify:
        if keys:
            raise UserError("--verify --strike strikes what is damaged: leave the keys away")
        reason = "damaged"
        damages = _damages(index, arguments)
        rest = next((damage for damage in damages if damage.key is None), None)
        if rest is not None:
            raise DataError(
                f"{rest}; this is not a sample that could be struck: pack or copy the folder again"
            )
        keys = [damage.key for damage in damages if damage.key is not None]
    elif not keys:
        raise UserError("say which samples: --strike KEY..., --strike-file FILE, or --verify --strike")
    struck, count = strike(index, keys, reason)
    tell = echo_unless(arguments.quiet)
    _describe(struck, tell)
    tell(
        f"struck     {count} now, {len(struck.struck)} in all; the data identity was {index.identity[:12]}..."
    )
    return EXIT_FINISHED


def _index(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from vaedist.data.packing.external_tars import index_tars

    with _bars(arguments, "tars") as bars:
        folder = Path(arguments.input)
        index, rejected = index_tars(
            folder, skip_bad=arguments.skip_bad, limits=_limits(arguments), progress=bars.callback("indexing")
        )
    tell = echo_unless(arguments.quiet)
    _describe(index, tell)
    if rejected:
        tell(f"left out   {rejected} samples: see {folder / 'rejected.jsonl'}")
    tell(f"next       vaedist-train JOB.yaml data.path={folder}")
    return EXIT_FINISHED


def _bars(arguments: argparse.Namespace, unit: str = "images") -> ProgressBars:
    return ProgressBars(unit, quiet=arguments.quiet, verbose=arguments.verbose)


def _limits(arguments: argparse.Namespace) -> Limits:
    from vaedist.data.format.image_files import MAX_BYTES, MAX_PIXELS, Limits

    return Limits(arguments.max_pixels or MAX_PIXELS, arguments.max_bytes or MAX_BYTES)


def _pack(arguments: argparse.Namespace) -> int:
    from vaedist.data.packing.pack import pack

    with _bars(arguments) as bars:
        report = pack(_packing(arguments), bars.callback("packing"))
    tell = echo_unless(arguments.quiet)
    if report.already:
        tell(f"{arguments.out} is packed already; nothing to do")
    _describe(report.index, tell)
    if report.rejected:
        tell(f"left out   {report.rejected} files: see {report.index.folder / 'rejected.jsonl'}")
    if report.twins:
        tell(f"note       {report.twins} images outside train have exactly the pixels of one in train")
    if report.bars[0]:
        tell(
            f"note       black bars make {report.bars[0]} of {report.bars[1]} images looked at square; to cut images "
            "instead pack with --fit crop, to squeeze them with --fit stretch"
        )
    tell(f"next       vaedist-train JOB.yaml data.path={arguments.out}")
    return EXIT_FINISHED


def _packing(arguments: argparse.Namespace) -> Packing:
    from pathlib import Path

    from vaedist.data.packing.pack import Packing
    from vaedist.data.sources import Settings

    if arguments.out is None:
        raise UserError("say where to pack to: --out DIR")
    return Packing(
        input=arguments.input,
        out=Path(arguments.out),
        source=arguments.source,
        size=arguments.size,
        fit=arguments.fit,
        channels=arguments.channels,
        codec=arguments.codec or "png",
        per_shard=arguments.samples_per_shard,
        order=arguments.order or "random",
        seed=arguments.seed or 0,
        subjects=Path(arguments.subjects) if arguments.subjects else None,
        validation=arguments.validation_fraction,
        test=arguments.test_fraction,
        skip_bad=arguments.skip_bad,
        workers=arguments.workers or 1,
        settings=Settings(
            limits=_limits(arguments),
            count=arguments.count,
            match=arguments.match,
            slices=arguments.slices,
            axis=arguments.axis,
        ),
    )


def _describe(index: Index, tell: Callable[[str], None]) -> None:
    """Tell what a packed folder holds."""
    channels, height, width = index.shape
    colour = "gray" if channels == 1 else f"{channels} channels"
    origin = index.source.get("source", "elsewhere")
    tell(f"packed     {index.folder}: {width} x {height}, {colour}, from {origin}")
    for split in index.splits.values():
        subjects: set[str] = set()
        for shard in range(len(split.shards)):
            columns = split.columns(shard)
            subjects.update(columns.subject(row) for row in range(len(columns)))
        subjects.discard("")
        told = f", {len(subjects):,} subjects" if subjects else ""
        size = sum(shard.bytes for shard in split.shards) / 2**20
        tell(f"{split.name:<10} {split.count:,} images{told}, {len(split.shards)} shards, {size:.1f} MiB")
    if index.classes:
        shown = ", ".join(index.classes[:12]) + (", ..." if len(index.classes) > 12 else "")
        tell(f"classes    {len(index.classes)}: {shown}")
    tell(f"identity   {index.identity}")
    tell(f"look at    {index.folder / f'contact-{next(iter(index.splits))}.png'}")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B with 0 <= A < B <= 1, such as 0.3:0.7")
    return low, high


def _counts(text: str) -> dict[str, int]:
    counts = {}
    for part in text.split(","):
        split, equals, number = part.partition("=")
        if not equals or not split.isidentifier() or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not SPLIT=N; write train=640,validate=128,test=128"
            )
        counts[split] = int(number)
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
