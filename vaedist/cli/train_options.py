"""The command line of vaedist-train, for its door and for the supervisor of a batch job, which must understand it too.

It loads nothing but argparse and our own parser on top of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vaedist.cli.parser import Parser, add_loudness, count, count_or_none


def train_parser() -> Parser:
    """The parser; positional arguments and options may be mixed (`parse_intermixed_args`)."""
    parser = Parser(
        prog="vaedist-train",
        description="Train the model of a job file on packed shards; the same command continues a stopped run.",
        epilog="Exit codes: 0 finished, or nothing was left to do; 75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C, or "
        "a file RUN/stop that says `any`) after saving a checkpoint; 6 the run folder takes no more files (disk full, "
        "read-only) and 5 a worker died or memory ran out, where the same command continues; 4 training diverged; "
        "3 the data are damaged; 2 the command, a file or a setting is wrong.",
    )
    parser.add_argument("job", metavar="JOB", help="job file (YAML), for example jobs/vqvae_phantom.yaml")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings that replace those of the file, for example train.steps=1000 model.codebook.size=512",
    )
    place = parser.add_argument_group("where")
    place.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME of the job)"
    )
    place.add_argument(
        "--new-run",
        action="store_true",
        help="never continue: if DIR holds a run, train in DIR-2 (or 3, ...)",
    )
    place.add_argument(
        "--engine",
        choices=("local", "ray", "srun"),
        default="local",
        help="local: processes of this machine, or one rank under torchrun; ray: Ray Train; srun: this process is a "
        "task of a Slurm step, one rank (default: local)",
    )
    place.add_argument(
        "--workers",
        metavar="N|MIN:MAX",
        type=_workers,
        help="processes that train together; MIN:MAX, ray only: elastic, as many as the cluster has room for at the "
        "time, on the same global batches (default: 1)",
    )
    place.add_argument(
        "--cpus-per-worker",
        metavar="C",
        type=count,
        help="CPUs that a worker reserves, and its threads, ray only (default: 1, and the workers share their node's)",
    )
    place.add_argument(
        "--gpus-per-worker",
        metavar="G",
        type=int,
        choices=(0, 1),
        help="0 or 1, ray only (default: 1 where Ray has GPUs)",
    )
    place.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default: auto)",
    )
    place.add_argument(
        "--max-failures",
        metavar="N",
        type=count_or_none,
        help="how often workers start again from the last checkpoint after one of them died (default: 3)",
    )
    place.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=count_or_none,
        help="a worker without a sign of life for so long (stopped, frozen), or for which others wait so long in a "
        "step (anywhere else four times as long, without a sign of work), is killed, and the workers start again; 0: "
        "never (default: 45)",
    )
    parser.add_argument(
        "--override",
        action="store_true",
        help="accept changed learning rates and loss weights when continuing a run; the change is recorded",
    )
    add_loudness(
        parser, verbose="also say which libraries it runs on, and of each checkpoint that it is written"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print-job", action="store_true", help="print the job with every default, and exit")
    only.add_argument(
        "--summary", action="store_true", help="print the model's layers and parameter counts, and exit"
    )
    return parser


def _workers(text: str) -> int | tuple[int, int]:
    least, colon, most = text.partition(":")
    if not colon:
        return count(text)
    try:
        span = count(least), count(most)
    except argparse.ArgumentTypeError:
        span = (1, 0)
    if span[0] > span[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, two numbers such as 1:4")
    return span[0] if span[0] == span[1] else span
