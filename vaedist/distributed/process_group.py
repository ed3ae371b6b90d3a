"""Processes that train together: the only module, with `rendezvous`, that uses `torch.distributed`.

A process joins a group only if a launcher made one on purpose: it is already initialised (Ray), or `RANK`,
`WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are all set (torchrun, our local engine, srun). Bare `SLURM_*`
variables, as an interactive allocation leaves behind, never count.

Every decision of a run is made once: on rank 0 (`from_leader`) or from small vectors that all ranks combine to
identical bits (`total`, `largest`). Nothing here pickles an object.

Who has something to do while others answer asks in two parts (`begin_sum`, `begin_gather`, `begin_largest`). All ranks
begin the same collectives in the same order; what DDP begins during a backward pass comes after them.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vaedist.core import errors
from vaedist.core.errors import UserError
from vaedist.distributed.liveness.stalls import StallMonitor, StallReport
from vaedist.distributed.rendezvous import CollectiveCounts, lower_debug_level, meet_ranks

_PART = 256 << 20
_COLLECTIVE_SECONDS = 1800.0
"""Ranks wait for rank 0 to read a checkpoint from a slow disk; that one has died is its launcher's to notice."""
Pending = Callable[[], Tensor]
"""A collective that has begun: waits for it, and gives what it made."""
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """The processes of one run; with one process every operation is the identity.

    Attributes:
        rank, world: This process's number and how many there are.
        local_rank, local_world: The same on this node.
        device: Where this process computes.
        stall_monitor: How far its training thread has come.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        local_world: int = 1,
        ours: bool = False,
        stall_monitor: StallMonitor | None = None,
    ) -> None:
        self.device = device
        self.stall_monitor = stall_monitor or StallMonitor()
        self.rank, self.world = rank, world
        self.local_rank, self.local_world = local_rank, local_world
        self._ours = ours

    @classmethod
    def join(
        cls,
        device: str | torch.device = "auto",
        timeout_s: float = 120.0,
        stall_monitor: StallMonitor | None = None,
    ) -> Group:
        """The group that a launcher made for this process, or one process alone.

        Args:
            device: `auto` takes CUDA where there is one, else the CPU; a `torch.device` is used as it is.
            timeout_s: How long to wait for the other ranks to appear.
            stall_monitor: Of a process that is watched already.

        Raises:
            UserError: the device is not there, the environment is half set, or ranks did not appear in time.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
            return cls(
                _device(device, local_rank), rank, world, local_rank, local_world, stall_monitor=stall_monitor
            )
        given = [name for name in _ENVIRONMENT if name in os.environ]
        if len(given) < len(_ENVIRONMENT):
            if "RANK" in given and "WORLD_SIZE" in given and os.environ["WORLD_SIZE"] != "1":
                missing = ", ".join(name for name in _ENVIRONMENT if name not in given)
                raise UserError(f"RANK and WORLD_SIZE are set but {missing} is not: set it, or unset RANK")
            return cls(_device(device, 0), stall_monitor=stall_monitor)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        chosen = _device(device, local_rank)
        if world == 1:
            return cls(chosen, stall_monitor=stall_monitor)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        lower_debug_level(rank)
        store = meet_ranks(rank, world, timeout_s)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
        )
        return cls(chosen, rank, world, local_rank, local_world, ours=True, stall_monitor=stall_monitor)

    def watched(
        self, hang_seconds: float, folder: Path, report: StallReport
    ) -> contextlib.AbstractContextManager[None]:
        """Watch over the calling thread: see `vaedist.distributed.liveness.stalls`.

        Args:
            hang_seconds: How long it may stand still; 0: for ever, and so where the ranks met elsewhere.
            folder: Of the run.
            report: Takes one sentence.
        """
        if self.world > 1 and not self._ours:
            return contextlib.nullcontext()
        who = f"rank {self.rank} of {self.world}" if self.world > 1 else "the one process"
        peers = CollectiveCounts(self.rank, self.world) if self.world > 1 else None
        return self.stall_monitor.watched(hang_seconds, folder, report, who=who, peers=peers)

    @property
    def leads(self) -> bool:
        """Whether this is the one process that reads checkpoints, writes files and talks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum of a small tensor over ranks; no gradient.

        The blocks are gathered and added in rank order, so the bits are the same on all ranks and do not depend
        on what else the tensor holds (a ring all-reduce adds in an order that depends on the position).
        """
        return values if self.world == 1 else self._begin_blocks(values)().sum(0)

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks; no gradient."""
        return self.begin_largest(values)()

    def begin_sum(self, values: Tensor) -> Pending:
        """Begin to sum over ranks, to the same bits on each; no gradient."""
        result = values.detach().clone(memory_format=torch.contiguous_format)
        return self._later(dist.all_reduce(result, async_op=True), lambda: result)

    def begin_largest(self, values: Tensor) -> Pending:
        """Begin to find the elementwise maximum over ranks; no gradient."""
        if self.world == 1:
            return lambda: values
        blocks = self._begin_blocks(values)
        return lambda: blocks().amax(0)

    def begin_gather(self, values: Tensor, rows: Sequence[int]) -> Pending:
        """Begin to concatenate the rows of all ranks, `rows[r]` of rank r; no gradient."""
        # Collectives want blocks of one size.
        padded = values.new_zeros((max(rows), *values.shape[1:]))
        padded[: len(values)] = values.detach()
        blocks = [torch.empty_like(padded) for _ in rows]
        work = dist.all_gather(blocks, padded, async_op=True)
        return self._later(
            work, lambda: torch.cat([block[:n] for block, n in zip(blocks, rows, strict=True)])
        )

    def _later(self, work: Any, result: Callable[[], Tensor]) -> Pending:
        def wait() -> Tensor:
            with self.stall_monitor.collective():
                work.wait()
            return result()

        return wait

    def from_leader(self, work: Callable[[], bytes]) -> bytes:
        """Do `work` on rank 0 alone; every rank gets its bytes, or raises its error.

        Raises:
            UserError: as raised by `work`, with the same class and sentence on every rank.
        """
        if self.world == 1:
            return work()
        answer, failure = b"", None
        if self.leads:
            try:
                answer = b"+" + work()
            except UserError as error:
                failure = error
                answer = b"-" + type(error).__name__.encode() + b"\n" + str(error).encode()
            except BaseException:
                self._broadcast_bytes(b"-UserError\nrank 0 failed; see its message")
                raise
        answer = self._broadcast_bytes(answer)
        if failure is not None:
            raise failure
        if answer[:1] == b"-":
            name, _, sentence = answer[1:].decode().partition("\n")
            raise getattr(errors, name, UserError)(sentence)
        return answer[1:]

    def _broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes on every rank, in tensors of at most 256 MiB."""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        with self.stall_monitor.collective():
            dist.broadcast(size, 0)
            held = bytearray(data) if self.leads else bytearray(int(size))
        for start in range(0, len(held), _PART):
            part = memoryview(held)[start : start + _PART]
            tensor = torch.frombuffer(part, dtype=torch.uint8).to(self.device)
            with self.stall_monitor.collective():
                dist.broadcast(tensor, 0)
            if not self.leads:
                part[:] = tensor.cpu().numpy().data
        return bytes(held)

    def synchronize(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers."""
        if self.world > 1:
            with torch.no_grad(), self.stall_monitor.collective():
                for tensor in (*module.parameters(), *module.buffers()):
                    dist.broadcast(tensor.data, 0)

    def parallel(self, module: nn.Module, phases: int) -> nn.Module:
        """`module` with gradients averaged over ranks during backward (DDP), or itself.

        Buffers are never broadcast: a codebook's statistics are summed over ranks on purpose, and DDP's
        broadcast would silently keep rank 0's.
        """
        if self.world == 1:
            return module
        parallel = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # since torch 2.13
        options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        made = parallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=phases > 1,
            **options,
        )
        made.register_forward_hook(self._forward_done)
        # A hint about the speed of 1x1 kernels, from every rank in every log, that no user can act upon.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return made

    def _forward_done(self, parallel: Any, given: Any, made: Tensor | dict[str, Tensor]) -> None:
        """Leave a mark, and another one when this rank's own part of the backward pass is done: there it waits."""
        self.stall_monitor.tick()
        loss = made if isinstance(made, Tensor) else made["loss"]
        if parallel.require_backward_grad_sync and loss.requires_grad:
            # Callbacks run in the order in which they are queued, and DDP queues its own at the end of the pass.
            engine = torch.autograd.Variable._execution_engine
            loss.register_hook(lambda _: engine.queue_callback(self.stall_monitor.enter_collective))

    def barrier(self) -> None:
        if self.world > 1:
            self.total(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the group, if it is one that `join` made."""
        if self._ours:
            self._ours = False
            dist.destroy_process_group()

    def _begin_blocks(self, values: Tensor) -> Pending:
        """(world, ...) stack of every rank's values, where the values are."""
        blocks = self.begin_gather(values.detach().to(self.device)[None], [1] * self.world)
        return lambda: blocks().to(values.device)


def _device(device: str | torch.device, local_rank: int) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        count = torch.cuda.device_count()
        if count == 1 and os.environ.get("SLURM_GPUS_PER_TASK") == "1":
            local_rank = 0  # Slurm shows each task the one GPU that is its own
        if local_rank >= count:
            raise UserError(
                f"local rank {local_rank} has no GPU: this node shows {count}; start at most {count} workers"
                if count
                else "there is no CUDA GPU here: use --device cpu, or ask the allocation for one"
            )
        return torch.device("cuda", local_rank)
    if device != "cpu":
        raise UserError(f"unknown device {device!r}; valid: auto, cpu, cuda")
    return torch.device("cpu")
