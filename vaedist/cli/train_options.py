"""The command line of vaedist-train, which the supervisor of a batch job parses too. It loads nothing but argparse."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vaedist.cli.option_types import int_or_range, non_negative_int, positive_int
from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_device, add_settings, add_verbosity
from vaedist.core.errors import UserError


def build_parser() -> Parser:
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
    add_settings(
        parser,
        "settings that replace those of the file, for example train.steps=1000 model.codebook.codes=512",
    )
    _add_launch_options(parser.add_argument_group("where"))
    parser.add_argument(
        "--override",
        action="store_true",
        help="accept changed learning rates and loss weights when continuing a run; the change is recorded",
    )
    add_verbosity(
        parser, verbose="also say which libraries it runs on, and of each checkpoint that it is written"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print-job", action="store_true", help="print the job with every default, and exit")
    only.add_argument(
        "--summary", action="store_true", help="print the model's layers and parameter counts, and exit"
    )
    return parser


def _add_launch_options(group: Any) -> None:
    """Where the run lies, and which processes train it."""
    group.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="run folder (default: runs/NAME of the job)"
    )
    group.add_argument(
        "--new-run",
        action="store_true",
        help="never continue: if DIR holds a run, train in DIR-2 (or 3, ...)",
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray", "srun"),
        default="local",
        help="local: processes of this machine, or one rank under torchrun; ray: Ray Train; srun: this process is a "
        "task of a Slurm step, one rank (default: local)",
    )
    group.add_argument(
        "--workers",
        metavar="N|MIN:MAX",
        type=int_or_range,
        help="processes that train together; MIN:MAX, ray only: elastic, as many as the cluster has room for at the "
        "time, on the same global batches (default: 1)",
    )
    group.add_argument(
        "--cpus-per-worker",
        metavar="C",
        type=positive_int,
        help="CPUs that a worker reserves, and its threads, ray only (default: 1, and the workers share their node's)",
    )
    group.add_argument(
        "--gpus-per-worker",
        metavar="G",
        type=int,
        choices=(0, 1),
        help="0 or 1, ray only (default: 1 where Ray has GPUs)",
    )
    add_device(group)
    group.add_argument(
        "--max-failures",
        metavar="N",
        type=non_negative_int,
        help="how often workers start again from the last checkpoint after one of them died (default: 3)",
    )
    group.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=non_negative_int,
        help="a worker without a sign of life for so long (stopped, frozen), or for which others wait so long in a "
        "step (anywhere else four times as long, without a sign of work), is killed, and the workers start again; 0: "
        "never (default: 45)",
    )


def check_engine_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would have no effect under the chosen engine.

    Raises:
        UserError: naming what to use instead.
    """
    engine, workers = arguments.engine, arguments.workers
    if engine != "ray":
        if arguments.gpus_per_worker is not None:
            raise UserError("--gpus-per-worker has no effect without --engine ray: use --device cuda or cpu")
        if arguments.cpus_per_worker is not None:
            raise UserError(
                "--cpus-per-worker has no effect without --engine ray: set train.threads in the job"
            )
        if isinstance(workers, tuple):
            raise UserError(
                "--workers MIN:MAX needs --engine ray: the others train with a fixed number of processes"
            )
    ineffective: tuple[str, ...] = ()
    reason = ""
    if engine == "srun":
        ineffective = ("workers", "max_failures")
        reason = (
            "with --engine srun, which starts nothing: srun's own --ntasks says how many processes there are"
        )
    elif engine == "local" and (workers or 1) == 1:
        ineffective, reason = (
            ("max_failures", "hang_timeout"),
            "on a single process: give --workers 2 or more",
        )
    for option in ineffective:
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} has no effect {reason}")
    if engine == "srun" and arguments.new_run:
        raise UserError(
            "--new-run does not go with --engine srun, where every task would make its own: "
            "name a fresh folder with --run-dir"
        )
