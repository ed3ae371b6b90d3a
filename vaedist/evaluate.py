"""`vaedist-evaluate RUN ...`: how good trained models are on a split that they have not seen, and which is better."""

from __future__ import annotations

from vaedist.cli.evaluate_options import build_parser, check_evaluate_options
from vaedist.core.errors import cli_command


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_evaluate_options(arguments)

    from vaedist.evaluation.evaluate_run import EvaluationConfig
    from vaedist.evaluation.evaluate_runs import evaluate_runs

    given = vars(arguments)
    output = {name: given.pop(name) for name in ("runs", "out", "report", "quiet", "verbose")}
    evaluate_runs(config=EvaluationConfig(**given), **output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
