"""A VAE that writes down which samples each step saw, and waits at a chosen step for the test to do its worst.

Environment: `WITNESS` is the folder to write into; `WITNESS_HOLD` the step (counted from 0) before which every rank
waits, once, while its file `holding-RANK` is there; `WITNESS_WANTS` bytes that each later step fills and drops;
`WITNESS_READS` a rank that reads the pipe `WITNESS/pipe`, once, when it validates; `WITNESS_WORKS` seconds that rank 0
computes when it validates the first time, while the others wait for it. None of it changes a number.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

import torch

from vaedist.core.context import Batch, Context
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
            self._validates(folder, rank)
        with (folder / f"seen-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        return super().forward(batch, ctx)

    def _validates(self, folder: Path, rank: str) -> None:
        if os.environ.get("WITNESS_READS") == rank and not (folder / f"held-{rank}").exists():
            (folder / f"held-{rank}").touch()
            (folder / "pipe").read_bytes()
        if "WITNESS_WORKS" in os.environ and rank == "0" and not (folder / "worked").exists():
            until = time.monotonic() + float(os.environ["WITNESS_WORKS"])
            while time.monotonic() < until:
                sum(range(10_000))
            (folder / "worked").touch()

    def _hold(self, gate: Path, been: Path, step: int) -> None:
        if step != int(os.environ.get("WITNESS_HOLD", -1)):
            if been.exists() and "WITNESS_WANTS" in os.environ:
                torch.ones(int(os.environ["WITNESS_WANTS"]), dtype=torch.uint8)
        elif not been.exists():
            been.touch()
            gate.touch()
            while gate.exists():
                time.sleep(0.02)
