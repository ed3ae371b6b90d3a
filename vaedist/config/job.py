"""The job file: what to train, never where.

A job is YAML, checked by the frozen models below, changed on the command line by `key.sub=value`, and saved
resolved in the run folder; `vaedist.config.settings` says how, and what a resumed run may change.

`Job.model` is an instance of its kind's `Config`: `vaedist.config.model_section` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from vaedist.config.model_section import ModelConfig
from vaedist.config.settings import NAME, Strict, apply_overrides, free, overridable, parse, read_yaml


class Spec(NamedTuple):
    """What the data look like to a model."""

    channels: int
    shape: tuple[int, ...]
    """(H, W)."""
    classes: int = 0
    """0: the data carry no class label."""
    columns: tuple[str, ...] = ()
    """Names of the covariates."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return (self.channels, *self.shape)

    @property
    def pixels(self) -> int:
        """Values per image, C*H*W: the number of terms in an image's log-likelihood."""
        return math.prod(self.image_shape)


class Data(Strict):
    """Which shards to read, and how."""

    path: str = free(
        "${VAEDIST_DATA}",
        description="Folder with index.json; environment variables are expanded.",
    )
    train_split: str = "train"
    validation_split: str = "validate"
    binarise: Literal["none", "static", "dynamic", "threshold"] = Field(
        "none",
        description="Black or white with probability x / 255: drawn once per image (static), at every step anew "
        "(dynamic; static where it is measured), or white from 128 on (threshold).",
    )
    lanes: int | None = Field(
        None, ge=1, description="Lanes L; default: the largest divisor of the batch size up to 16."
    )
    cache: Literal["auto", "none", "memory", "device"] = free(
        "auto",
        description="Decode every image once, into memory that a node's processes share, or from there onto each GPU "
        "(device); auto: into memory where images are read again and take little of what is free of it "
        "(vaedist.training.loader_settings).",
    )
    workers: int | None = free(
        None,
        ge=0,
        description="Reader threads per process; 0 reads in the loop itself; default: by device and cache.",
    )


class Augment(Strict):
    """Changes of training images, drawn anew at each step; `vaedist.data.loading.inputs` defines each."""

    flip: float = Field(0.0, ge=0, le=1, description="Probability of a mirror image, left for right.")
    shift: int = Field(0, ge=0, description="Most pixels in each direction; the edge is repeated.")
    poisson: float | None = Field(
        None, gt=0, le=4096, description="Photons that white stands for: fewer, more noise."
    )
    speckle: float = Field(0.0, ge=0, description="Standard deviation of noise that multiplies the value.")
    gaussian: float = Field(0.0, ge=0, description="Standard deviation of added noise on the [0, 1] scale.")
    salt_pepper: float = Field(0.0, ge=0, le=1, description="Share of pixels made black or white.")
    denoise: bool = Field(False, description="Predict the image without the noise; measured with it too.")

    @property
    def noisy(self) -> tuple[str, ...]:
        """The noises that are on; flip and shift are none."""
        return tuple(
            name for name in ("poisson", "speckle", "gaussian", "salt_pepper") if getattr(self, name)
        )

    @model_validator(mode="after")
    def _noise_to_remove(self) -> Augment:
        if self.denoise and not self.noisy:
            raise ValueError(
                "augment.denoise: there is no noise to remove: set augment.gaussian, salt_pepper, poisson or speckle"
            )
        return self


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

    name: Literal["adam", "adamw"] = overridable("adamw")
    learning_rate: float = overridable(1e-3, gt=0)
    betas: tuple[float, float] = overridable((0.9, 0.999))
    eps: float = overridable(1e-8, gt=0)
    weight_decay: float = overridable(0.0, ge=0)
    schedule: Schedule = overridable(Constant())
    clip: float | None = overridable(None, gt=0, description="Largest global gradient norm.")
    start: int = overridable(
        0, ge=0, description="First step at which this phase is trained; its schedule counts from there."
    )
    every: int = overridable(1, ge=1, description="The phase is trained at every n-th step.")

    @field_validator("schedule", mode="before")
    @classmethod
    def _constant_by_default(cls, value: Any) -> Any:
        return {"kind": "constant", **value} if isinstance(value, dict) else value


class Monitor(Strict):
    """Which validation number decides what is best."""

    metric: str = Field(
        "loss", description="A term of the loss, or a measure of sample quality such as `kid`."
    )
    mode: Literal["min", "max"] = "min"
    images: int = Field(
        512, ge=2, description="How many held-out and generated images a measure of sample quality compares."
    )


class InitFrom(Strict):
    """Where a new run's weights come from. A run that is resumed has its own."""

    run: str = Field(description="A run folder (its best checkpoint), or one checkpoint in it.")
    weights: Literal["ema", "raw"] | None = Field(
        None, description="Which of its weights; default: those that everything else downstream of it uses."
    )
    map: dict[str, str] = Field(
        default_factory=dict,
        description="Its submodules to this model's, such as `{decoder: generator}`; default: the whole model.",
    )
    strict: bool = Field(
        True, description="Refuse unless every tensor fits; false copies those of the same name and shape."
    )
    optimizer: bool | None = Field(
        None,
        description="Take over its optimizers' state too; default: only where train.reset_optimizer is never.",
    )


class Train(Strict):
    """The loop."""

    steps: int | None = free(None, ge=1, description="Length in optimizer steps.")
    epochs: float | None = free(None, gt=0, description="Length in epochs instead.")
    batch_size: int = Field(32, ge=1, description="Global batch: over all processes, every device count.")
    micro_batch_size: int | None = free(
        None,
        ge=1,
        description="Most samples one process takes at once; a larger share is accumulated in several passes.",
    )
    precision: Literal["fp64", "fp32", "bf16"] = overridable("fp32")
    compile: bool = free(False)
    channels_last: bool = free(False)
    threads: int | None = free(
        None,
        ge=1,
        description="CPU threads per process; default: the allocation's cores / processes on the node.",
    )
    optim: dict[str, Optim] = Field(default_factory=lambda: {"main": Optim()})
    reset_optimizer: Literal["never", "on_import", "always"] = overridable(
        "on_import",
        description="When optimizers lose their state: when a run starts from another's weights (on_import), at every "
        "resume too (always), or never.",
    )
    ema_half_life: float | None = overridable(
        None, gt=0, description="Half-life of the weight average, in images; none: no average."
    )
    weights: Literal["ema", "raw"] | None = overridable(
        None,
        description="Weights used by validation, best, sampling and all that follows; default: ema if averaged.",
    )
    monitor: Monitor = overridable(Monitor())
    early_stop: int | None = free(
        None, ge=1, description="Stop after so many validations in a row without a new best."
    )
    log_every: int = free(20, ge=1)
    validate_every: int = free(500, ge=1)
    save_every: int = free(500, ge=1)
    keep: int = free(2, ge=1, description="Newest checkpoints kept (the best one is kept besides).")
    max_bad_steps: int = free(10, ge=1, description="Non-finite steps in a row after which training stops.")

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if self.weights == "ema" and self.ema_half_life is None:
            raise ValueError("train.weights: ema needs train.ema_half_life (in images)")
        return self

    @property
    def chosen_weights(self) -> Literal["ema", "raw"]:
        """Which weights everything downstream uses."""
        return self.weights or ("ema" if self.ema_half_life is not None else "raw")


class Job(Strict):
    """One experiment."""

    name: str = free("run", pattern=NAME)
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Data()
    augment: Augment = overridable(Augment())
    model: ModelConfig = Field(description="`kind` and that variant's own settings.")
    train: Train
    init_from: InitFrom | None = free(
        None, description="A run or checkpoint whose weights a new run starts from: its name, or a section."
    )

    @model_validator(mode="after")
    def _binary_inputs_stay_binary(self) -> Job:
        grey = [name for name in self.augment.noisy if name != "salt_pepper"]
        if self.data.binarise != "none" and grey and not self.augment.denoise:
            raise ValueError(
                f"augment.{grey[0]} would make the binarised images grey again: set augment.denoise=true, so that "
                "only the input has noise, or data.binarise=none"
            )
        return self

    @field_validator("init_from", mode="before")
    @classmethod
    def _just_a_run(cls, value: Any) -> Any:
        return {"run": value} if isinstance(value, str) else value

    @property
    def imports_optimizer(self) -> bool:
        """Whether a new run takes over the optimizers' state of the run it starts from."""
        if self.init_from is None:
            return False
        if self.init_from.optimizer is None:
            return self.train.reset_optimizer == "never" and not self.init_from.map
        return self.init_from.optimizer

    @model_validator(mode="after")
    def _optimizer_is_kept_or_not(self) -> Job:
        if self.imports_optimizer and self.train.reset_optimizer == "always":
            raise ValueError(
                "init_from.optimizer: true takes the optimizer's state over and train.reset_optimizer: always throws "
                "it away: leave one of them out"
            )
        if self.imports_optimizer and self.init_from is not None and self.init_from.map:
            raise ValueError(
                "init_from.optimizer: the state of an optimizer belongs to a whole model: leave init_from.map or "
                "init_from.optimizer out"
            )
        return self

    @property
    def kind(self) -> str:
        """The variant of `model`."""
        return str(self.model.kind)  # type: ignore[attr-defined]


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file; overrides are `key.sub=value`.

    Raises:
        UserError: one sentence about the first mistakes.
    """
    content = apply_overrides(one_length(read_yaml(path), overrides), overrides)
    return parse(Job, content, where=str(path))


def one_length(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`content` without its `train.epochs` where an override gives `train.steps`, and the other way round.

    So one length replaces the other: who shortens a job need not look up in which of them its file counts.
    """
    parts = [override.partition("=") for override in overrides]
    given = {key for key, _, value in parts if value not in ("", "null")}
    replaced = [{"steps", "epochs"} - {name} for name in ("steps", "epochs") if f"train.{name}" in given]
    train = content.get("train")
    if len(replaced) != 1 or not isinstance(train, dict):
        return content
    return {**content, "train": {key: value for key, value in train.items() if key not in replaced[0]}}
