"""`vaedist-train`: a job file to a run folder. The same command continues a run that was stopped or killed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vaedist.cli.train_options import train_parser as build_parser
from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, cli_command


@cli_command
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    # Before torch is loaded, here or in a worker: threads that wait for each other sleep. Where they spin and the
    # cores have other work too, the one that is waited for does not get to run, and training all but stops.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vaedist.config.job import load_job

    job = load_job(arguments.job, arguments.settings)
    if arguments.print_job:
        import yaml

        from vaedist.runs.open_run import resolved

        print(
            yaml.safe_dump(resolved(job).model_dump(mode="json"), sort_keys=False, allow_unicode=True), end=""
        )
        return EXIT_FINISHED
    if arguments.summary:
        from vaedist.training.layer_table import layer_table

        print(layer_table(job))
        return EXIT_FINISHED

    from vaedist.runs.fit_options import FitOptions
    from vaedist.runs.run_folder import RunFolder
    from vaedist.runs.startup_timings import inherited

    command = tuple(sys.argv if argv is None else ["vaedist-train", *argv])
    options = FitOptions(
        override=arguments.override,
        quiet=arguments.quiet,
        verbose=arguments.verbose,
        command=command,
        attempt=os.environ.get("VAEDIST_ATTEMPT", ""),
        phases=inherited(),
    )
    _check_engine(arguments)
    workers = arguments.workers
    failures = 3 if arguments.max_failures is None else arguments.max_failures
    run = RunFolder.make(arguments.run_dir or Path("runs") / job.name, new_run=arguments.new_run)
    folder = run.path
    try:
        run.refuse_strangers("job.yaml")
        from vaedist.launchers import local

        hang_seconds = local.HANG_SECONDS if arguments.hang_timeout is None else arguments.hang_timeout
        if arguments.engine == "local":
            outcome = local.run(
                job,
                folder,
                workers=workers,
                device=arguments.device,
                max_failures=failures,
                hang_seconds=hang_seconds,
                options=options,
            )
        elif arguments.engine == "srun":
            from vaedist.launchers import srun

            outcome = srun.run(
                job, folder, device=arguments.device, hang_seconds=hang_seconds, options=options
            )
        else:
            from vaedist.launchers.ray import trainer as ray

            outcome = ray.run(
                job,
                folder,
                workers=workers or 1,
                cpus_per_worker=arguments.cpus_per_worker,
                gpus_per_worker=arguments.gpus_per_worker,
                device=arguments.device,
                max_failures=failures,
                hang_seconds=hang_seconds,
                options=options,
            )
    except UserError:
        run.discard()
        raise
    if not arguments.quiet and os.environ.get("RANK", "0") == "0":
        if outcome.status == "already finished":
            print(
                f"nothing left to do: this run finished at step {outcome.step} (a larger train.steps goes on)"
            )
        print(f"run folder: {folder}")
    code = EXIT_STOPPED if outcome.status == "stopped" else EXIT_FINISHED
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        # A rank of torchrun or srun: its exit code is all that its launcher sees. Everything is on the disk, and
        # torch's threads can abort a Python that is finalising: a finished run was seen to end in SIGABRT.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _check_engine(arguments: argparse.Namespace) -> None:
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
    if engine == "srun":
        for option in ("workers", "max_failures"):
            if getattr(arguments, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} has no effect with --engine srun, which starts nothing: srun's own "
                    "--ntasks says how many processes there are"
                )
        if arguments.new_run:
            raise UserError(
                "--new-run does not go with --engine srun, where every task would make its own: "
                "name a fresh folder with --run-dir"
            )
    if engine == "local" and (workers or 1) == 1:
        for option in ("max_failures", "hang_timeout"):
            if getattr(arguments, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} has no effect on a single process: give --workers 2 or more"
                )


if __name__ == "__main__":
    raise SystemExit(main())
