"""Options that several commands share. `parser` is a parser or a group of one."""

from __future__ import annotations

from typing import Any


def add_run(parser: Any) -> None:
    """Add the positional argument RUN."""
    parser.add_argument(
        "run", metavar="RUN", help="a run folder (its best checkpoint), or one checkpoint in it"
    )


def add_weights(parser: Any) -> None:
    """Add `--weights`."""
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="which weights (default: what the job says)"
    )


def add_device(parser: Any) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default: auto)",
    )


def add_fit(parser: Any, what: str) -> None:
    """Add `--fit`; `what` is made square."""
    parser.add_argument("--fit", choices=("pad", "crop", "stretch"), help=f"how {what} (default: pad)")


def add_settings(parser: Any, text: str) -> None:
    """Add the positional arguments key=value, which replace settings of a file; `text` is their help."""
    parser.add_argument("settings", metavar="key=value", nargs="*", default=[], help=text)


def add_verbosity(parser: Any, quiet: str = "print nothing but errors", verbose: str | None = None) -> None:
    """Add `-q`, and `-v` where there is more to say.

    Args:
        parser: Or a group of it.
        quiet: Help of `-q`.
        verbose: Help of `-v`; None: no such option.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help=quiet)
    if verbose is not None:
        group.add_argument("-v", "--verbose", action="store_true", help=verbose)
