"""Asking a run to stop: signals, and a file for processes that cannot send one.

SIGTERM, SIGUSR1 and Ctrl-C to any rank, or a file `stop` in the run folder that names this attempt (or `any`),
only set a flag here. At the next step boundary the loop shares the flag with all ranks, which save and exit
together. A second Ctrl-C interrupts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 1.0
"""How often a run looks for its stop file."""
STOP_FILE = "stop"


def write_stop_file(run_folder: Path, attempt: str) -> None:
    """Write the stop file of `run_folder` for one attempt, whole or not at all."""
    scratch = run_folder / f".{STOP_FILE}-{os.getpid()}"
    scratch.write_text(f"{attempt}\n")
    scratch.replace(run_folder / STOP_FILE)


class StopRequest:
    """Whether this process has been asked to stop; a context manager that handles signals while it is open.

    Args:
        file: The stop file to look at (rank 0 only), or None.
        attempt: Name of this attempt, which the file's text must hold; an old attempt's file means nothing.
    """

    def __init__(self, file: Path | None, attempt: str) -> None:
        self._file, self._attempt = file, attempt
        self._signalled = False
        self._looked = -POLL_SECONDS
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        if not self._signalled and self._file and time.monotonic() - self._looked >= POLL_SECONDS:
            # The interval only spares the file system: ranks act on the flag where all of them agree.
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):
                self._signalled = self._file.read_text().strip() in {self._attempt or "any", "any"}
        return self._signalled

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread alone; inside a Ray worker the driver writes the file.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
