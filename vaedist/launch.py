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

from vaedist.cli.launch_options import (
    VIEWS,
    build_parser,
    build_view_parser,
    check_no_other_commands_option,
    is_setting,
    parse_grid_axis,
    parse_seeds,
)
from vaedist.core.errors import EXIT_FINISHED, UserError, cli_command, did_you_mean

if TYPE_CHECKING:
    from vaedist.config.site import Site
    from vaedist.slurm.chain import LaunchRequest, Stage
    from vaedist.slurm.launch_config import LaunchConfig


@cli_command
def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in VIEWS:
        return _view(words[0], words[1:])
    if words and words[0].isalpha() and not Path(words[0]).exists():
        raise UserError(f"there is no job file {words[0]}, and no such view{did_you_mean(words[0], VIEWS)}")
    extra_arguments: list[str] = []
    if "--" in words:
        words, extra_arguments = words[: words.index("--")], words[words.index("--") + 1 :]
    check_no_other_commands_option(words)
    arguments = build_parser().parse_intermixed_args(words)
    site, site_file = _find_site(arguments.site, local=arguments.local)
    if arguments.print_env:
        return _print_env(site, site_file)
    if arguments.check:
        return _check(site, site_file, arguments.wait)
    return _launch(arguments, extra_arguments, site, site_file)


def _find_site(given: str | None, *, local: bool = False) -> tuple[Site, Path]:
    """The site and its file; a bare name is that of a file that comes with vaedist."""
    from vaedist.config.site import load_site
    from vaedist.slurm.script import cluster_folder

    name = given or os.environ.get("VAEDIST_SITE") or ("generic" if local else None)
    if name is None:
        hint = "cluster/sites/example.yaml says how to write one"
        raise UserError(f"which site? Give --site FILE ({hint}), or --local")
    shipped = {path.stem: path for path in (cluster_folder() / "sites").glob("*.yaml")}
    path = shipped.get(name, Path(name)) if not Path(name).exists() else Path(name)
    if not path.exists() and "/" not in name and not name.endswith((".yaml", ".yml")):
        hint = f"{did_you_mean(name, shipped)}; or give the path of a site file"
        raise UserError(f"there is no site {name!r}{hint}")
    return load_site(path), path.absolute()


# Launching --------------------------------------------------------------------------------------------------


def _launch(arguments: argparse.Namespace, extra_arguments: list[str], site: Site, site_file: Path) -> int:
    from vaedist.slurm import launch_record
    from vaedist.slurm.chain import plan_stages
    from vaedist.slurm.launch_config import LaunchConfig

    request = _request(arguments, extra_arguments, site)
    stages = plan_stages(request)
    if arguments.local and arguments.nodes > 1:
        raise UserError("--local runs on this machine: leave --nodes out, and give --ranks-per-node")
    folder = launch_record.unused_folder(_root(arguments.folder, site), _name(arguments.name, request))
    copies = launch_record.job_copies(folder, request.jobs, request.prior)
    stages = [stage.with_job_copies(copies) for stage in stages]
    config = LaunchConfig(
        folder=folder,
        site=site,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        engine=arguments.engine,
        time=arguments.time,
        max_parallel=arguments.max_parallel,
        python_folder=Path(sys.executable).parent,
    )
    if site.continue_by == "resubmit" and len(stages) > 1:
        print(
            "note: this site continues by resubmitting, and what waits for a job does not wait for its successor: a "
            "stage that runs out of time ends the chain",
            file=sys.stderr,
        )
    if arguments.dry_run:
        return _dry_run(stages, config)

    from vaedist.slurm.submit import launch

    code = launch(stages, config, site_file, copies, local=arguments.local, echo=print)
    if not arguments.local:
        _describe(stages, folder)
    return code


def _request(arguments: argparse.Namespace, extra_arguments: list[str], site: Site) -> LaunchRequest:
    from vaedist.slurm.chain import LaunchRequest

    return LaunchRequest(
        jobs=tuple(word for word in arguments.words if not is_setting(word)),
        settings=tuple(word for word in arguments.words if is_setting(word)),
        runs=arguments.runs or _scratch(site) / "runs",
        seeds=parse_seeds(arguments.seeds) if arguments.seeds else (),
        grid=tuple(parse_grid_axis(text) for text in arguments.grid),
        chain=tuple(name.strip() for name in arguments.chain.split(",")),
        extra_arguments=tuple(extra_arguments),
        shard=arguments.shard,
        prior=arguments.prior,
        evaluate=arguments.evaluate,
        sample=arguments.sample,
        space=arguments.space,
    )


def _scratch(site: Site) -> Path:
    from vaedist.config.settings import expand

    return Path() if site.scratch is None else expand(site.scratch, "scratch of the site file")


def _root(given: Path | None, site: Site) -> Path:
    return given or _scratch(site) / "launches"


def _name(given: str | None, request: LaunchRequest) -> str:
    """The name of the launch folder before it is made unique."""
    import re

    if request.space is not None:
        name = f"tune_{Path(request.space).stem}"
    else:
        first = Path(request.jobs[0])
        # The job file of a run is called job.yaml, as all of them are: its folder says more.
        name = first.absolute().parent.name if first.name == "job.yaml" else first.stem
        if more := len(request.jobs) - 1:
            name += f"-and-{more}-more"
    if given is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", given):
        raise UserError(f"--name {given!r}: letters, digits and . _ + - only")
    return given or re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip("._+-") or "launch"


def _dry_run(stages: list[Stage], config: LaunchConfig) -> int:
    """Print the bytes on standard output, and the commands on standard error."""
    from vaedist.slurm.submit import scripts_to_submit

    for stage, text, options in scripts_to_submit(stages, config):
        command = ["sbatch", *options, str(config.folder / f"{stage.name}.sbatch")]
        print(f"# {' '.join(command)}", file=sys.stderr, flush=True)
        print(text, end="", flush=True)
    return EXIT_FINISHED


def _describe(stages: list[Stage], folder: Path) -> None:
    """Print where everything is, and how to look at it from one's own machine."""
    import getpass
    import socket

    runs = [task.run for stage in stages if stage.trains for task in stage.tasks if task.run is not None]
    print(f"launch folder: {folder} (logs, scripts)")
    print("what becomes of it: vaedist-launch status; vaedist-launch logs -f; vaedist-launch cancel")
    if runs:
        top = Path(os.path.commonpath([run.absolute() for run in runs]))
        port = 16006 + os.getuid() % 40000
        if stages[0].name == "tune":
            print(f"results: {runs[0]}/results.csv, figures and best, the run that was chosen")
        else:
            print(f"checkpoints: {runs[0] if len(runs) == 1 else top / '*'}/checkpoints")
        print(f"TensorBoard, here:            vaedist-board {top} --port {port}")
        host = f"{getpass.getuser()}@{socket.gethostname()}"
        print(f"  and on your own machine:    ssh -L {port}:localhost:{port} {host}")


# The site, and what has become of a launch ------------------------------------------------------------------


def _print_env(site: Site, site_file: Path) -> int:
    from vaedist.slurm.script import environment_exports

    lines, without_variable = environment_exports(site, site_file)
    print("\n".join(lines))
    if without_variable:
        note = f"plain sbatch takes these only on its command line: {without_variable}"
        print(f"vaedist-launch: note: {note}", file=sys.stderr)
    return EXIT_FINISHED


def _check(site: Site, site_file: Path, wait: float) -> int:
    from vaedist.slurm import preflight

    findings = preflight.check_site(site, site_file, Path(sys.executable).parent, wait)
    print(preflight.findings_table(findings))
    return 2 if any(finding.verdict == "WRONG" for finding in findings) else EXIT_FINISHED


def _view(view: str, words: list[str]) -> int:
    arguments = build_view_parser(view).parse_args(words)

    from vaedist.slurm import launch_record
    from vaedist.slurm.logs import follow_logs, show_logs
    from vaedist.slurm.status import SlurmQueue, cancel_launch, has_ended, launch_status, status_table

    folder = arguments.folder
    if folder is None:
        site, _ = _find_site(arguments.site, local=True)
        folder = launch_record.newest_folder(_root(None, site))
    tasks = launch_record.read(folder)
    if view == "cancel":
        cancel_launch(tasks, print)
    elif view == "logs":
        tasks = [task for task in tasks if arguments.stage in (None, task.link)]
        if not tasks:
            raise UserError(f"{folder} has no stage {arguments.stage!r}")

        def write(text: str) -> None:
            print(text, end="", flush=True)

        sizes = show_logs([Path(task.log) for task in tasks], arguments.lines, write)
        if arguments.follow:
            follow_logs(sizes, write, lambda: has_ended(tasks))
    else:
        queue = SlurmQueue(tasks)
        rows = launch_status(tasks, queue)
        print(folder)
        if queue.silent:
            print("Slurm does not answer: this is what the jobs left behind")
        print(status_table(rows))
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
