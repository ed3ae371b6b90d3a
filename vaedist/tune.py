"""`vaedist-tune`: a search space to trials, a table of results, figures and the best run; the same command goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from vaedist.cli.tune_options import build_parser
from vaedist.core.errors import EXIT_FINISHED, EXIT_STOPPED, UserError, cli_command
from vaedist.core.terminal import progress_bar


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    # As in vaedist-train: threads that wait for each other sleep. The trials' processes inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vaedist.tuning.space import load_space

    space = load_space(arguments.space, arguments.settings)
    if arguments.trials is not None:
        space = space.model_copy(update={"trials": arguments.trials})
    if arguments.print_space:
        import yaml

        print(yaml.safe_dump(space.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return EXIT_FINISHED

    from vaedist.runs.run_folder import RunFolder

    name = f"tune_{space.name}" + ("_phantom" if arguments.data == "phantom" else "")
    made = RunFolder.make(arguments.run_dir or Path("runs") / name)
    folder = made.path
    shown = _Trials(quiet=arguments.quiet)
    echo = shown.echo
    try:
        made.check_is_run_folder("trials.jsonl")
        from vaedist.tuning.search_data import open_search_data

        index = open_search_data(space, arguments.data, folder, quiet=arguments.quiet)
        from vaedist.launchers.ray import tuner
        from vaedist.tuning import results

        options = tuner.TuneOptions(
            workers=arguments.workers_per_trial,
            max_parallel=arguments.max_parallel,
            device=arguments.device,
            max_failures=arguments.max_failures,
            hang_seconds=arguments.hang_timeout,
            command=tuple(sys.argv if argv is None else ["vaedist-tune", *argv]),
        )
        detail = echo if arguments.verbose else lambda _: None
        search = tuner.run(space, folder, index, options, echo=echo, detail=detail, progress=shown.progress)
    except UserError:
        made.discard()
        raise
    finally:
        shown.close()
    figures = map(str, results.write_all(search.record))
    lines = [*results.summary_lines(search.record), f"table: {folder / results.TABLE}", *figures]
    echo("\n".join(lines))
    if not search.complete:
        echo("stopped on request: trials that were interrupted are kept, the same command continues")
        return EXIT_STOPPED
    return EXIT_FINISHED


class _Trials:
    """The lines of a search, above a bar over its trials where somebody looks."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def echo(self, text: str) -> None:
        """Show one line."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def progress(self, done: int, total: int) -> None:
        """So many trials have ended."""
        if self._bar is None and not self._quiet and sys.stderr.isatty():
            self._bar = progress_bar(total, "trials", "search", initial=done, leave=False)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.refresh()  # the next trial may take an hour

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


if __name__ == "__main__":
    raise SystemExit(main())
