"""The job file: what to train, never where.

A job is YAML, checked by the frozen models below, changed on the command line by `key.sub=value`, and saved
resolved in the run folder. An unknown key is an error that names the nearest valid one; nothing is ignored.

Each field carries a mark that says what a resumed run may do with it:

| mark | on resume |
|---|---|
| `free` | may differ: length, intervals, cache, threads |
| `override` | may differ with `--override`, and the change is recorded: learning rate, weights |
| `fixed` | may never differ: data, model shape, seed, global batch, lanes (the default) |

The `model` section is kept as written here; `vaedist.models.contract` checks it against the `Config` of the
variant that `kind` names, because this file lies below the models and must load without torch.
"""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vaedist.errors import UserError, nearest

Mark = Literal["free", "override", "fixed"]
FREE: dict[str, Any] = {"resume": "free"}
OVERRIDE: dict[str, Any] = {"resume": "override"}


class Strict(BaseModel):
    """Base of every settings class: unknown keys are refused and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spec(NamedTuple):
    """What the data look like to a model."""

    channels: int
    height: int
    width: int
    classes: int = 0  # 0: the data carry no class label

    @property
    def pixels(self) -> int:
        """Values per image, C*H*W: the number of terms in an image's log-likelihood."""
        return self.channels * self.height * self.width


class Ramp(Strict):
    """A loss weight that changes with the optimizer step: linear from `start` to `end` over `steps` steps.

    Training sees `at(step)`; validation, best, early stopping and everything downstream see `end`, so that a
    loss is never called better because its weight was still small.
    """

    start: float = Field(0.0, ge=0)
    end: float = Field(1.0, ge=0)
    steps: int = Field(gt=0)

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


Weight = Annotated[float, Field(ge=0)] | Ramp


def weight_at(weight: float | Ramp, step: int, training: bool) -> float:
    """Value of a (possibly scheduled) loss weight; outside training always the final one."""
    if isinstance(weight, Ramp):
        return weight.at(step) if training else weight.end
    return weight


def ramp_end(*weights: float | Ramp) -> int:
    """The step from which every one of these weights has its final value."""
    return max((weight.steps for weight in weights if isinstance(weight, Ramp)), default=0)


class Data(Strict):
    """Which shards to read, and how."""

    path: str = Field(
        "${VAEDIST_DATA}",
        description="Folder with index.json; environment variables are expanded.",
        json_schema_extra=FREE,  # a copy elsewhere is the same data: the data identity is what counts
    )
    train_split: str = "train"
    validation_split: str = "validate"
    lanes: int | None = Field(
        None, ge=1, description="Order lanes L; default: the largest divisor of the batch size up to 16."
    )
    cache: Literal["none", "memory"] = Field("none", json_schema_extra=FREE)
    workers: int = Field(
        1,
        ge=0,
        description="Reader threads per process; 0 reads in the loop itself.",
        json_schema_extra=FREE,
    )


class Constant(Strict):
    kind: Literal["constant"] = "constant"
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")


class Cosine(Strict):
    """Linear warm-up, then half a cosine to `final` times the learning rate at the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)


class MultiStep(Strict):
    """The rate is multiplied by `gamma` at each milestone (in steps)."""

    kind: Literal["multistep"] = "multistep"
    warmup: int = Field(0, ge=0)
    milestones: tuple[int, ...]
    gamma: float = Field(0.1, gt=0, lt=1)


class Plateau(Strict):
    """The rate is multiplied by `factor` after `patience` validations in a row without an improvement."""

    kind: Literal["plateau"] = "plateau"
    warmup: int = Field(0, ge=0)
    factor: float = Field(0.5, gt=0, lt=1)
    patience: int = Field(5, ge=1)
    threshold: float = Field(1e-4, ge=0, description="Relative improvement that counts.")
    floor: float = Field(0.0, ge=0, description="Smallest factor on the learning rate.")


Schedule = Annotated[Constant | Cosine | MultiStep | Plateau, Field(discriminator="kind")]


class Optim(Strict):
    """Optimizer of one phase."""

    name: Literal["adam", "adamw"] = Field("adamw", json_schema_extra=OVERRIDE)
    learning_rate: float = Field(1e-3, gt=0, json_schema_extra=OVERRIDE)
    betas: tuple[float, float] = Field((0.9, 0.999), json_schema_extra=OVERRIDE)
    eps: float = Field(1e-8, gt=0, json_schema_extra=OVERRIDE)
    weight_decay: float = Field(0.0, ge=0, json_schema_extra=OVERRIDE)
    schedule: Schedule = Field(Constant(), json_schema_extra=OVERRIDE)
    clip: float | None = Field(
        None, gt=0, description="Largest global gradient norm.", json_schema_extra=OVERRIDE
    )
    start: int = Field(
        0, ge=0, description="First step at which this phase is trained.", json_schema_extra=OVERRIDE
    )
    every: int = Field(
        1, ge=1, description="The phase is trained at every n-th step.", json_schema_extra=OVERRIDE
    )

    @field_validator("schedule", mode="before")
    @classmethod
    def _constant_by_default(cls, value: Any) -> Any:
        return {"kind": "constant", **value} if isinstance(value, dict) else value


class Monitor(Strict):
    """Which validation number decides what is best."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"


class Train(Strict):
    """The loop."""

    steps: int | None = Field(None, ge=1, description="Length in optimizer steps.", json_schema_extra=FREE)
    epochs: float | None = Field(None, gt=0, description="Length in epochs instead.", json_schema_extra=FREE)
    batch_size: int = Field(32, ge=1, description="Global batch: over all processes, every device count.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Most samples one process takes at once; a larger share is accumulated in several passes.",
        json_schema_extra=FREE,
    )
    precision: Literal["fp64", "fp32", "bf16"] = Field("fp32", json_schema_extra=OVERRIDE)
    compile: bool = Field(False, json_schema_extra=FREE)
    channels_last: bool = Field(False, json_schema_extra=FREE)
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per process; default: the allocation's cores / processes on the node.",
        json_schema_extra=FREE,
    )
    optim: dict[str, Optim] = Field(default_factory=lambda: {"main": Optim()})
    ema_half_life: float | None = Field(
        None,
        gt=0,
        description="Half-life of the weight average, in images; none: no average.",
        json_schema_extra=OVERRIDE,
    )
    weights: Literal["ema", "raw"] | None = Field(
        None,
        description="Weights used by validation, best, sampling and all that follows; default: ema if averaged.",
        json_schema_extra=OVERRIDE,
    )
    monitor: Monitor = Field(Monitor(), json_schema_extra=OVERRIDE)
    early_stop: int | None = Field(
        None,
        ge=1,
        description="Stop after so many validations in a row without a new best.",
        json_schema_extra=FREE,
    )
    log_every: int = Field(20, ge=1, json_schema_extra=FREE)
    validate_every: int = Field(500, ge=1, json_schema_extra=FREE)
    save_every: int = Field(500, ge=1, json_schema_extra=FREE)
    keep: int = Field(
        2, ge=1, description="Newest checkpoints kept (the best one is kept besides).", json_schema_extra=FREE
    )
    max_bad_steps: int = Field(
        10, ge=1, description="Non-finite steps in a row after which training stops.", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if self.weights == "ema" and self.ema_half_life is None:
            raise ValueError("train.weights: ema needs train.ema_half_life (in images)")
        return self

    @property
    def chosen_weights(self) -> Literal["ema", "raw"]:
        """The one rule for which weights everything downstream uses."""
        return self.weights or ("ema" if self.ema_half_life is not None else "raw")


class Job(Strict):
    """One experiment."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", json_schema_extra=FREE)
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Data()
    model: dict[str, Any] = Field(description="`kind` and that variant's own settings.")
    train: Train
    init_from: str | None = Field(
        None, description="A run or checkpoint whose weights a new run starts from.", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _model_has_kind(self) -> Job:
        if not isinstance(self.model.get("kind"), str):
            raise ValueError("model.kind is missing: name the variant, for example `kind: vqvae`")
        return self


# Reading ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last one."""


def _no_duplicates(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}; give the path of a YAML file") from None
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` with each `key.sub=value` set; values are read as YAML (`null`, `[1, 2]`, `1e-3`)."""
    result = _copy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r} is not a setting: write key.sub=value, for example train.steps=100"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{override!r}: the value is not valid YAML; quote it") from None
        parts = key.split(".")
        place = result
        for depth, part in enumerate(parts[:-1]):
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UserError(f"{override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
            place = inner
        place[parts[-1]] = value
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


_Model = TypeVar("_Model", bound=BaseModel)


def parse(cls: type[_Model], content: Any, where: str, prefix: str = "") -> _Model:
    """`cls` from plain data, or one sentence about the first mistakes in it.

    Args:
        cls: A settings class.
        content: What a YAML file or the command line said.
        where: The file, for the message.
        prefix: Dotted key of `content` inside that file, such as `model`.

    Raises:
        UserError: naming the file, the key, and for unknown keys the nearest and all valid ones.
    """
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        told = [_sentence(cls, problem, prefix) for problem in error.errors()[:3]]
        raise UserError(f"{where}: {'; '.join(told)}") from None


def _sentence(cls: type[BaseModel], problem: Any, prefix: str) -> str:
    place = [str(part) for part in problem["loc"]]
    fields, shown = _walk(cls, place)
    key = ".".join(([prefix] if prefix else []) + shown)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(place[-1], fields)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "value_error" and not key:
        return message
    given = problem["input"]
    shown_value = f" (it is {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{key}: {message}{shown_value}"


def _walk(cls: Any, place: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Valid keys of the section that holds the last part of `place`, and `place` without pydantic's union tags."""
    current: list[Any] = [cls]
    fields: tuple[str, ...] = ()
    shown: list[str] = []
    for part in place:
        models = [one for one in current if isinstance(one, type) and issubclass(one, BaseModel)]
        tagged = [one for one in models if part in (one.__name__, _tag(one))]
        if tagged:
            current = tagged
            fields = tuple(tagged[0].model_fields)
            continue
        if not models and not any(typing.get_origin(one) in (dict, tuple, list) for one in current):
            continue  # pydantic's name for a scalar branch of a union
        fields = tuple(dict.fromkeys(name for one in models for name in one.model_fields))
        shown.append(part)
        following: list[Any] = []
        for one in current:
            if one in models:
                if part in one.model_fields:
                    following += _branches(one.model_fields[part].annotation)
            elif typing.get_origin(one) in (dict, tuple, list):
                following += _branches(typing.get_args(one)[-1])
        current = following
    return fields, shown


def _branches(annotation: Any) -> list[Any]:
    """The types that a field may have, unions and `Annotated` opened."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _branches(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in typing.get_args(annotation) for branch in _branches(part)]
    return [annotation]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file; overrides are `key.sub=value`.

    Raises:
        UserError: one sentence about the first mistakes.
    """
    content = apply_overrides(read_yaml(path), overrides)
    return parse(Job, content, where=str(path))


def expand(path: str, what: str) -> Path:
    """`path` with `~` and environment variables replaced.

    Raises:
        UserError: a variable in it is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = re.search(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?", expanded)
    if unset:
        raise UserError(
            f"{what} is {path!r}, but ${unset.group(1)} is not set: export it, or give the path itself"
        )
    return Path(expanded)


def marks(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Mark]]:
    """Dotted key and resume mark of every field, outermost first; an unmarked field is `fixed`.

    A section's own mark holds for all keys below it; `*` stands for any key of a mapping (`train.optim.*.clip`).
    """
    for name, field in cls.model_fields.items():
        extra = field.json_schema_extra
        mark = extra.get("resume") if isinstance(extra, dict) else None
        key = f"{prefix}{name}"
        inner = []
        for branch in _branches(field.annotation):
            star = typing.get_origin(branch) is dict
            model = typing.get_args(branch)[-1] if star else branch
            if isinstance(model, type) and issubclass(model, BaseModel):
                inner.append((model, f"{key}.*." if star else f"{key}."))
        if mark is not None or not inner:
            yield key, typing.cast(Mark, mark or "fixed")
            continue
        for model, below in inner:
            yield from marks(model, below)
