"""What a test puts into the processes that it starts, by way of PYTHONPATH: real faults at exact places.

Environment, all optional:

- `WITNESS`, a folder: the variant `witness` can be trained.
- `FAULT_KILL`, JSON of `place`, `path`, `once`: this process kills itself (SIGKILL) at the first `place` (`half-write`,
  `before-rename`, `after-rename`) whose path holds `path`, unless the file `once` exists.
- `FAULT_CLOCK`, JSON of `seconds`, `path`: the clock jumps by `seconds` when something has been renamed to a path that
  holds `path`; at once where that is empty.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_rename, _mkdir = os.rename, os.mkdir


def _kill(orders: dict[str, str]) -> None:
    place, wanted, once = orders["place"], orders["path"], Path(orders["once"])

    def die() -> None:
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def rename(source: Any, target: Any, **options: Any) -> None:
        if place == "before-rename" and wanted in str(target):
            die()
        _rename(source, target, **options)
        if place == "after-rename" and wanted in str(target):
            die()

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        _mkdir(path, *arguments, **options)
        if place == "half-write" and wanted in str(path):
            # By now the writer is loaded: let it write the half of one block and die with the rest in hand.
            writer = sys.modules["vaedist.runs.checkpoint_manifest"]._Sha256File  # type: ignore[attr-defined]

            def write(self: Any, data: Any) -> int:
                if len(memoryview(data).cast("B")) < 1000:
                    return whole(self, data)
                self.file.write(memoryview(data).cast("B")[: len(data) // 2])
                die()
                raise AssertionError("it lives")

            whole = writer.write
            writer.write = write

    os.rename, os.mkdir = rename, mkdir


def _clock(orders: dict[str, Any]) -> None:
    shift = 0.0 if orders["path"] else float(orders["seconds"])
    now, now_ns, gmtime, localtime, strftime = (
        time.time, time.time_ns, time.gmtime, time.localtime, time.strftime,
    )  # fmt: skip

    def rename(source: Any, target: Any, **options: Any) -> None:
        nonlocal shift
        _rename(source, target, **options)
        if orders["path"] in str(target):
            shift = float(orders["seconds"])

    os.rename = rename
    time.time = lambda: now() + shift
    time.time_ns = lambda: now_ns() + int(shift * 1e9)
    time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)
    time.localtime = lambda seconds=None: localtime(time.time() if seconds is None else seconds)
    time.strftime = lambda form, when=None: strftime(form, time.localtime() if when is None else when)


if "WITNESS" in os.environ:
    import vaedist.models

    vaedist.models.__path__.append(str(Path(__file__).parent / "variants"))
if "FAULT_KILL" in os.environ:
    _kill(json.loads(os.environ["FAULT_KILL"]))
if "FAULT_CLOCK" in os.environ:
    _clock(json.loads(os.environ["FAULT_CLOCK"]))
