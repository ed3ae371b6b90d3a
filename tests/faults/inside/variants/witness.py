"""A VAE that writes down which samples each step saw, and waits at a chosen step for the test to do its worst.

Environment: `WITNESS` is the folder to write into; `WITNESS_HOLD` the step (counted from 0) before which every rank
waits, once, while its file `holding-RANK` is there; `WITNESS_WANTS` bytes that each later step fills and drops.
None of it changes a number.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

import torch

from vaedist.context import Batch, Context
from vaedist.models import vae


class Config(vae.Config):
    kind: Literal["witness"] = "witness"  # type: ignore[assignment]


class Model(vae.Model):
    def forward(self, batch: Batch, ctx: Context) -> dict[str, torch.Tensor]:
        folder, rank = Path(os.environ["WITNESS"]), os.environ.get("RANK", "0")
        if ctx.training:
            self._hold(folder / f"holding-{rank}", folder / f"held-{rank}", ctx.step)
            seen = {"step": ctx.step, "start": ctx.start, "keys": list(batch["key"])}
        else:
            seen = {"samples": list(ctx.samples)}
        with (folder / f"seen-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        return super().forward(batch, ctx)

    def _hold(self, gate: Path, been: Path, step: int) -> None:
        if step != int(os.environ.get("WITNESS_HOLD", -1)):
            if been.exists() and "WITNESS_WANTS" in os.environ:
                torch.ones(int(os.environ["WITNESS_WANTS"]), dtype=torch.uint8)
        elif not been.exists():
            been.touch()
            gate.touch()
            while gate.exists():
                time.sleep(0.02)
