"""Ray's controller in a thread, so that the main thread stays free for signals and the console."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from vaedist.launchers.ray.internals import supported_ray


class ControllerThread(threading.Thread):
    """Runs `fit`, and keeps what it returns or raises.

    Attributes:
        result: What it returned.
        error: What it raised.
    """

    def __init__(self, name: str, fit: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._fit = fit
        self._over = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with supported_ray():
                self.result = self._fit()
        except Exception as error:  # noqa: BLE001 - for the main thread
            self.error = error
        finally:
            self._over.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is over, after at most so long; unlike `join`, also when Ctrl-C interrupts it (CPython 3.11)."""
        return self._over.wait(seconds)
