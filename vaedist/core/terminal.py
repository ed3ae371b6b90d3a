"""Colors and progress bars, which only a terminal gets.

A pipe, a log file and a batch job get the same text without either. Colors follow https://no-color.org: any text in
$NO_COLOR turns them off, and so does a terminal that calls itself dumb.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Literal

Color = Literal["red", "yellow", "green"]
StartBar = Callable[[str, int], Callable[[int], None]]
"""`start(stage, total)` starts a progress bar and returns a function of how many are done."""
_CODES: dict[Color, str] = {"red": "1;31", "yellow": "1;33", "green": "32"}


def colored(text: str, color: Color, stream: IO[str] | None = None) -> str:
    """`text` as it goes to `stream`: in that color on a terminal that wants colors, else as it is.

    Args:
        text: A word or two that should catch the eye.
        color: Its meaning: red has gone wrong, yellow is to be looked at, green is the best so far.
        stream: Where it is about to be printed; default: standard output.
    """
    return f"\x1b[{_CODES[color]}m{text}\x1b[0m" if _wants_color(stream or sys.stdout) else text


def _wants_color(stream: IO[str]) -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def error_line(name: str, sentence: object) -> str:
    """What a command prints on standard error before it exits: its name, what is wrong, and what to do."""
    return f"{name}: {colored('error:', 'red', sys.stderr)} {sentence}"


def echo_unless(quiet: bool) -> Callable[[str], None]:
    """`print`, or with --quiet a function that prints nothing."""
    return (lambda _: None) if quiet else print


class ProgressBars:
    """One progress bar after the other on standard error, where that is a terminal. A context manager.

    Args:
        unit: What is counted.
        quiet: No bars at all.
        verbose: Say of each stage what it was and how long it took, also where there is no terminal.
    """

    def __init__(self, unit: str = "images", *, quiet: bool = False, verbose: bool = False) -> None:
        self._unit, self._verbose = unit, verbose
        self._shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._stage = ""
        self._done, self._began = 0, 0.0

    def start(self, stage: str, total: int | None = None) -> Callable[[int], None]:
        """Start the bar of a stage, ending the previous one, and return a function of how many are done."""
        self.close()
        self._stage, self._done, self._began = stage, 0, time.monotonic()
        bar = self._bar = progress_bar(total, self._unit, stage, leave=False) if self._shown else None

        def update(done: int) -> None:
            self._done = done
            if bar is not None:
                bar.update(done - bar.n)

        return update

    def callback(self, stage: str) -> Callable[[int, int], None]:
        """As `start`, where the length comes with each update: returns a function of (done, total)."""
        update = self.start(stage)

        def progress(done: int, total: int) -> None:
            if self._bar is not None and self._bar.total != total:
                self._bar.total = total
                self._bar.refresh()  # tqdm would wait, and a short stage would end without showing its length
            update(done)

        return progress

    def close(self) -> None:
        """End the current bar, if any."""
        if self._bar is not None:
            self._bar.close()
        if self._stage and self._verbose:
            seconds = time.monotonic() - self._began
            print(f"{self._stage}: {self._done:,} {self._unit}, {seconds:.1f} s", file=sys.stderr)
        self._bar, self._stage = None, ""

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress_bar(
    total: int | None, unit: str, stage: str | None = None, *, initial: int = 0, leave: bool = True
) -> Any:
    """A tqdm bar on standard error, as wide as the terminal, or 100 characters where its width is not known.

    Args:
        total: Length; None: not known yet.
        unit: What is counted.
        stage: What stands before it.
        initial: Done before.
        leave: Whether it stays when it ends.
    """
    from tqdm import tqdm

    # A terminal may have no size, as with `docker run -t`: tqdm would make a bar of no width.
    size = shutil.get_terminal_size((100, 24))
    return tqdm(
        total=total,
        unit=f" {unit}",
        desc=stage,
        initial=initial,
        leave=leave,
        ncols=size.columns or 100,
        nrows=size.lines or 24,
    )
