"""One optimizer step: the phases in turn, each forward, backward, agree, clip, move.

Every rank back-propagates `sum(loss of its rows) * world / batch_size`; DDP averages over ranks, which gives the
gradient of the mean loss over the global batch whatever the shares (slices differ by one sample where the world
size does not divide the batch). A share larger than `micro_batch_size` is taken in several passes whose
gradients add up; only the last one talks to the other ranks.

A step is accepted on all ranks or on none. Non-finite losses and stop requests travel in one small vector per phase,
sent with the step's statistics before the last backward pass; whether the gradient is finite each rank sees for itself,
because the averaged one has the same bits on all. A refused step leaves weights, optimizer and model statistics as
they were, because `forward` writes nothing and statistics live in the step's context. With several phases each is
accepted or refused for itself, and the step counts as accepted where all that were due are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaedist.config.job import Job, Optim, Plateau
from vaedist.config.learning_rate import PlateauState, factor
from vaedist.core.context import Batch
from vaedist.core.errors import UserError
from vaedist.data.loading.inputs import Inputs
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group, Pending
from vaedist.models.contract import Variant
from vaedist.training import optimizers


class Phase:
    """One phase's optimizer and schedule."""

    def __init__(self, name: str, optim: Optim, parameters: Sequence[nn.Parameter], job: Job) -> None:
        self.name, self.optim = name, optim
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        cls = {"adam": optimizers.Adam, "adamw": optimizers.AdamW}[optim.name]
        # One pass over the weights instead of one per operation: on a CPU eight times faster at 4 M parameters.
        self.optimizer = cls(self.parameters, fused=True, **self._settings())
        schedule = optim.schedule
        self.plateau = PlateauState(schedule, job.train.monitor) if isinstance(schedule, Plateau) else None
        self.learning_rate = optim.learning_rate

    def _settings(self) -> dict[str, Any]:
        optim = self.optim
        return {
            "lr": optim.learning_rate,
            "betas": optim.betas,
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }

    def active(self, step: int) -> bool:
        """Whether this phase is trained at `step`."""
        return step >= self.optim.start and (step - self.optim.start) % self.optim.every == 0

    def turn(self, step: int) -> int:
        """How often this phase was trained before `step`."""
        return max(0, step - self.optim.start + self.optim.every - 1) // self.optim.every

    def set_rate(self, step: int, total: int) -> None:
        """The schedule counts from the phase's first step; before it the rate is 0."""
        start = self.optim.start
        scale = self.plateau.factor if self.plateau else 1.0
        scale *= factor(self.optim, step - start, total - start) if step >= start else 0.0
        self.learning_rate = self.optim.learning_rate * scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def state(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        return self.optimizer.state_dict(), self.plateau.state() if self.plateau else None

    def load(self, optimizer: dict[str, Any] | None, plateau: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; settings overridden in the job win over those it holds. None: start anew."""
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)
        for group in self.optimizer.param_groups:
            group.update(self._settings())
        if self.plateau and plateau:
            self.plateau.load(plateau)


class StepResult(NamedTuple):
    """What one step did; the same on every rank, but for `terms`."""

    accepted: bool
    refused_because: str
    stop: bool
    terms: dict[str, Tensor]
    """Sums over this process's rows (float64, on the device), of the phases that ran."""
    scalars: dict[str, float]
    """Of a step that is logged: norms of gradients (before clipping) and weights; what `after_step` returned."""


def micro_batches(job: Job, model: Variant, rows: int) -> list[tuple[int, int]]:
    """Cut of a process's rows into passes of at most `train.micro_batch_size`.

    Raises:
        UserError: more than one pass, and the model's loss needs the whole batch at once.
    """
    most = job.train.micro_batch_size or rows
    if rows > most and model.batch_statistics:
        raise UserError(
            f"train.micro_batch_size is {most}, but {rows} samples fall to each process and this model's loss is a "
            f"statistic of the whole batch, which accumulation would change: set train.micro_batch_size to {rows} or "
            f"more, or train.batch_size to {most} times the number of processes"
        )
    passes = -(-rows // most)
    bounds = [round(rows * index / passes) for index in range(passes + 1)]
    return list(itertools.pairwise(bounds))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}  # type: ignore[return-value, index]


def phase_suffix(model: Variant, phase: str) -> str:
    """What the names of a phase's numbers end with: `/phase`, or nothing where there is only one."""
    return "" if len(model.phases) == 1 else f"/{phase}"


class TrainStep:
    """Takes optimizer steps of one model in one group."""

    def __init__(
        self,
        job: Job,
        group: Group,
        model: Variant,
        lanes: int,
        bounds: tuple[int, int],
        inputs: Inputs,
    ) -> None:
        self.rows = bounds[1] - bounds[0]
        self.job, self.group, self.model, self.lanes, self.bounds = job, group, model, lanes, bounds
        self.parallel = group.parallel(model, len(model.phases))
        self.phases = [
            Phase(name, job.train.optim[name], list(model.parameters_of(name)), job) for name in model.phases
        ]
        self._parameters = list(model.parameters())
        trained = {id(parameter): parameter for phase in self.phases for parameter in phase.parameters}
        self._of_other_phases = {
            phase.name: [trained[key] for key in trained.keys() - {id(one) for one in phase.parameters}]
            for phase in self.phases
        }
        self.inputs = inputs
        self._passes = micro_batches(job, model, self.rows)

    def _zero_grad(self) -> None:
        """Let go of all gradients; `Module.zero_grad` would look for them in every submodule first."""
        for parameter in self._parameters:
            parameter.grad = None

    def context(self, step: int, phase: str, turn: int | None = None) -> DistributedLaneContext:
        return DistributedLaneContext(
            self.group,
            seed=self.job.seed,
            step=step,
            phase=phase,
            turn=turn,
            batch_size=self.job.train.batch_size,
            lanes=self.lanes,
            rows=self.bounds,
        )

    def warm_up(self, batch: Batch, step: int) -> None:
        """Let DDP settle its gradient buckets before the first step.

        DDP reorders them once, after the first backward pass. At three ranks and more the order decides in which
        order gradients are summed: without this, the step after every start would differ in its last bits
        from the same step of an uninterrupted run. Forward writes no state, so nothing else changes.
        """
        if self.group.world > 1 and len(self.phases) == 1:
            self._passes, passes = self._passes[-1:], self._passes
            _, wait_for_flags = self._backward(batch, self.context(step, self.phases[0].name), False)
            wait_for_flags()
            self._passes = passes
            self._zero_grad()

    def __call__(self, batch: Batch, step: int, total: int, stop_requested: bool) -> StepResult:
        """One pass over the phases on this process's rows of global batch `step`."""
        sums: dict[str, Tensor] = {}
        scalars: dict[str, float] = {}
        accepted, reason, stop = True, "", False
        # What is only shown is taken only where the loop will log this step.
        shown = (step + 1) % self.job.train.log_every == 0 or step + 1 == total
        batch = self.inputs(batch, self.context(step, "inputs"))
        for phase in self.phases:
            phase.set_rate(step, total)
            if not phase.active(step):
                continue
            suffix = phase_suffix(self.model, phase.name)

            # Forward and backward, micro-batch by micro-batch; the loss of every row counts 1/B.
            ctx = self.context(step, phase.name, phase.turn(step))
            with self._freeze_other_phases(phase):
                terms, wait_for_flags = self._backward(batch, ctx, stop_requested)
            norm = torch.nn.utils.get_total_norm([p.grad for p in phase.parameters if p.grad is not None])
            if shown:
                gradients = _norms(self._modules(phase.parameters), f"gradient_norm{suffix}", gradient=True)

            # All ranks hear of every rank's non-finite numbers and stop requests, and then do the same. The averaged
            # gradient is the same on all of them.
            names = [*terms, "gradient"]
            stopping, *heard = torch.cat([wait_for_flags(), (~torch.isfinite(norm)).float()[None]]).tolist()
            stop = stop or bool(stopping)
            culprits = [name for name, flag in zip(names, heard, strict=True) if flag]
            if culprits:
                accepted, reason = False, f"{', '.join(culprits)} of phase {phase.name!r}"
                self._zero_grad()
                continue

            # Clip by the global norm, move, and let the model apply the step's statistics.
            if phase.optim.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(phase.parameters, phase.optim.clip, norm)
            phase.optimizer.step()
            self._zero_grad()
            with torch.no_grad():
                shows = self.model.after_step(ctx)
            sums |= {f"{name}{suffix}": value for name, value in terms.items()}
            if shown:  # reading a number waits for the device
                scalars[f"gradient_norm{suffix}"] = norm.item()
                scalars |= gradients
                scalars |= {name: value.item() for name, value in shows.items()}
        if shown:
            scalars |= _norms(self._modules(self.model.parameters()), "weight_norm")
        return StepResult(accepted, reason, stop, sums, scalars)

    @contextlib.contextmanager
    def _freeze_other_phases(self, phase: Phase) -> Iterator[None]:
        """Gradients go to this phase's parameters only: those of the other phases are neither computed nor sent."""
        others = self._of_other_phases[phase.name]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _modules(self, parameters: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by the model's attribute that holds them, such as `encoder`."""
        wanted = {id(parameter) for parameter in parameters}
        modules: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in wanted and parameter.requires_grad:
                modules.setdefault(name.partition(".")[0], []).append(parameter)
        return modules

    def _backward(
        self, batch: Batch, ctx: DistributedLaneContext, stop_requested: bool
    ) -> tuple[dict[str, Tensor], Pending]:
        """Gradients of the mean loss over the global batch.

        Returns:
            The sums of the terms over these rows; and a call that waits for what was sent to all ranks between the last
            forward and its backward pass, the step's statistics and some flags, which it returns: whether any rank is
            to stop, and for each term, whether it is not finite on any.
        """
        sums: dict[str, Tensor] = {}
        scale = self.group.world / self.job.train.batch_size
        for number, (start, stop) in enumerate(self._passes):
            last = number == len(self._passes) - 1
            quiet = (
                contextlib.nullcontext() if last or self.group.world == 1 else self.parallel.no_sync()  # type: ignore[operator]
            )
            with quiet:
                with precision(self.job, self.group.device):
                    terms = self.parallel(cut(batch, start, stop), ctx.micro_batch(start, stop))
                for name, value in terms.items():
                    # A scalar is a statistic of the whole batch: it stands for each of its rows.
                    value = value.detach().double()
                    value = value.sum() if value.ndim else value * (stop - start)
                    sums[name] = sums[name] + value if name in sums else value
                if last:
                    bad = ~torch.isfinite(torch.stack(list(sums.values())))
                    stopping = torch.full((1,), float(stop_requested), device=bad.device)
                    flags = self.group.begin_largest(torch.cat([stopping, bad.float()]))
                    ctx.begin()
                (terms["loss"].sum() * scale).backward()

        def wait_for_flags() -> Tensor:
            ctx.finish()
            return flags()

        return sums, wait_for_flags


def _norms(
    modules: Mapping[str, Sequence[nn.Parameter]], prefix: str, gradient: bool = False
) -> dict[str, float]:
    """`prefix/module`: the Euclidean norm over all its parameters, or of their gradients where there are any."""
    found = {}
    for name, parameters in modules.items():
        tensors = [p.grad if gradient else p.detach() for p in parameters]
        held = [tensor for tensor in tensors if tensor is not None]
        if held:
            found[f"{prefix}/{name}"] = torch.nn.utils.get_total_norm(held)
    values = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, values, strict=True))


def precision(job: Job, device: torch.device) -> Any:
    """Autocast to bfloat16 where the job asks for it; likelihoods and codebooks leave it by themselves."""
    if job.train.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
