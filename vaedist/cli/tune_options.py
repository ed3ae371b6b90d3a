"""The command line of vaedist-tune. It loads nothing but argparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vaedist.cli.option_types import non_negative_int, positive_int
from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_device, add_settings, add_verbosity


def build_parser() -> Parser:
    """The parser; positional arguments and options may be mixed (`parse_intermixed_args`)."""
    parser = Parser(
        prog="vaedist-tune",
        description="Search for good settings of a job on Ray Tune. A search space says which settings are tried and "
        "what number decides; its trials are ordinary runs, and the best one is ready for vaedist-evaluate and "
        "vaedist-sample. The same command continues a search that was stopped or killed: trials that have ended are "
        "not run again.",
        epilog="Exit codes: 0 finished, or nothing was left to do; 75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C); 5 "
        "worker processes died; 3 the data are damaged; 2 the command, a file or a setting is wrong. A trial that "
        "diverges counts as failed, and the search goes on.",
    )
    add_settings(parser, "settings that replace those of the space's base job, for example train.steps=500")
    _add_search_options(parser.add_argument_group("what"))
    _add_trial_options(parser.add_argument_group("where"))
    add_verbosity(parser, verbose="also print what each validation of each trial found")
    text = "print the space with every default, and exit"
    parser.add_argument("--print-space", action="store_true", help=text)
    return parser


def _add_search_options(group: Any) -> None:
    """What is searched."""
    space = "beta_vae, infovae, mmdvae, vqvae or gan, or the path of a space file of your own"
    group.add_argument("--space", metavar="NAME", required=True, help=space)
    group.add_argument(
        "--data",
        metavar="DIR",
        help="packed data, or the word `phantom`: built-in images, packed once into the search's folder (default: "
        "$VAEDIST_DATA, else the data that the space names)",
    )
    trials = "how many trials (default: what the space says)"
    group.add_argument("--trials", metavar="N", type=positive_int, help=trials)


def _add_trial_options(group: Any) -> None:
    """Where the trials lie, and which processes train them."""
    folder = "folder of the search (default: runs/tune_NAME of the space)"
    group.add_argument("--run-dir", metavar="DIR", type=Path, help=folder)
    workers = "processes that train each trial together, through Ray Train (default: 1)"
    group.add_argument("--workers-per-trial", metavar="N", type=positive_int, default=1, help=workers)
    most = "most trials at a time (default: as many as fit in the allocation with all their workers)"
    group.add_argument("--max-parallel", "--concurrent", metavar="N", type=positive_int, help=most)
    add_device(group)
    failures = "how often a trial starts again from its checkpoint after its process died (default: 3)"
    group.add_argument("--max-failures", metavar="N", type=non_negative_int, default=3, help=failures)
    group.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        type=non_negative_int,
        default=45,
        help="a trial whose process gives no sign of life for so long (stopped, frozen) is killed and starts again; so "
        "is one whose training stands still for four times as long; 0: never (default: 45)",
    )
