"""The witness, in step with a test: no rank takes the step that `WITNESS/limit` names, or a later one.

A rank that waits says so in `WITNESS/waits-RANK`: JSON of its step, process id and the number of ranks. The rank
`PACED_STAYS` waits for ever, the first time that it waits.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

from vaedist.models import witness  # type: ignore[attr-defined]


class Config(witness.Config):  # type: ignore[misc]
    kind: Literal["paced"] = "paced"


class Model(witness.Model):  # type: ignore[misc]
    def _hold(self, gate: Path, been: Path, step: int) -> None:
        limit, waits = gate.with_name("limit"), gate.with_name(f"waits-{os.environ.get('RANK', '0')}")
        if step < int(limit.read_text()):
            return
        scratch = waits.with_name(f".{waits.name}")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        scratch.write_text(json.dumps({"step": step, "pid": os.getpid(), "world": world}))
        scratch.replace(waits)
        stays = os.environ.get("PACED_STAYS") == os.environ.get("RANK", "0") and not been.exists()
        been.touch()
        while stays or step >= int(limit.read_text()):
            time.sleep(0.05)
