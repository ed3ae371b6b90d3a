"""The data and jobs of all benchmarks, and how contestants take turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaedist.data.format.sample_codec import Codec

BATCH = 32
_TRAIN = "train: {batch_size: 32, steps: 1, optim: {main: {name: adam}}}"
_CONV = "{kind: conv, width: 16, depth: 1}"
JOBS = {
    "vae, mlp, 64x64": f"""
        model: {{kind: vae, latent: 32, encoder: {{kind: mlp, width: 256, depth: 1}}}}
        {_TRAIN}
    """,
    "vqvae, conv, 64x64": f"""
        model: {{kind: vqvae, encoder: {_CONV}, codebook: {{kind: ema, codes: 64, dim: 16}}}}
        {_TRAIN}
    """,
    "infovae, conv, 64x64": f"""
        model: {{kind: infovae, latent: 32, encoder: {_CONV}, alpha: 0.5, mmd_weight: 100.0}}
        {_TRAIN}
    """,
    "cvae, conv, 64x64": f"""
        model: {{kind: vae, latent: 32, encoder: {_CONV}, condition: {{label: one_hot, how: concat}}}}
        {_TRAIN}
    """,
    "gan, conv, 64x64": f"""
        model: {{kind: gan, latent: 32, generator: {_CONV}, discriminator: {_CONV}, r1: 0.0}}
        train:
          batch_size: 32
          steps: 1
          optim: {{discriminator: {{name: adam}}, generator: {{name: adam}}}}
          monitor: {{metric: kid}}
    """,
}
Rate = Callable[[], float]


@dataclass(frozen=True)
class Question:
    """One table: contestants that take turns, each giving one number a turn."""

    title: str
    unit: str
    contestants: Mapping[str, Rate]
    reference: str | None = None
    """The contestant whose median is 1 in the column of ratios; none: no such column."""
    once: bool = False
    """One turn each, where a number hardly varies and costs much."""


def packed(
    folder: Path, *, size: int, train: int, codec: Codec = "png", per_shard: int | None = None
) -> Path:
    """A packed phantom; made once. Its tars hold `per_shard` images each, by default a twelfth of all."""
    from vaedist.data.packing.pack import PackingConfig, pack
    from vaedist.data.sources import SourceSettings

    out = folder / f"phantom-{size}-{train}-{codec}{f'-{per_shard}' if per_shard else ''}"
    if not (out / "index.json").exists():
        print(f"packing {train} phantom images of {size}x{size} as {codec}", file=sys.stderr)
        settings = SourceSettings(size=size, count={"train": train, "validate": 32, "test": 32})
        # Several tars, so that webdataset's readers, who share out tars, all have work.
        pack(
            PackingConfig(
                input="phantom",
                out=out,
                size=size,
                codec=codec,
                samples_per_shard=per_shard or max(64, train // 12),
                workers=2,
                settings=settings,
            )
        )
    return out


def job_of(name: str, shards: Path, steps: int, **data: Any) -> Any:
    import yaml

    from vaedist.config.job import Job

    content = yaml.safe_load(JOBS[name])
    content["data"] = {"path": str(shards), **data}
    content["train"] |= {
        "steps": steps,
        "log_every": 20,
        "validate_every": steps,
        "save_every": steps,
        "threads": len(os.sched_getaffinity(0)),
    }
    return Job.model_validate(content)


def ticks_of(job: Any) -> list[float]:
    """Train in this process; when each line of the log was written, in seconds of `time.perf_counter`."""
    from vaedist.distributed.process_group import Group
    from vaedist.runs.fit_options import FitOptions
    from vaedist.training.loop import fit

    ticks: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        fit(
            job,
            Path(scratch) / "run",
            group=Group.join("cpu"),
            report=lambda _: ticks.append(time.perf_counter()),
            options=FitOptions(quiet=True),
        )
    return ticks


def logged_rate(run: Path) -> float:
    """Images/s in a run's log, the median of its lines but the first."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["images_per_second"] for row in rows if row["kind"] == "train"][1:])


def peak_mib(statement: str) -> float:
    """Peak memory of a Python process that does `statement`, in MiB.

    Not by getrusage: its ru_maxrss is inherited, so a small child reports what its parent was when it forked.
    """
    report = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", f"{statement}\n{report}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.splitlines()[-1]) / 1024


def take_turns(question: Question, repeats: int) -> dict[str, list[float]]:
    """Every contestant once per round, in turn; where there are several rounds, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in question.contestants}
    for turn in range(0 if repeats > 1 else 1, repeats + 1):
        for name, rate in question.contestants.items():
            value = rate()
            if turn:
                found[name].append(value)
            stage = f"round {turn} of {repeats}" if turn else "warm-up"
            print(f"{question.title}: {stage}: {name}: {number(value)}", file=sys.stderr)
    return found


def number(value: float) -> str:
    """Whole where it is large, else with two or more digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def table(question: Question, found: Mapping[str, list[float]]) -> str:
    base = statistics.median(found[question.reference]) if question.reference else None
    heads = ["", question.unit, "least to most", *(["ratio"] if base else [])]
    lines = [
        f"### {question.title}",
        "",
        f"| {' | '.join(heads)} |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for name, values in found.items():
        middle = statistics.median(values)
        cells = [name, number(middle), f"{number(min(values))} to {number(max(values))}"]
        lines.append(f"| {' | '.join([*cells, *([number(middle / base)] if base else [])])} |")
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Machine:
    """Where and when a table was measured."""

    commit: str | None
    processor: str
    cores: int
    load_before: float
    torch: str
    libraries: str
    date: str


def machine() -> Machine:
    import torch

    from vaedist.runs.provenance import git_commit, library_versions

    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return Machine(
        commit=git_commit(),
        processor=model,
        cores=len(os.sched_getaffinity(0)),
        load_before=os.getloadavg()[0],
        torch=torch.__version__,
        libraries=library_versions(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
