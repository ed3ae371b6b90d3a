"""`vaedist-launch`: job files and a site file to jobs in Slurm's queue, alone, in arrays, or chained.

vaedist-launch JOB.yaml [key=value ...] --site FILE     one job, a list, a grid, or a chain
vaedist-launch --site FILE --check                      is the site file right?
vaedist-launch --site FILE --print-env                  the site for plain sbatch
vaedist-launch status|cancel|logs [FOLDER]              what has become of it
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vaedist.cli.option_types import positive_int
from vaedist.cli.parser import Parser
from vaedist.core.errors import EXIT_FINISHED, UserError, cli_command, did_you_mean

if TYPE_CHECKING:
    from vaedist.config.site import Site
    from vaedist.slurm.chain import Link, Order
    from vaedist.slurm.submit import Launch

VIEWS = ("status", "cancel", "logs")
PASSED_ON = {
    "vaedist-tune": ("--data", "--trials", "--workers-per-trial", "--concurrent"),
    "vaedist-train": ("--device", "--max-failures", "--hang-timeout", "--override", "--new-run"),
}
"""Options that are looked for here, and are another command's: they stand behind `--`."""


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-launch",
        description="Hand jobs in to Slurm through submitit: one job file or several, a grid of settings and seeds as "
        "a job array, and chains whose links wait for each other's success. A job that runs out of time or is "
        "preempted saves and goes on, as the site file says. `vaedist-launch status`, `cancel` and `logs -f` tell, end "
        "and show what was handed in last, or what the folder that they are given holds; they need no accounting "
        "(sacct).",
        epilog="example: vaedist-launch jobs/infovae_oasis.yaml --site cluster/sites/example.yaml --grid "
        "model.beta=0.5,1,4 --seeds 0-4. What follows -- goes to vaedist-train (with --space: to vaedist-tune).",
    )
    parser.add_argument(
        "words",
        metavar="JOB|key=value",
        nargs="*",
        help="job files, and settings that replace theirs, for example jobs/vqvae_oasis.yaml train.steps=1000",
    )
    parser.add_argument(
        "--site",
        metavar="FILE",
        help="the site file, or the name of one that comes with vaedist: generic, example, conda (default: "
        "$VAEDIST_SITE, with --local generic)",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--seeds", metavar="0-4", help="one run per seed, for example 0-4 or 0,2,7")
    what.add_argument(
        "--grid",
        metavar="KEY=V,V",
        action="append",
        default=[],
        help="one run per value, for example model.beta=0.5,1,4; given twice, per combination",
    )
    what.add_argument(
        "--chain",
        metavar="LINKS",
        default="train",
        help="any of shard,train,prior,evaluate,sample, each waiting for the one before (default: train)",
    )
    what.add_argument("--shard", metavar="'ARGS'", help="of the chain: what vaedist-shard is given")
    what.add_argument("--prior", metavar="'JOB ...'", help="of the chain: the prior's job file and settings")
    what.add_argument(
        "--evaluate", metavar="'ARGS'", help="of the chain: further options of vaedist-evaluate"
    )
    what.add_argument("--sample", metavar="'ARGS'", help="of the chain: further options of vaedist-sample")
    what.add_argument(
        "--space", metavar="NAME", help="a search instead of job files: vaedist-tune on all nodes"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--nodes", metavar="N", type=positive_int, default=1, help="of what trains (default: 1)")
    how.add_argument(
        "--ranks-per-node",
        metavar="N",
        type=positive_int,
        help="processes that train together on each node (default: its allocated GPUs, else 1)",
    )
    how.add_argument("--time", metavar="HH:MM:SS", help="wall time of each job (default: the site's)")
    how.add_argument(
        "--engine", choices=("ray", "srun"), help="what starts the ranks (default: what the site says)"
    )
    how.add_argument(
        "--max-parallel", metavar="N", type=positive_int, help="most tasks of an array at a time"
    )
    place = parser.add_argument_group("where")
    place.add_argument(
        "--runs",
        metavar="DIR",
        type=Path,
        help="where run folders are made (default: runs, in the site's scratch)",
    )
    place.add_argument(
        "--folder",
        metavar="DIR",
        type=Path,
        help="where launch folders are (default: launches, in the site's scratch)",
    )
    place.add_argument(
        "--name", metavar="NAME", help="of the launch folder and the jobs (default: the job's)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="print the very bytes that sbatch would get, and hand in nothing",
    )
    instead.add_argument(
        "--local", action="store_true", help="run it all here, one after the other, without Slurm"
    )
    instead.add_argument(
        "--check", action="store_true", help="try the site file, here and with a short job, and print a table"
    )
    instead.add_argument(
        "--print-env", action="store_true", help="print the site as shell lines, for plain sbatch: eval them"
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="how long the short job of --check may stay in the queue; 0: no such job (default: 600)",
    )
    return parser


def build_view_parser(view: str) -> argparse.ArgumentParser:
    told = {
        "status": "Tell what has become of a launch.",
        "cancel": "End every job of a launch that has not ended, with those that would continue it.",
        "logs": "Show the ends of the logs of a launch.",
    }
    parser = Parser(prog=f"vaedist-launch {view}", description=told[view])
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, help="the launch folder (default: the newest)"
    )
    parser.add_argument(
        "--site", metavar="FILE", help="whose scratch holds the newest (default: $VAEDIST_SITE)"
    )
    if view == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the jobs have ended")
        parser.add_argument("-n", "--lines", metavar="N", type=int, default=20, help="default: %(default)s")
        parser.add_argument("--link", metavar="LINK", help="only this link's, for example train")
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in VIEWS:
        return _view(words[0], words[1:])
    if words and words[0].isalpha() and not Path(words[0]).exists():
        raise UserError(f"there is no job file {words[0]}, and no such view{did_you_mean(words[0], VIEWS)}")
    further: list[str] = []
    if "--" in words:
        words, further = words[: words.index("--")], words[words.index("--") + 1 :]
    for command, options in PASSED_ON.items():
        for option in options:
            if any(word.partition("=")[0] == option for word in words):
                raise UserError(
                    f"{option} is an option of {command}: write it at the end, behind two dashes, as in -- {option}"
                    f"{' DIR' if option == '--data' else ''}"
                )
    arguments = build_parser().parse_intermixed_args(words)
    site, site_file = _site(arguments.site, local=arguments.local)
    if arguments.print_env:
        return _print_env(site, site_file)
    if arguments.check:
        return _check(site, site_file, arguments.wait)
    return _launch(arguments, further, site, site_file)


def _site(given: str | None, *, local: bool = False) -> tuple[Site, Path]:
    """The site and its file; a bare name is that of a file that comes with vaedist."""
    from vaedist.config.site import load_site
    from vaedist.slurm.script import cluster_folder

    named = given or os.environ.get("VAEDIST_SITE") or ("generic" if local else None)
    if named is None:
        raise UserError(
            "which site? Give --site FILE (cluster/sites/example.yaml says how to write one), or --local"
        )
    shipped = {path.stem: path for path in (cluster_folder() / "sites").glob("*.yaml")}
    path = shipped.get(named, Path(named)) if not Path(named).exists() else Path(named)
    if not path.exists() and "/" not in named and not named.endswith((".yaml", ".yml")):
        raise UserError(
            f"there is no site {named!r}{did_you_mean(named, shipped)}; or give the path of a site file"
        )
    return load_site(path), path.absolute()


# Launching --------------------------------------------------------------------------------------------------


def _launch(arguments: argparse.Namespace, further: list[str], site: Site, site_file: Path) -> int:
    from vaedist.slurm import chain
    from vaedist.slurm import launch_record as record

    order = _order(arguments, further, site)
    links = chain.links(order)
    if arguments.local and arguments.nodes > 1:
        raise UserError("--local runs on this machine: leave --nodes out, and give --ranks-per-node")
    folder = record.new_name(_root(arguments.folder, site), _name(arguments.name, order))
    copies = record.copies(folder, order.jobs, order.prior)
    links = [link.reading(copies) for link in links]

    from vaedist.slurm import submit as slurm

    launch = slurm.Launch(
        folder=folder,
        site=site,
        site_file=folder / "site.yaml",
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        engine=arguments.engine,
        time=arguments.time,
        parallel=arguments.max_parallel,
        python_folder=Path(sys.executable).parent,
    )
    if site.continue_by == "resubmit" and len(links) > 1:
        print(
            "note: this site continues by resubmitting, and what waits for a job does not wait for its successor: a "
            "link that runs out of time ends the chain",
            file=sys.stderr,
        )
    if arguments.dry_run:
        return _dry_run(links, launch)
    for link in links:
        launch.script(link)  # refuses what sbatch would not take, before anything is made
    try:
        record.make(folder, site.group)
        record.keep(folder, site_file, copies)
        if arguments.local:
            return slurm.run_local(links, launch, print)
        slurm.submit(links, launch, print)
    except UserError:
        record.discard(folder)
        raise
    _tell(links, folder)
    return EXIT_FINISHED


def _order(arguments: argparse.Namespace, further: list[str], site: Site) -> Order:
    from vaedist.slurm import chain

    _check_arguments(arguments, further)
    settings = [word for word in arguments.words if chain.is_setting(word)]
    jobs = [word for word in arguments.words if not chain.is_setting(word)]
    return chain.Order(
        jobs=tuple(jobs),
        settings=tuple(settings),
        runs=arguments.runs or _scratch(site) / "runs",
        seeds=chain.seeds(arguments.seeds) if arguments.seeds else (),
        grid=tuple(chain.axis(text) for text in arguments.grid),
        chain=tuple(name.strip() for name in arguments.chain.split(",")),
        further=tuple(further),
        shard=arguments.shard,
        prior=arguments.prior,
        evaluate=arguments.evaluate,
        sample=arguments.sample,
        space=arguments.space,
    )


def _check_arguments(arguments: argparse.Namespace, further: list[str]) -> None:
    """What the doors of the chain are given: a misspelt option costs nothing here, and hours in a queue.

    Raises:
        UserError: naming the option of vaedist-launch that holds it.
    """
    import shlex

    from vaedist import evaluate, sample, shard, train, tune
    from vaedist.cli.parser import CommandLineError

    doors = {"shard": shard, "train": train, "tune": tune, "evaluate": evaluate, "sample": sample}
    given = {verb: getattr(arguments, verb) for verb in ("shard", "evaluate", "sample")}
    lines = {verb: (f"--{verb}", text) for verb, text in given.items() if text is not None}
    if further:
        lines["tune" if arguments.space else "train"] = ("--", shlex.join(further))
    for verb, (option, text) in lines.items():
        parser: Parser = doors[verb].build_parser()
        parser.raise_errors = True
        first = {"train": ["JOB"], "tune": ["--space", "NAME"], "shard": []}.get(verb, ["RUN"])
        try:
            words = [*first, *shlex.split(text)]
        except ValueError:
            continue  # told by the chain
        try:
            if verb in ("train", "tune"):
                parser.parse_intermixed_args(words)
            else:
                parser.parse_args(words)
        except CommandLineError as error:
            raise UserError(f"{option} {text!r}: vaedist-{verb} says: {error}") from None
    if arguments.space is not None:
        from vaedist.tuning.space import load_space

        load_space(arguments.space, [word for word in arguments.words if "=" in word])


def _scratch(site: Site) -> Path:
    from vaedist.config.settings import expand

    return Path() if site.scratch is None else expand(site.scratch, "scratch of the site file")


def _root(given: Path | None, site: Site) -> Path:
    return given or _scratch(site) / "launches"


def _name(given: str | None, order: Order) -> str:
    import re

    if order.space is not None:
        name = f"tune_{Path(order.space).stem}"
    else:
        more = len(order.jobs) - 1
        first = Path(order.jobs[0])
        # The job file of a run is called job.yaml, as all of them are: its folder says more.
        name = (first.absolute().parent.name if first.name == "job.yaml" else first.stem) + (
            f"-and-{more}-more" if more else ""
        )
    if given is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", given):
        raise UserError(f"--name {given!r}: letters, digits and . _ + - only")
    return given or re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip("._+-") or "launch"


def _dry_run(links: list[Link], launch: Launch) -> int:
    """The bytes on standard output; what is said about them, on standard error."""
    from vaedist.slurm import submit as slurm

    for link, text, waiting in slurm.plan(links, launch):
        print(
            f"# {' '.join(['sbatch', *waiting, str(launch.folder / f'{link.name}.sbatch')])}", file=sys.stderr
        )
        sys.stderr.flush()
        sys.stdout.write(text)
        sys.stdout.flush()
    return EXIT_FINISHED


def _tell(links: list[Link], folder: Path) -> None:
    """Where everything is, and how to look at it from one's own machine."""
    import getpass
    import socket

    runs = [task.run for link in links if link.trains for task in link.tasks if task.run is not None]
    print(f"launch folder: {folder} (logs, scripts)")
    print("what becomes of it: vaedist-launch status; vaedist-launch logs -f; vaedist-launch cancel")
    if runs:
        top = Path(os.path.commonpath([run.absolute() for run in runs]))
        port = 16006 + os.getuid() % 40000
        if links[0].name == "tune":
            print(f"results: {runs[0]}/results.csv, figures and best, the run that was chosen")
        else:
            print(f"checkpoints: {runs[0] if len(runs) == 1 else top / '*'}/checkpoints")
        print(f"TensorBoard, here:            vaedist-board {top} --port {port}")
        print(
            f"  and on your own machine:    ssh -L {port}:localhost:{port} {getpass.getuser()}@{socket.gethostname()}"
        )


# The site ---------------------------------------------------------------------------------------------------


def _print_env(site: Site, site_file: Path) -> int:
    from vaedist.slurm.script import environment_exports

    lines, left = environment_exports(site, site_file)
    print("\n".join(lines))
    if left:
        print(
            f"vaedist-launch: note: plain sbatch takes these only on its command line: {left}",
            file=sys.stderr,
        )
    return EXIT_FINISHED


def _check(site: Site, site_file: Path, wait: float) -> int:
    from vaedist.slurm import preflight

    findings = preflight.check(site, site_file, Path(sys.executable).parent, wait)
    print(preflight.table(findings))
    return 2 if any(finding.verdict == "WRONG" for finding in findings) else EXIT_FINISHED


# What has become of it --------------------------------------------------------------------------------------


def _view(view: str, words: list[str]) -> int:
    arguments = build_view_parser(view).parse_args(words)

    from vaedist.slurm import launch_record as record
    from vaedist.slurm import status as queue

    folder = arguments.folder
    if folder is None:
        site, _ = _site(arguments.site, local=True)
        folder = record.newest(_root(None, site))
    entries = record.read(folder)
    if view == "cancel":
        return queue.cancel(entries, print)
    if view == "logs":
        chosen = [entry for entry in entries if arguments.link in (None, entry.link)]
        if not chosen:
            raise UserError(f"{folder} has no link {arguments.link!r}")

        def write(text: str) -> None:
            print(text, end="", flush=True)

        return queue.logs(chosen, arguments.lines, follow=arguments.follow, write=write)
    found, silent = queue.rows(entries)
    print(f"{folder}")
    if silent:
        print("Slurm does not answer: this is what the jobs left behind")
    print(queue.table(found))
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
