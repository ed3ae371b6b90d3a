"""TensorBoard's event files: cut back to a step, because a `purge_step` would only hide later records."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from vaedist.core.files import replace_file

_TIME_IN_NAME = re.compile(r"\.\d{10}\.")


def truncate_event_files(folder: Path, last: int) -> None:
    """Drop records beyond step `last` from the event files in `folder`, and number those that are left by time."""
    attempts = sorted(
        (step, path) for path in folder.glob("*tfevents*") for step in _truncate_event_file(path, last)
    )
    # TensorBoard reads files by name, which begins with the time of a clock: the next attempt's may be behind.
    for number, (_, path) in enumerate(attempts):
        path.replace(path.with_name(_TIME_IN_NAME.sub(f".{number:010d}.", path.name, count=1)))


def _truncate_event_file(path: Path, last: int) -> list[int]:
    """Drop records beyond step `last` from one TensorBoard event file, or the file if nothing is left to show.

    A record is: length (u64), its checksum (u32), that many bytes of an Event message, their checksum (u32), all
    little-endian. Records are kept or dropped whole, so no checksum changes; a torn tail is dropped.

    Returns:
        The last step that is left, if any.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    content = path.read_bytes()
    kept, steps = [], []
    start = 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        stop = start + 12 + length + 4
        if stop > len(content):
            break
        try:
            event = Event.FromString(content[start + 12 : stop - 4])
        except DecodeError:
            break
        if event.step <= last:
            kept.append(content[start:stop])
            if event.HasField("summary"):
                steps.append(event.step)
        start = stop
    if not steps:
        path.unlink()
    elif sum(map(len, kept)) < len(content):
        replace_file(path, b"".join(kept))
    return [max(steps)] if steps else []
