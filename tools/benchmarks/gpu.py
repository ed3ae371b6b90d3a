"""One GPU: training and sampling beside what the chip can do, measured in the same run. Needs neither Ray nor submitit.

    tools/bench gpu                  everything; with --device cpu and --small it only shows that it runs

First the ceilings: TFLOP/s of a large matrix product in each precision, GB/s of a large copy. (By torch's defaults,
which are left alone, a GPU's fp32 convolutions may take TF32, which has a higher ceiling than its fp32 products.) Then:

- Training. `fit` itself, from the cache on the device, on phantoms of the job's size, with a batch that fills a GPU:
  eager fp32, then bf16, channels_last and compiled bodies one after the other. Beside images/s: the model FLOP
  utilisation (floating-point operations of a forward and backward pass, counted by torch, over the ceiling of the
  precision), the share of device time in products and convolutions (which arithmetic bounds; memory bounds the rest),
  and the share of a step that waits for data.
- The transformer prior: 64 maps of 32x32 codes. Each code needs every weight once, which at the measured bandwidth
  would be the limit.
- The MMD of 4,096 latents of 128 numbers with its gradient, beside every difference written out.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Question, Rate, logged_rate, packed
from benchmarks.divergence import ours, tiled

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SIZES = {"vqvae_oasis": (256, 128), "vae_mnist": (28, 1024)}
"""Side of the images, and the global batch."""
EAGER = "eager fp32"
WAYS = {
    EAGER: [],
    "bf16": ["train.precision=bf16"],
    "bf16, channels_last": ["train.precision=bf16", "train.channels_last=true"],
    "bf16, channels_last, compiled": [
        "train.precision=bf16",
        "train.channels_last=true",
        "train.compile=true",
    ],
}
ARITHMETIC = ("conv", "mm", "linear", "gemm", "bmm", "attention")
"""Parts of the names of torch's operations whose time goes into products."""


def questions(folder: Path, asked: argparse.Namespace) -> Iterator[Question]:
    import torch

    chip = _Chip(torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu")), asked.small)
    yield Question(f"Ceilings of {chip.name}", "TFLOP/s", chip.products(), "fp32")
    yield Question("Ceiling of its memory", "GB/s", {"a copy, read and written": chip.copied}, None)
    for name, (side, batch) in SIZES.items():
        side, batch, steps = (32, 4, 2) if asked.small else (side, batch, asked.steps)
        training = _Training(name, side, batch, steps, folder, chip)
        title = f"{name}, {side}x{side}, batch {batch}"
        yield Question(f"Training {title}", "images/s", training.ways(), EAGER)
        yield Question(f"What bounds {title}", "%", training.shares(), None, once=True)
    rows, grid = (2, (4, 4)) if asked.small else (64, (32, 32))
    title = f"Transformer prior, {rows} maps of {grid[0]}x{grid[1]} codes"
    yield Question(title, "maps/s", sampling(chip, rows, grid), LIMIT)
    count = 64 if asked.small else 4096
    title = f"MMD of {count:,} latents of 128 numbers and its gradient"
    yield Question(title, "s", {name: chip.seconds(one, count) for name, one in MMDS.items()}, TILED)
    if chip.device.type == "cuda":  # nobody counts what a CPU's allocator gives
        memory = {name: chip.memory(one, count) for name, one in MMDS.items()}
        yield Question(f"Memory of the {title}", "MiB", memory, TILED, once=True)


LIMIT = "every weight read once per code"
TILED = "tiled B x B x D, one kernel"
MMDS: dict[str, Callable[[Any, Any], Any]] = {
    "vaedist, unbiased, seven scales": lambda x, y: ours(x, y, None),
    "vaedist, blocks of 512": lambda x, y: ours(x, y, 512),
    TILED: tiled,
}


class _Chip:
    """The device, and its ceilings as they are measured."""

    def __init__(self, device: Any, small: bool) -> None:
        import torch

        self.device, self.small = device, small
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        self.peaks: dict[str, float] = {}
        """Operations a second, by precision."""
        self.bandwidth = 0.0
        """Bytes a second."""

    def wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], object], times: int) -> float:
        """Seconds of one call, the device's work included, after one that does not count."""
        work()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def products(self) -> dict[str, Rate]:
        import torch

        side = 256 if self.small else 8192

        def product(name: str, dtype: Any) -> Rate:
            def rate() -> float:
                a = torch.randn(side, side, device=self.device, dtype=dtype)
                self.peaks[name] = 2 * side**3 / self.timed(lambda: a @ a, 3 if self.small else 20)
                return self.peaks[name] / 1e12

            return rate

        return {"fp32": product("fp32", torch.float32), "bf16": product("bf16", torch.bfloat16)}

    def copied(self) -> float:
        import torch

        source = torch.zeros((16 if self.small else 2048) << 20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / self.timed(lambda: target.copy_(source), 20)
        return self.bandwidth / 1e9

    def latents(self, count: int) -> tuple[Any, Any]:
        import torch

        numbers = torch.Generator().manual_seed(0)
        x, y = (torch.randn(count, 128, generator=numbers).to(self.device) for _ in range(2))
        return x.requires_grad_(), y

    def seconds(self, way: Callable[[Any, Any], Any], count: int) -> Rate:
        x, y = self.latents(count)
        return lambda: self.timed(lambda: way(x, y).backward(), 3)

    def memory(self, way: Callable[[Any, Any], Any], count: int) -> Rate:
        """Peak beyond the latents."""
        import torch

        def mib() -> float:
            x, y = self.latents(count)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            way(x, y).backward()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

        return mib


class _Training:
    """`fit` of one job in several ways, and what each is made of."""

    def __init__(self, name: str, side: int, batch: int, steps: int, folder: Path, chip: _Chip) -> None:
        self.file, self.batch, self.chip = JOBS / f"{name}.yaml", batch, chip
        self.every = max(1, steps // 5)
        self.steps = 6 * self.every
        self.shards = packed(folder, size=side, train=8 * batch, codec="npy", per_shard=4 * batch)
        self.rates: dict[str, list[float]] = {}
        self.waits: dict[str, float] = {}

    def job(self, options: list[str]) -> Any:
        from vaedist.config.job import load_job

        settings = [f"data.path={self.shards}", "data.cache=device", f"train.batch_size={self.batch}"]
        settings += [f"train.steps={self.steps}", "train.precision=fp32", "train.channels_last=false"]
        settings += [f"train.{when}_every={self.steps}" for when in ("validate", "save")]
        return load_job(self.file, [*settings, f"train.log_every={self.every}", *options])

    def ways(self) -> dict[str, Rate]:
        return {name: self.way(name) for name in WAYS}

    def way(self, name: str) -> Rate:
        from vaedist.distributed.process_group import Group
        from vaedist.runs.fit_options import FitOptions
        from vaedist.training.loop import fit

        def rate() -> float:
            with tempfile.TemporaryDirectory() as scratch:
                run = Path(scratch) / "run"
                fit(
                    self.job(WAYS[name]),
                    run,
                    group=Group.join(self.chip.device),
                    options=FitOptions(quiet=True),
                )
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                self.waits[name] = min(line["data_wait"] for line in lines if line["kind"] == "train")
                self.rates.setdefault(name, []).append(logged_rate(run))
                return self.rates[name][-1]

        return rate

    def shares(self) -> dict[str, Rate]:
        found: dict[str, Rate] = {}
        for name in WAYS:
            found[f"{name}: model FLOP utilisation"] = functools.partial(self.utilisation, name)
            found[f"{name}: share of a step that waits for data"] = functools.partial(self.waiting, name)
        found["eager fp32: device time in products and convolutions"] = lambda: self.arithmetic(EAGER)
        found["bf16: device time in products and convolutions"] = lambda: self.arithmetic("bf16")
        return found

    def utilisation(self, name: str) -> float:
        """Percent of the ceiling of its precision that the fastest round reached."""
        peak = self.chip.peaks["bf16" if "bf16" in name else "fp32"]
        return 100 * self.operations / self.batch * max(self.rates[name]) / peak

    def waiting(self, name: str) -> float:
        """Percent of the steps' time that was spent waiting for data, in the line of the log with the least."""
        return 100 * self.waits[name]

    @functools.cached_property
    def operations(self) -> int:
        """Of a forward and backward pass on one batch."""
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            self.step(EAGER)()
        return int(counter.get_total_flops())

    def arithmetic(self, name: str) -> float:
        """Percent of the time of torch's operations, on the device, that products and convolutions take."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.chip.device.type == "cuda"
        step = self.step(name)
        step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as seen:
            step()
            self.chip.wait()
        times = {
            one.key: one.self_device_time_total if on_gpu else one.self_cpu_time_total
            for one in seen.key_averages()
            if one.key.startswith("aten::")
        }
        products = sum(time for key, time in times.items() if any(part in key for part in ARITHMETIC))
        return 100 * products / max(sum(times.values()), 1e-9)

    def step(self, name: str) -> Callable[[], None]:
        """A forward and backward pass on one batch of the job, no optimizer."""
        import torch

        from vaedist.core.context import LaneContext
        from vaedist.data.format.index import Index
        from vaedist.models.contract import build
        from vaedist.training.step import precision

        job, device = self.job(WAYS[name]), self.chip.device
        spec = Index.open(self.shards).spec
        model = build(job.model, spec, job.seed).to(device)
        image = torch.randint(0, 256, (self.batch, *spec.image_shape), dtype=torch.uint8).to(device)
        label = torch.zeros(self.batch, dtype=torch.int64, device=device)
        keys = [str(number) for number in range(self.batch)]

        def once() -> None:
            ctx = LaneContext(seed=0, step=0, batch_size=self.batch, lanes=1, device=device)
            with precision(job, device):
                terms = model({"image": image, "label": label, "key": keys, "sample": [0] * self.batch}, ctx)
            terms["loss"].mean().backward()

        return once


def sampling(chip: _Chip, rows: int, grid: tuple[int, int]) -> dict[str, Rate]:
    """Maps a second of the default transformer, and of a device that only reads its weights."""
    import torch

    from vaedist.nets.autoregressive import LogitSampler, generate
    from vaedist.nets.transformer import CausalTransformer
    from vaedist.nets.transformer_config import Transformer

    network = CausalTransformer(Transformer(), 512, grid).to(chip.device).eval()
    uniform = torch.rand(rows, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)).to(chip.device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())

    def drawn() -> float:
        with torch.no_grad():
            return rows / chip.timed(
                lambda: generate(network.start_sampling(rows), uniform, LogitSampler()), 1
            )

    def read() -> float:
        return rows * chip.bandwidth / (weights * grid[0] * grid[1])

    return {"vaedist, keys and values kept": drawn, LIMIT: read}
