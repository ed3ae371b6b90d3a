"""What a model sees of the processes that train it: sums, means and gathered rows of the global batch.

Their gradients are those of one process: with the loop's weighting (see `vaedist.core.context`) their backward
passes sum over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaedist.core.context import LaneContext, SampleContext
from vaedist.data.loading.order import slice_bounds
from vaedist.distributed.process_group import Group, Pending


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: every rank's objective depends on every rank's input."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: Group) -> Tensor:
        context.group = group
        return group.begin_sum(x)()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return context.group.begin_sum(gradient)(), None


class _GatherRows(torch.autograd.Function):
    """Concatenate rows of all ranks; backward sums the gradients of this rank's rows over ranks."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: Group, rows: Sequence[int]) -> Tensor:
        context.group, context.start, context.rows = group, sum(rows[: group.rank]), len(x)
        return group.begin_gather(x, rows)()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = context.group.begin_sum(gradient)()
        return whole[context.start : context.start + context.rows], None, None


class _Collectives:
    """`gather` and `sum` over a group; mixed into both kinds of context."""

    group: Group

    def gather(self, x: Tensor) -> Tensor:
        if self.group.world == 1:
            return x
        rows: Tensor = _GatherRows.apply(x, self.group, self._shares(len(x)))  # type: ignore[no-untyped-call]
        return rows

    def _shares(self, rows: int) -> Sequence[int]:
        """How many rows each rank has, where this one has `rows`."""
        group = self.group
        counts: list[int] = group.begin_gather(
            torch.tensor([rows], device=group.device), [1] * group.world
        )().tolist()
        return counts

    def sum(self, x: Tensor) -> Tensor:
        return x if self.group.world == 1 else _SumOverRanks.apply(x, self.group)  # type: ignore[no-untyped-call]


class DistributedLaneContext(_Collectives, LaneContext):
    """Training context of one rank of a group.

    A step's statistics are complete after its last forward pass, and wanted after its backward pass: begun between the
    two, they travel while gradients are computed. Asked for one by one at the end, each would cost a wait for the
    slowest rank.
    """

    def __init__(self, group: Group, **options: Any) -> None:
        super().__init__(device=group.device, **options)
        self.group = group
        self._begun: tuple[dict[str, Pending], dict[str, Pending]] | None = None
        self._finished = group.world == 1

    def begin(self) -> None:
        """Send this rank's statistics of the step: nothing is added to them any more."""
        if self._finished or self._begun is not None:
            return
        sums = {name: self.group.begin_sum(value) for name, value in self._sums.items()}
        rows = {
            name: self.group.begin_gather(value, self._shares(len(value)))
            for name, value in self._rows.items()
        }
        self._begun = sums, rows

    def finish(self) -> None:
        """Wait for those of all ranks; what was not begun begins here."""
        self.begin()
        if self._begun is not None:
            sums, rows = self._begun
            self._sums = {name: wait() for name, wait in sums.items()}
            self._rows = {name: wait() for name, wait in rows.items()}
            self._begun, self._finished = None, True

    def total(self, name: str) -> Tensor:
        self.finish()
        return super().total(name)

    def collected(self, name: str) -> Tensor:
        self.finish()
        return super().collected(name)

    def _shares(self, rows: int) -> Sequence[int]:
        """Of a whole step they are known, the slices of the global batch: nobody is asked, nor waited for."""
        bounds = [slice_bounds(self.batch_size, rank, self.group.world) for rank in range(self.group.world)]
        if (self.start, self.stop) == bounds[self.group.rank] and rows == self.stop - self.start:
            return [stop - start for start, stop in bounds]
        return super()._shares(rows)


class DistributedSampleContext(_Collectives, SampleContext):
    """Evaluation context of one rank of a group."""

    def __init__(self, group: Group, **options: Any) -> None:
        super().__init__(device=group.device, **options)
        self.group = group
