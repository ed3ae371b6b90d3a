"""`vaedist-train`: a job file to a run folder. The same command continues a run that was stopped or killed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vaedist.cli.train_options import build_parser, check_engine_options
from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, cli_command

if TYPE_CHECKING:
    from vaedist.config.job import Job
    from vaedist.runs.fit_options import FitOptions, Outcome


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    # Before torch is loaded, here or in a worker: threads that wait for each other sleep. Threads that spin take the
    # cores from the work that they wait for, where the cores have other work too, and training all but stops.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vaedist.config.job import load_job

    job = load_job(arguments.job, arguments.settings)
    if arguments.print_job:
        import yaml

        from vaedist.runs.resolved_job import resolved

        print(
            yaml.safe_dump(resolved(job).model_dump(mode="json"), sort_keys=False, allow_unicode=True), end=""
        )
        return EXIT_FINISHED
    if arguments.summary:
        from vaedist.training.session import model_summary

        print(model_summary(job))
        return EXIT_FINISHED

    from vaedist.runs.fit_options import FitOptions
    from vaedist.runs.run_folder import RunFolder
    from vaedist.runs.startup_timings import timings_from_environment

    options = FitOptions(
        override=arguments.override,
        quiet=arguments.quiet,
        verbose=arguments.verbose,
        command=tuple(sys.argv if argv is None else ["vaedist-train", *argv]),
        attempt=os.environ.get("VAEDIST_ATTEMPT", ""),
        startup=timings_from_environment(),
    )
    check_engine_options(arguments)
    run = RunFolder.make(arguments.run_dir or Path("runs") / job.name, new_run=arguments.new_run)
    try:
        run.check_is_run_folder("job.yaml")
        outcome = _train(job, run.path, arguments, options)
    except UserError:
        run.discard()
        raise
    if not arguments.quiet and os.environ.get("RANK", "0") == "0":
        if outcome.status == "already finished":
            print(
                f"nothing left to do: this run finished at step {outcome.step} (a larger train.steps goes on)"
            )
        print(f"run folder: {run.path}")
    code = EXIT_STOPPED if outcome.status == "stopped" else EXIT_FINISHED
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        # A rank of torchrun or srun: its exit code is all that its launcher sees. Everything is on the disk, and
        # torch's threads can abort (SIGABRT) while Python shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train(job: Job, run_folder: Path, arguments: argparse.Namespace, options: FitOptions) -> Outcome:
    """Train under the engine that the arguments name."""
    from vaedist.distributed.liveness.silence import HANG_SECONDS
    from vaedist.launchers import local

    device, workers = arguments.device, arguments.workers
    failures = 3 if arguments.max_failures is None else arguments.max_failures
    hang_seconds = HANG_SECONDS if arguments.hang_timeout is None else arguments.hang_timeout
    if arguments.engine == "local":
        return local.run(
            job,
            run_folder,
            workers=workers,
            device=device,
            max_failures=failures,
            hang_seconds=hang_seconds,
            options=options,
        )
    if arguments.engine == "srun":
        from vaedist.launchers import srun

        return srun.run(job, run_folder, device=device, hang_seconds=hang_seconds, options=options)
    from vaedist.launchers.ray import trainer
    from vaedist.launchers.ray.cluster import ResourceRequest

    least, most = workers if isinstance(workers, tuple) else (workers or 1, workers or 1)
    request = ResourceRequest(least, most, arguments.cpus_per_worker, arguments.gpus_per_worker, device)
    return trainer.run(
        job, run_folder, request, max_failures=failures, hang_seconds=hang_seconds, options=options
    )


if __name__ == "__main__":
    raise SystemExit(main())
