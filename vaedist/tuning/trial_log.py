"""The record of a search: `trials.jsonl`, appended to and forced to the disk, and nothing else, is the truth.

One JSON object per line, in the order in which things happened:

| event | says |
|---|---|
| `search` | first: the space with every default, and the identity of the data |
| `trial` | trial `trial` is to have these `settings`; written before anything of it starts |
| `rung` | its `value` at `step`, and whether it is to `halt` there |
| `end` | its `status`, and what was measured |

A trial without an `end` is unfinished: it starts again with the settings that stand here, in its own run folder, where
it goes on from its checkpoint. A line that a kill has torn has not happened; it is cut off. Anything else that cannot
be read is refused, because a search that forgot trials would do them again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.core.files import disk_errors, sync_folder
from vaedist.tuning.dimensions import Setting
from vaedist.tuning.space import Space

NAME = "trials.jsonl"
Status = Literal["finished", "stopped early", "failed"]


@dataclass
class Trial:
    """One trial, as the record tells of it."""

    number: int
    settings: dict[str, Setting]
    status: Status | None = None
    """None: it has not ended."""
    measures: dict[str, float] = field(default_factory=dict)
    """Everything that was measured, by name."""
    step: int = 0
    seconds: float = 0.0
    """Wall time of its last attempt, training and measuring."""
    reason: str | None = None
    """Why it failed."""
    rungs: dict[int, float] = field(default_factory=dict)
    """Step to value, where it was compared with others."""
    halted: int | None = None
    """The step at which it was told not to go on."""

    @property
    def ended(self) -> bool:
        return self.status is not None


class Record:
    """`trials.jsonl` of one search. Only the holder of the folder's lock appends.

    Args:
        folder: Of the search.
        space, data: As the file's first line says.
        trials: In order of their numbers.
    """

    def __init__(self, folder: Path, space: Space, data: str, trials: list[Trial]) -> None:
        self.folder, self.space, self.data, self.trials = folder, space, data, trials

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record of a search; None where nothing has begun. A torn last line is passed over.

        Raises:
            UserError: a line cannot be read.
        """
        path = folder / NAME
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        record: Record | None = None
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = json.loads(line)
                if record is None:
                    if event["event"] != "search" or event["format"] != 1:
                        raise ValueError(event["event"])
                    space = parse(Space, event["space"], where=f"{path}, line 1")
                    record = cls(folder, space, str(event["data"]), [])
                else:
                    record._apply(event)
            except (ValueError, KeyError, TypeError, IndexError):
                raise UserError(
                    f"{path} is damaged in line {number}: mend that line or remove it and what follows, or search "
                    "anew with another --run-dir"
                ) from None
        return record

    @classmethod
    def create(cls, folder: Path, space: Space, data: str) -> Record:
        """A new record, with its first line."""
        record = cls(folder, space, data, [])
        record._write(
            [{"event": "search", "format": 1, "space": space.model_dump(mode="json"), "data": data}]
        )
        sync_folder(folder)
        return record

    def discard(self) -> None:
        """Take the record away again where nothing has been proposed: the search did not come to its first trial."""
        if not self.trials:
            (self.folder / NAME).unlink(missing_ok=True)

    def truncate_torn_line(self) -> None:
        """Cut off a line that a kill has torn, so that the next one does not continue it."""
        path = self.folder / NAME
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())

    def propose(self, settings: Mapping[str, Setting]) -> Trial:
        """Write down the next trial."""
        self._append({"event": "trial", "trial": len(self.trials), "settings": dict(settings)})
        return self.trials[-1]

    def rung(self, trial: Trial, step: int, value: float, halt: bool) -> None:
        """Write down a trial's value at a rung, and the verdict."""
        self._append({"event": "rung", "trial": trial.number, "step": step, "value": value, "halt": halt})

    def end(
        self,
        trial: Trial,
        status: Status,
        *,
        step: int = 0,
        seconds: float = 0.0,
        measures: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> None:
        """Write down how a trial ended."""
        self._append(
            {
                "event": "end",
                "trial": trial.number,
                "status": status,
                "step": step,
                "seconds": round(seconds, 3),
                "measures": dict(measures or {}),
                "reason": reason,
            }
        )

    def _append(self, event: dict[str, Any]) -> None:
        self._write([{**event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}])
        self._apply(event)

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
        with disk_errors("the record of the search", self.folder), (self.folder / NAME).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "trial":
            if event["trial"] != len(self.trials):
                raise ValueError(event["trial"])
            self.trials.append(Trial(event["trial"], dict(event["settings"])))
            return
        trial = self.trials[event["trial"]]
        if kind == "rung":
            trial.rungs[int(event["step"])] = float(event["value"])
            if event["halt"]:
                trial.halted = int(event["step"])
        elif kind == "end":
            trial.status, trial.step, trial.seconds = event["status"], event["step"], event["seconds"]
            trial.measures = {name: float(value) for name, value in event["measures"].items()}
            trial.reason = event["reason"]
        else:
            raise ValueError(kind)


def run_folder(folder: Path, number: int) -> Path:
    """Where a trial trains: an ordinary run folder."""
    return folder / "trials" / f"{number:03d}"
