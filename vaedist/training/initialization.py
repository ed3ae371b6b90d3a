"""How a run begins: from nothing, from the weights of another run, or where it was.

| how | when | weights | optimizers |
|---|---|---|---|
| resume | the run has a checkpoint | that checkpoint's | that checkpoint's, or new with `reset_optimizer: always` |
| import | none, and the job says `init_from` | another run's, as far as it says | new, or the other's if asked for |
| start | neither | from the seed | new |

The other's are asked for with `init_from.optimizer`, or with `reset_optimizer: never`. Counters and schedules go on
only in a resumed run.

`init_from` counts at step 0 only. It copies tensor by tensor, reports every one, and is strict by default:
within each mapped submodule every tensor must have its counterpart of the same shape. The source is written down
with the sha256 of its checkpoint.

Submodules from another run (`Variant.pretrained`, such as a prior's tokenizer) are loaded from it when a run starts or
imports, and come with its own checkpoint ever after.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vaedist.config.job import InitFrom, Job
from vaedist.config.model_section import model_config
from vaedist.config.settings import expand
from vaedist.core.errors import UserError, did_you_mean
from vaedist.distributed.process_group import Group
from vaedist.models.contract import Variant
from vaedist.runs.checkpoint_manifest import LoadedCheckpoint
from vaedist.runs.init_from import SourceRun, source_from_bytes, source_to_bytes
from vaedist.training.step import Phase


class TensorTransfer(NamedTuple):
    """What became of one tensor."""

    what: Literal["copied", "own start", "not used", "other shape", "borrowed"]
    source: str
    target: str
    shape: str

    def __str__(self) -> str:
        way = f"{self.source} -> {self.target}" if self.source and self.target else self.source or self.target
        return f"  {self.what:<11}  {way}  {self.shape}"


@dataclass
class Initialization:
    """What `init_weights` did.

    Attributes:
        how: `start`, `import` or `resume`.
        description: The same in words, with the source.
        record: For provenance.json.
        report: Lines about every tensor; only of an import.
        optim, sched: States to go on with, by phase.
        prepares: Whether the model is still to be prepared from data.
    """

    how: Literal["start", "import", "resume"]
    description: str
    record: dict[str, Any]
    report: Sequence[str] = ()
    optim: dict[str, Any] = field(default_factory=dict)
    sched: dict[str, Any] = field(default_factory=dict)
    prepares: bool = True
    copied: dict[str, Tensor] = field(default_factory=dict)

    def restore_imported(self, model: Variant) -> None:
        """Put what was imported back, after `prepare` has seen it and may have written over it."""
        model.load_state_dict(self.copied, strict=False)

    def load_optimizers(self, phases: Iterable[Phase]) -> None:
        """Give the optimizers and schedules what they had learnt.

        Raises:
            UserError: the imported state is that of other weights.
        """
        for phase in phases:
            state = self.optim.get(phase.name)
            if self.how == "import" and state is not None and not _fits(state, phase):
                raise UserError(
                    f"init_from: the optimizer of phase {phase.name!r} there belongs to other weights than here: leave "
                    "its state behind with train.reset_optimizer=on_import"
                )
            phase.load(state, self.sched.get(phase.name))


def init_weights(model: Variant, job: Job, found: LoadedCheckpoint | None, group: Group) -> Initialization:
    """Give a freshly built model its first weights. Collective.

    Args:
        model: On its device.
        job: Resolved and with its tokenizer described.
        found: The run's own newest checkpoint.

    Raises:
        UserError: a source is not there, or does not fit.
    """
    if found is not None:
        return _resume(model, job, found)
    borrowed = {name: _borrow(model, name, run, group) for name, run in model.pretrained.items()}
    record: dict[str, Any] = {"how": "start"}
    beside = ""
    if borrowed:
        record["borrowed"] = {name: _record(source) for name, source in borrowed.items()}
        beside = "".join(
            f"; {name} frozen, from {_describe_source(source)}" for name, source in borrowed.items()
        )
    wanted = job.init_from
    if wanted is None:
        return Initialization("start", f"from nothing, seed {job.seed}{beside}", record)

    # Another run's weights, tensor by tensor.
    path, optimizer = expand(wanted.run, "init_from"), job.imports_optimizer
    found_there = group.from_leader(lambda: source_to_bytes(path, wanted.weights, optimizer=optimizer))
    source = source_from_bytes(found_there, wanted.run)
    model.check_source(model_config(source.model, source.run), wanted.map, f"init_from={source.run}")
    own = model.state_dict()
    rows = transfer(source.weights, own, wanted, tuple(borrowed))
    copied = {row.target: source.weights[row.source] for row in rows if row.what == "copied"}
    model.load_state_dict(copied, strict=False)
    description = (
        f"imported from {_describe_source(source)}: {len(copied)} of {len(own)} tensors; "
        f"optimizer {'as there' if source.optim else 'new'}{beside}"
    )
    return Initialization(
        "import",
        description,
        {
            **record,
            "how": "import",
            "source": _record(source),
            "settings": wanted.model_dump(mode="json"),
        },
        report=[f"init_from: every tensor, {_describe_source(source)}", *map(str, rows)],
        optim=source.optim,
        prepares=any(row.what in ("own start", "other shape") for row in rows),
        copied=copied,
    )


def _resume(model: Variant, job: Job, found: LoadedCheckpoint) -> Initialization:
    try:
        model.load_state_dict(found.state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{found.path}: its weights do not fit this job's model: {reason}") from None
    forgets = job.train.reset_optimizer == "always"
    return Initialization(
        "resume",
        f"resumed after step {found.step} from {found.path.name}"
        + ("; optimizer new (train.reset_optimizer: always)" if forgets else ""),
        {"how": "resume", "checkpoint": found.path.name},
        optim={} if forgets else found.state["optim"],
        sched=found.state["sched"],
        prepares=False,
    )


def _borrow(model: Variant, name: str, run: str, group: Group) -> SourceRun:
    path = expand(run, f"model.{name}")
    source = source_from_bytes(group.from_leader(lambda: source_to_bytes(path)), run)
    try:
        model.get_submodule(name).load_state_dict(source.weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"model.{name}: the weights of {run} do not fit what it is here: {reason}") from None
    return source


def _describe_source(source: SourceRun) -> str:
    which = f"{Path(source.path).name}, {source.which} weights, sha256 {source.sha256[:12]}"
    return f"{source.run} ({which})"


def _record(source: SourceRun) -> dict[str, Any]:
    return {
        "checkpoint": source.path,
        "step": source.step,
        "weights": source.which,
        "sha256": source.sha256,
    }


def _fits(state: Mapping[str, Any], phase: Phase) -> bool:
    """Whether an optimizer's state has the shapes of the phase's parameters."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(numbers) != len(phase.parameters):
        return False
    return all(
        state["state"][number]["exp_avg"].shape == parameter.shape
        for number, parameter in zip(numbers, phase.parameters, strict=True)
        if number in state["state"]
    )


# Tensor by tensor -------------------------------------------------------------------------------------------


def transfer(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    settings: InitFrom,
    borrowed: Sequence[str] = (),
) -> list[TensorTransfer]:
    """What goes where: one row for every tensor of both sides, copied ones first.

    Args:
        source, target: State dicts; only their shapes are looked at.
        settings: `map` and `strict`.
        borrowed: Submodules of the target whose weights come from elsewhere.

    Raises:
        UserError: a mapped submodule does not exist, two go to one place, nothing fits, or (strict) not all fits.
    """
    mapping = settings.map or {"": ""}
    for side, names, prefixes in (
        (settings.run, source, mapping.keys()),
        ("this job's model", target, mapping.values()),
    ):
        for prefix in prefixes:
            if not any(_inside(name, prefix) for name in names):
                raise UserError(
                    f"init_from.map: {side} has no weights in {prefix!r}{did_you_mean(prefix, _modules(names))}"
                )
    pairs: dict[str, str] = {}
    for name in source:
        for old, new in mapping.items():
            if _inside(name, old):
                place = (
                    f"{new}.{name.removeprefix(old).removeprefix('.')}"
                    if new
                    else name.removeprefix(f"{old}.")
                )
                place = new if name == old else place
                if place in pairs:
                    raise UserError(
                        f"init_from.map: both {pairs[place]!r} and {name!r} would become {place!r}"
                    )
                pairs[place] = name

    copied, left, problems = [], [], []
    for name, tensor in target.items():
        shape = _shape(tensor)
        if any(_inside(name, module) for module in borrowed):
            left.append(TensorTransfer("borrowed", "", name, shape))
        elif name not in pairs:
            left.append(TensorTransfer("own start", "", name, shape))
            if any(_inside(name, new) for new in mapping.values()):
                problems.append(f"{name} is not there")
        elif source[pairs[name]].shape != tensor.shape:
            there = _shape(source[pairs[name]])
            left.append(TensorTransfer("other shape", pairs[name], name, f"{there} there, {shape} here"))
            problems.append(f"{pairs[name]} is {there} there and {name} is {shape} here")
        else:
            copied.append(TensorTransfer("copied", pairs[name], name, shape))
    used = {row.source for row in copied + left}
    for name, tensor in source.items():
        if name not in used:
            left.append(TensorTransfer("not used", name, "", _shape(tensor)))
            if any(_inside(name, old) for old in mapping) and not any(_inside(name, one) for one in borrowed):
                problems.append(f"{name} has no place here")
    if settings.strict and problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"init_from={settings.run}: its weights do not fit this job's model: {'; '.join(problems[:3])}{more}. Map "
            "what fits with init_from.map, or copy only what fits with init_from.strict=false"
        )
    if not copied:
        raise UserError(
            f"init_from={settings.run}: none of its weights fits this job's model, so nothing would be imported"
        )
    return copied + left


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _modules(names: Iterable[str]) -> set[str]:
    """Every submodule that holds one of these tensors, outermost two levels."""
    parts = [name.split(".")[:-1] for name in names]
    return {".".join(part[:depth]) for part in parts for depth in (1, 2) if len(part) >= depth}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
