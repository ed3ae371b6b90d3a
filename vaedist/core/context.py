"""Context: what a model may use besides its batch while it computes a loss.

A model never asks how many processes there are, which rank it is, or for a global random generator. It asks
its context for noise, and for sums, means and gathered rows of the *global* batch. The context below is for
one process, where these are the identity; `vaedist.distributed.contexts` has the distributed one.

Randomness belongs to the sample, not to the process. Training noise comes from one generator per
(seed, step, name, lane): the global batch is always cut into the same L equal parts, the lanes, and a rank draws
only the lanes that its slice touches. Hence one process and eight train on the same noise, a further noise name
changes no other, and no generator state has to be saved. Evaluation noise comes from one generator per
(seed, sample, name, chunk), so it depends neither on the batch size nor on how importance samples are grouped.

Gradients. The loop minimises the mean of `terms["loss"]` over the global batch. With R ranks holding B_r of the
B rows, rank r back-propagates (R/B) * sum of its rows and DDP averages over ranks, which is that mean exactly,
whatever the shares. `gather`, `mean` and `sum` therefore *sum* their incoming gradients over ranks in backward:
a batch statistic may be added to every row of the loss and its gradient is the one-process gradient.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Protocol, TypedDict

import torch
from torch import Tensor


class Batch(TypedDict, total=False):
    """One process's rows of a batch."""

    image: Tensor
    """(B, C, H, W) uint8: what the model sees."""
    target: Tensor
    """(B, C, H, W) uint8: what it is to predict, where that is another image (denoising); else absent."""
    codes: Tensor
    """(B, h, w) int64, in place of `image`, for variants that read codes."""
    label: Tensor
    """(B,) int64; 0 where the data have no classes."""
    key: Sequence[str]
    sample: list[int]
    """Global sample numbers: the row's place in index order over its split."""
    mask: Tensor
    """(B,) bool, evaluation only: False on rows that only pad the last batch."""


class Context(Protocol):
    """What `forward`, `prepare` and `after_step` receive."""

    phase: str
    step: int
    turn: int
    """How often the phase was trained before this step."""
    training: bool
    batch_size: int
    """Samples in the global batch."""

    def noise(self, name: str, shape: Sequence[int], *, chunk: int = 0) -> Tensor:
        """Standard normal noise of `shape`; the first axis is this process's rows. fp32, on the CPU's generators.

        `chunk` numbers independent draws of the same name for the same samples (importance-sample chunks).
        """

    def uniform(self, name: str, shape: Sequence[int], *, chunk: int = 0) -> Tensor:
        """Uniform noise on [0, 1); as `noise`."""

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all processes in the order of the global batch: (B_r, ...) to (B, ...), with gradient."""

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the rows of the global batch: (B_r, ...) to (...), with gradient."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over processes, shape kept, with gradient."""

    def accumulate(self, name: str, value: Tensor) -> None:
        """Add `value` to this step's statistic `name`, over micro-batches. A refused step discards it."""

    def collect(self, name: str, rows: Tensor) -> None:
        """Append `rows` to this step's statistic `name`, micro-batch after micro-batch."""

    def total(self, name: str) -> Tensor:
        """After the step: what was accumulated under `name`, summed over processes. No gradient."""

    def collected(self, name: str) -> Tensor:
        """After the step: what was collected under `name`, of all processes in the order of the global batch."""


def generator(*identity: object) -> torch.Generator:
    """A CPU generator whose stream is a function of `identity` alone (BLAKE2b of its text, 63 bits)."""
    text = "\x1f".join(str(part) for part in identity).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(seed)


class LaneContext:
    """One process, training: the identity context, and base of the distributed one.

    Args:
        seed: The job's seed.
        step: Optimizer step, counted from 0.
        phase: Which parameters are being trained.
        turn: How often the phase was trained before; default: at each step.
        batch_size: Global batch B.
        lanes: L; divides B.
        rows: First and last + 1 of this process's rows of the lane-major global batch; default: all.
        device: Where noise is wanted.
    """

    training = True

    def __init__(
        self,
        *,
        seed: int,
        step: int,
        batch_size: int,
        lanes: int,
        phase: str = "main",
        turn: int | None = None,
        rows: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        assert batch_size % lanes == 0, "lanes divide the global batch"
        self.seed, self.step, self.phase = seed, step, phase
        self.turn = step if turn is None else turn
        self.batch_size, self.lanes = batch_size, lanes
        self.start, self.stop = rows or (0, batch_size)
        self.device = torch.device(device)
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def micro_batch(self, start: int, stop: int) -> LaneContext:
        """The context of a micro-batch: rows start..stop of this process, the same step and statistics."""
        part = copy.copy(self)
        part.start, part.stop = self.start + start, self.start + stop
        return part

    def noise(self, name: str, shape: Sequence[int], *, chunk: int = 0) -> Tensor:
        return self._draw(torch.randn, name, shape, chunk)

    def uniform(self, name: str, shape: Sequence[int], *, chunk: int = 0) -> Tensor:
        return self._draw(torch.rand, name, shape, chunk)

    def _draw(self, draw, name: str, shape: Sequence[int], chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
        assert shape[0] == self.stop - self.start, f"noise {name!r}: the first axis is this process's rows"
        width = self.batch_size // self.lanes
        first, last = self.start // width, -(-self.stop // width)
        rows = [
            draw(
                width,
                *shape[1:],
                generator=generator("train", self.seed, self.step, self.phase, name, chunk, lane),
            )
            for lane in range(first, last)
        ]
        offset = self.start - first * width
        return torch.cat(rows)[offset : offset + shape[0]].to(self.device)

    def gather(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x.sum(0)) / self.batch_size

    def sum(self, x: Tensor) -> Tensor:
        return x

    def accumulate(self, name: str, value: Tensor) -> None:
        value = value.detach()
        held = self._sums.get(name)
        self._sums[name] = value if held is None else held + value

    def collect(self, name: str, rows: Tensor) -> None:
        rows = rows.detach()
        held = self._rows.get(name)
        self._rows[name] = rows if held is None else torch.cat([held, rows])

    def total(self, name: str) -> Tensor:
        return self._sums[name]

    def collected(self, name: str) -> Tensor:
        return self._rows[name]


class SampleContext(LaneContext):
    """Evaluation: noise per (seed, sample, name, chunk), whatever the batch and the number of processes.

    Args:
        seed: The job's seed.
        samples: This process's global sample numbers, one per row.
        step: Step of the weights being evaluated; never part of the noise.
        batch_size: Rows over all processes; default: those of this process.
        device: Where noise is wanted.
    """

    training = False

    def __init__(
        self,
        *,
        seed: int,
        samples: Sequence[int],
        step: int = 0,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        count = len(samples)
        super().__init__(
            seed=seed, step=step, batch_size=batch_size or count, lanes=1, rows=(0, count), device=device
        )
        self.samples = [int(sample) for sample in samples]

    def _draw(self, draw, name: str, shape: Sequence[int], chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
        assert shape[0] == len(self.samples), f"noise {name!r}: the first axis is this process's rows"
        rows = [
            draw(*shape[1:], generator=generator("evaluate", self.seed, name, chunk, sample))
            for sample in self.samples
        ]
        return torch.stack(rows).to(self.device) if rows else torch.empty(tuple(shape), device=self.device)
