"""The command line of vaedist-shard. It loads nothing but argparse."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vaedist.cli.option_types import fraction, non_negative_int, positive_int
from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_fit, add_verbosity


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-shard",
        description="Pack images into WebDataset tars with an index; check, repair or index packed folders.",
        epilog="example: vaedist-shard phantom --out shards/phantom --size 64 --count "
        "train=9664,validate=1120,test=544",
    )
    parser.add_argument(
        "input", metavar="INPUT", help="folder of images, idx files, volumes or tars; `phantom`"
    )
    _add_tasks(parser.add_argument_group("what to do (default: pack INPUT into --out)"))
    _add_packing_options(parser.add_argument_group("packing"))
    _add_source_options(parser.add_argument_group("some sources only"))
    add_verbosity(
        parser,
        quiet="no progress bar, and no word of what was packed",
        verbose="also say of each stage how long it took",
    )
    return parser


def _add_tasks(group: Any) -> None:
    group.add_argument("--verify", action="store_true", help="check every byte and image of a packed folder")
    group.add_argument(
        "--remove-samples",
        nargs="*",
        metavar="KEY",
        help="take these samples out of the index; with --verify and no keys: the damaged ones",
    )
    group.add_argument("--remove-samples-file", metavar="FILE", help="keys to remove, one per line")
    group.add_argument("--strike", "--strike-file", dest="old_option", nargs="*", help=argparse.SUPPRESS)
    group.add_argument("--index", action="store_true", help="make index.json for tars made by others")


def _add_packing_options(group: Any) -> None:
    group.add_argument("--out", type=Path, metavar="DIR", help="the packed folder to make")
    group.add_argument("--source", metavar="NAME", help="kind of source; default: found by the layout")
    group.add_argument("--size", type=positive_int, metavar="N", help="side of the square images in pixels")
    add_fit(group, "rectangles become squares")
    color = group.add_mutually_exclusive_group()
    color.add_argument("--gray", dest="channels", action="store_const", const=1, help="one channel")
    color.add_argument("--rgb", dest="channels", action="store_const", const=3, help="three channels")
    codec = "lossless both; npy reads faster (default: png)"
    group.add_argument("--codec", choices=("png", "npy"), help=codec)
    group.add_argument(
        "--samples-per-shard", type=positive_int, metavar="N", help="default: what fits in 64 MB"
    )
    order = "order of packing (default: random, seeded)"
    group.add_argument("--order", choices=("random", "source"), help=order)
    seed = "of order, chosen splits and phantom (default: 0)"
    group.add_argument("--seed", type=non_negative_int, metavar="N", help=seed)
    subjects = "table of key (or its beginning) and subject, for names that do not say it"
    group.add_argument("--subjects", type=Path, metavar="FILE", help=subjects)
    validation = "share to hold out, by subject (default: 0.1 where the source has no such split)"
    group.add_argument("--validation-fraction", type=fraction, metavar="F", help=validation)
    group.add_argument("--test-fraction", type=fraction, metavar="F", help="likewise (default: 0)")
    group.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: 1)")
    bad = "leave bad files out, listed in rejected.jsonl"
    group.add_argument("--skip-bad", action="store_true", help=bad)
    group.add_argument("--max-pixels", type=positive_int, metavar="N", help="per image (default: 67,108,864)")
    group.add_argument("--max-bytes", type=positive_int, metavar="N", help="per file (default: 268,435,456)")


def _add_source_options(group: Any) -> None:
    match = "folder, volume: only paths below INPUT that match"
    group.add_argument("--match", metavar="GLOB", help=match)
    slices = "volume: from and to which share of the height (default: 0:1)"
    group.add_argument("--slices", type=_share_range, metavar="A:B", help=slices)
    axis = "volume: axis to cut along (default: 2, axial)"
    group.add_argument("--axis", type=int, choices=(0, 1, 2), help=axis)
    counts = "phantom: images (default: train=1024,validate=128,test=128)"
    group.add_argument("--count", type=_split_counts, metavar="SPLIT=N,...", help=counts)


def _share_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B with 0 <= A < B <= 1, such as 0.3:0.7")
    return low, high


def _split_counts(text: str) -> dict[str, int]:
    counts = {}
    for part in text.split(","):
        split, equals, number = part.partition("=")
        if not equals or not split.isidentifier() or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not SPLIT=N; write train=640,validate=128,test=128"
            )
        counts[split] = int(number)
    return counts
