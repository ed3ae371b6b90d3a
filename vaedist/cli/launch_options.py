"""The command lines of vaedist-launch: launching, and `status`, `cancel` and `logs` of what was launched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vaedist.cli.option_types import positive_int
from vaedist.cli.parser import Parser
from vaedist.core.errors import UserError

MAX_TASKS = 1000
"""The longest job array that Slurm takes unless a site allows more (MaxArraySize is 1001)."""

VIEWS = {
    "status": "Show what has become of a launch.",
    "cancel": "End every job of a launch that has not ended, with those that would continue it.",
    "logs": "Show the ends of the logs of a launch.",
}

_OTHER_COMMANDS = {
    "vaedist-tune": ("--data", "--trials", "--workers-per-trial", "--concurrent"),
    "vaedist-train": ("--device", "--max-failures", "--hang-timeout", "--override", "--new-run"),
}
"""Options of other commands that people look for here: they stand behind `--`."""


def build_parser() -> Parser:
    """The parser of what is launched; positional arguments and options may be mixed (`parse_intermixed_args`)."""
    parser = Parser(
        prog="vaedist-launch",
        description="Submit jobs to Slurm through submitit: one job file or several, a grid of settings and seeds "
        "as a job array, and chains whose stages wait for each other's success. A job that runs out of time or is "
        "preempted saves and goes on, as the site file says. `vaedist-launch status`, `cancel` and `logs -f` show, "
        "end and follow what was launched last, or what the folder that they are given holds; they need no "
        "accounting (sacct).",
        epilog="example: vaedist-launch jobs/infovae_oasis.yaml --site cluster/sites/example.yaml --grid "
        "model.beta=0.5,1,4 --seeds 0-4. What follows -- goes to vaedist-train (with --space: to vaedist-tune).",
    )
    words = "job files, and settings that replace theirs, for example jobs/vqvae_oasis.yaml train.steps=1000"
    parser.add_argument("words", metavar="JOB|key=value", nargs="*", help=words)
    site = (
        "the site file, or the name of one that comes with vaedist: generic, example, conda (default: $VAEDIST_SITE, "
        "with --local generic)"
    )
    parser.add_argument("--site", metavar="FILE", help=site)
    _add_stages(parser.add_argument_group("what"))
    _add_resources(parser.add_argument_group("how"))
    _add_folders(parser.add_argument_group("where"))
    _add_modes(parser)
    return parser


def _add_stages(group: Any) -> None:
    group.add_argument("--seeds", metavar="0-4", help="one run per seed, for example 0-4 or 0,2,7")
    grid = "one run per value, for example model.beta=0.5,1,4; given twice, per combination"
    group.add_argument("--grid", metavar="KEY=V,V", action="append", default=[], help=grid)
    chain = "any of shard,train,prior,evaluate,sample, each waiting for the one before (default: train)"
    group.add_argument("--chain", metavar="STAGES", default="train", help=chain)
    group.add_argument("--shard", metavar="'ARGS'", help="of the chain: what vaedist-shard is given")
    group.add_argument("--prior", metavar="'JOB ...'", help="of the chain: the prior's job file and settings")
    for command in ("evaluate", "sample"):
        text = f"of the chain: further options of vaedist-{command}"
        group.add_argument(f"--{command}", metavar="'ARGS'", help=text)
    space = "a search instead of job files: vaedist-tune on all nodes"
    group.add_argument("--space", metavar="NAME", help=space)


def _add_resources(group: Any) -> None:
    nodes = "of what trains (default: 1)"
    group.add_argument("--nodes", metavar="N", type=positive_int, default=1, help=nodes)
    ranks = "processes that train together on each node (default: its allocated GPUs, else 1)"
    group.add_argument("--ranks-per-node", metavar="N", type=positive_int, help=ranks)
    group.add_argument("--time", metavar="HH:MM:SS", help="wall time of each job (default: the site's)")
    engine = "what starts the ranks (default: what the site says)"
    group.add_argument("--engine", choices=("ray", "srun"), help=engine)
    tasks = "most tasks of an array at a time"
    group.add_argument("--max-parallel", metavar="N", type=positive_int, help=tasks)


def _add_folders(group: Any) -> None:
    runs = "where run folders are made (default: runs, in the site's scratch)"
    group.add_argument("--runs", metavar="DIR", type=Path, help=runs)
    folder = "where launch folders are (default: launches, in the site's scratch)"
    group.add_argument("--folder", metavar="DIR", type=Path, help=folder)
    name = "of the launch folder and the jobs (default: the job's)"
    group.add_argument("--name", metavar="NAME", help=name)


def _add_modes(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    for option, text in {
        "--dry-run": "print the very bytes that sbatch would get, and submit nothing",
        "--local": "run it all here, one after the other, without Slurm",
        "--check": "try the site file, here and with a short job, and print a table",
        "--print-env": "print the site as shell lines, for plain sbatch: eval them",
    }.items():
        group.add_argument(option, action="store_true", help=text)
    wait = "how long the short job of --check may stay in the queue; 0: no such job (default: 600)"
    parser.add_argument("--wait", metavar="SECONDS", type=float, default=600.0, help=wait)


def build_view_parser(view: str) -> Parser:
    """The parser of one of `VIEWS`."""
    parser = Parser(prog=f"vaedist-launch {view}", description=VIEWS[view])
    folder = "the launch folder (default: the newest)"
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help=folder)
    site = "whose scratch holds the newest (default: $VAEDIST_SITE)"
    parser.add_argument("--site", metavar="FILE", help=site)
    if view == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the jobs have ended")
        parser.add_argument("-n", "--lines", metavar="N", type=int, default=20, help="default: %(default)s")
        stage = "only this stage's, for example train"
        parser.add_argument("--stage", "--link", metavar="STAGE", help=stage)
    return parser


def check_no_other_commands_option(words: list[str]) -> None:
    """Refuse an option that is another command's, and say where it belongs."""
    for command, options in _OTHER_COMMANDS.items():
        for option in options:
            if any(word.partition("=")[0] == option for word in words):
                raise UserError(
                    f"{option} is an option of {command}: write it at the end, behind two dashes, as in -- {option}"
                    f"{' DIR' if option == '--data' else ''}"
                )


# Values of options ------------------------------------------------------------------------------------------


def is_setting(word: str) -> bool:
    """Whether a word of the command line is `key.sub=value`, and no path."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,2,7-9`, each once.

    Raises:
        UserError: it is neither.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MAX_TASKS:
            raise UserError(f"--seeds {text!r}: write numbers and ranges, such as 0-4 or 0,2,7")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))


def parse_grid_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """`model.beta=0.5,1,4`: a key and the values it takes; commas inside brackets belong to the value.

    Raises:
        UserError: it is no such text.
    """
    key, equals, rest = text.partition("=")
    values, depth, current = [], 0, ""
    for character in rest:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            values.append(current)
            current = ""
        else:
            current += character
    values.append(current)
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not all(value.strip() for value in values):
        raise UserError(f"--grid {text!r}: write key=value,value, such as model.beta=0.5,1,4")
    if key == "seed":
        raise UserError(f"--grid {text!r}: seeds are given with --seeds 0-4")
    return key, tuple(dict.fromkeys(value.strip() for value in values))
