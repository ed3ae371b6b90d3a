"""The logs of a launch: their ends, and what is appended to them."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_FOLLOW_SECONDS = 1.0
_STATE_SECONDS = 15.0
_TAIL_BYTES = 65536


def last_lines(path: Path) -> list[str]:
    """The lines at the end of a file that are not blank; none where there is no file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def last_line(log: Path) -> str:
    """The last error of ours in a log, else its last line that is not Slurm's own; at most 200 characters."""
    lines = last_lines(log)
    errors = [line for line in lines[-50:] if re.match(r"vaedist-\w+: error: |\w*(Error|Exception)\b", line)]
    plain = [line for line in lines if not re.match(r"slurmstepd|srun:|submitit ", line)]
    line = (errors or plain or lines or [""])[-1].strip()
    return line if len(line) <= 200 else line[:197] + "..."


def show_logs(logs: Sequence[Path], lines: int, write: Callable[[str], None]) -> dict[Path, int]:
    """Print the last lines of each log; how many bytes of each there were."""
    sizes = dict.fromkeys(logs, 0)
    for path in sizes:
        try:
            content = path.read_bytes()
        except OSError:
            content = f"(nothing yet in {path})\n".encode()
        else:
            sizes[path] = len(content)
            content = b"".join(content.splitlines(keepends=True)[-lines:]) if lines else b""
        _write(path, content, sizes, write)
    return sizes


def follow_logs(sizes: dict[Path, int], write: Callable[[str], None], all_ended: Callable[[], bool]) -> None:
    """Print what is appended to logs of these sizes, until `all_ended()` and nothing more comes."""
    asked = time.monotonic()
    while True:
        appended = False
        for path, size in sizes.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(size)
                if content := file.read():
                    appended = True
                    _write(path, content, sizes, write)
                    sizes[path] = size + len(content)
        if not appended and time.monotonic() - asked >= _STATE_SECONDS:
            asked = time.monotonic()
            if all_ended():
                return
        time.sleep(_FOLLOW_SECONDS)


def _write(path: Path, content: bytes, logs: dict[Path, int], write: Callable[[str], None]) -> None:
    """Write a part of a log, under its name where there are several."""
    heading = f"==> {path} <==\n" if len(logs) > 1 else ""
    write(heading + content.decode("utf-8", errors="replace"))
