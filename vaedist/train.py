"""`vaedist-train`: a job file to a run folder. The same command continues a run that was stopped or killed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vaedist.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, door


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        help="a worker without a sign of life for so long (stopped, frozen) is killed, and the workers start again; "
        "0: never (default: 45)",
    )
    parser.add_argument(
        "--override",
        action="store_true",
        help="accept changed learning rates and loss weights when continuing a run; the change is recorded",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print-job", action="store_true", help="print the job with every default, and exit")
    only.add_argument(
        "--summary", action="store_true", help="print the model's layers and parameter counts, and exit"
    )
    return parser


@door
def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    # Before torch is loaded, here or in a worker: threads that wait for each other sleep. Where they spin and the
    # cores have other work too, the one that is waited for does not get to run, and training all but stops.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vaedist.config import load_job

    job = load_job(arguments.job, arguments.settings)
    if arguments.print_job:
        import yaml

        from vaedist.training.run import resolved

        print(
            yaml.safe_dump(resolved(job).model_dump(mode="json"), sort_keys=False, allow_unicode=True), end=""
        )
        return EXIT_FINISHED
    if arguments.summary:
        from vaedist.training.summary import layer_table

        print(layer_table(job))
        return EXIT_FINISHED

    from vaedist.training.attempt import FitOptions
    from vaedist.training.folder import RunFolder

    command = tuple(sys.argv if argv is None else ["vaedist-train", *argv])
    options = FitOptions(
        override=arguments.override,
        quiet=arguments.quiet,
        command=command,
        attempt=os.environ.get("VAEDIST_ATTEMPT", ""),
    )
    _check_engine(arguments)
    workers = arguments.workers
    failures = 3 if arguments.max_failures is None else arguments.max_failures
    run = RunFolder.make(arguments.run_dir or Path("runs") / job.name, new_run=arguments.new_run)
    folder = run.path
    try:
        from vaedist.engines import local

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
            from vaedist.engines import srun

            outcome = srun.run(job, folder, device=arguments.device, options=options)
        else:
            from vaedist.engines import ray

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
        for option in ("workers", "max_failures", "hang_timeout"):
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


def count(text: str) -> int:
    """The type of an option that is a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


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


def count_or_none(text: str) -> int:
    """The type of an option that is a number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
