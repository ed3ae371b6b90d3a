"""A search space: one job, the settings of it that are searched, what is asked of each trial, and how it is searched.

A space is a YAML file. `base` is a job (a mapping, or the path of a job file, seen from the space's own folder); each
key of `dimensions` is a dotted key of that job, and its values are described in `vaedist.tuning.dimensions`.

What a trial is asked for (`objectives`) must mean the same at every setting, so no number that a searched weight enters
can be an objective: see `vaedist.tuning.objectives`. One objective has a best trial; of several there is a front, and
`pick` says which of its trials becomes `best`.

Nothing here needs torch, so that mistakes are told at once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

import vaedist
from vaedist.config.job import Job, one_length
from vaedist.config.settings import NAME, Strict, apply_overrides, expand, free, parse, read_yaml
from vaedist.core.errors import UserError, did_you_mean
from vaedist.runs.provenance import Change
from vaedist.tuning.dimensions import Categorical, Dimension, LogUniform, Setting, Uniform

SHIPPED = Path(vaedist.__file__).parent / "spaces"
PHANTOM = "phantom"
KNEE = "knee"


# How it is searched -----------------------------------------------------------------------------------------


class Tpe(Strict):
    """Optuna's tree-structured Parzen estimator."""

    kind: Literal["tpe"] = "tpe"
    seed: int = Field(0, ge=0, lt=2**31)
    startup: int = Field(6, ge=1, description="Trials drawn at random before it starts to learn from them.")


class Random(Strict):
    """Each trial on its own."""

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, lt=2**31)


class Grid(Strict):
    """Every combination, in the file's order; `trials` are at most as many."""

    kind: Literal["grid"] = "grid"


Search = Annotated[Tpe | Random | Grid, Field(discriminator="kind")]


class NoScheduler(Strict):
    """Every trial is trained to its end."""

    kind: Literal["none"] = "none"


class Asha(Strict):
    """Asynchronous successive halving: see `vaedist.tuning.asha`."""

    kind: Literal["asha"] = "asha"
    metric: str = Field(description="A number of validation that means the same at every setting.")
    mode: Literal["min", "max"] = "min"
    reduction: int = Field(3, ge=2, description="Of so many trials one goes on at each rung.")
    first: int | None = Field(
        None,
        ge=1,
        description="Step of the first rung; default: length / reduction^2. Rungs before all schedules have ended "
        "are left out.",
    )


Scheduler = Annotated[NoScheduler | Asha, Field(discriminator="kind")]


class Objective(Strict):
    """One number that trials are judged by."""

    metric: str
    mode: Literal["min", "max"] | None = Field(None, description="Default: the metric's own.")


class Measure(Strict):
    """What the objectives are measured on, once a trial has ended: the validation split, never the test split."""

    images: int | None = Field(
        None, ge=4, description="Only the first so many images of the split; default: all."
    )
    samples: int = Field(
        512, ge=4, description="Images drawn where an objective is a measure of sample quality."
    )
    importance: int = Field(
        100, ge=1, description="Importance samples per image where an objective is `iwae`."
    )


class SpaceData(Strict):
    """Which shards it searches on."""

    path: str = Field(description="Where they lie unless --data or $VAEDIST_DATA says so.")
    make: str = Field(description="The command that makes them, for whom they are missing.")
    phantom: int = Field(32, ge=8, description="Side in pixels of the phantom that --data phantom packs.")


class Resources(Strict):
    """Of one worker of a trial."""

    cpus: int = Field(
        1, ge=1, description="Also its threads, where base.train.threads does not say otherwise."
    )
    gpus: Literal[0, 1] | None = Field(None, description="Default: 1 where Ray has GPUs.")


class Space(Strict):
    """A search space. Keys marked free may change while a search goes on."""

    name: str = Field(pattern=NAME)
    data: SpaceData = free()
    base: dict[str, Any] = Field(description="A job without data.path, or the path of a job file.")
    dimensions: dict[str, Dimension] = Field(min_length=1)
    objectives: tuple[Objective, ...] = Field(min_length=1)
    pick: str = Field(
        KNEE,
        description="Which trial of the front becomes `best`: `knee`, the nearest to the best of everything, or the "
        "metric of an objective.",
    )
    measure: Measure = Measure()
    search: Search = Tpe()
    scheduler: Scheduler = NoScheduler()
    trials: int = free(12, ge=1)
    resources: Resources = free(Resources())

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        for key, dimension in self.dimensions.items():
            if key.partition(".")[0] in ("name", "data"):
                raise ValueError(
                    f"dimensions.{key}: the name and the data are the same for all trials: leave it out"
                )
            before = list(itertools.takewhile(lambda other, key=key: other != key, self.dimensions))  # type: ignore[misc]
            for other, wanted in dimension.when.items():
                if other not in before:
                    raise ValueError(
                        f"dimensions.{key}.when: {other!r} is no dimension before it{did_you_mean(other, before)}"
                    )
                choice = self.dimensions[other]
                values = wanted if isinstance(wanted, list) else [wanted]
                if not isinstance(choice, Categorical) or not set(values) <= set(choice.options):
                    raise ValueError(
                        f"dimensions.{key}.when.{other}: {wanted!r} is not a value of that choice"
                    )
            if isinstance(self.search, Grid) and isinstance(dimension, Uniform | LogUniform):
                if dimension.points is None:
                    raise ValueError(f"dimensions.{key}: a grid takes how many of its values? Give `points`")
            elif isinstance(dimension, Uniform | LogUniform) and dimension.points is not None:
                raise ValueError(f"dimensions.{key}.points has no effect without search.kind: grid")
        names = [objective.metric for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError("objectives: a metric stands there twice")
        if self.pick != KNEE and self.pick not in names:
            raise ValueError(f"pick: {self.pick!r} is no objective{did_you_mean(self.pick, [KNEE, *names])}")
        if "path" in (self.base.get("data") or {}):
            raise ValueError("base.data.path: where the data lie is said by data.path of the space")
        return self

    def settings_of(self, at: Mapping[str, float]) -> dict[str, Setting]:
        """The settings at a share of the way through each dimension, those left out that do not exist there."""
        settings: dict[str, Setting] = {}
        for key, dimension in self.dimensions.items():
            if dimension.exists(settings):
                settings[key] = dimension.at(at[key])
        return settings

    def combinations(self) -> Iterator[dict[str, Setting]]:
        """Every combination of the dimensions' grids, the last dimension changing fastest."""

        def extend(settings: dict[str, Setting], rest: Sequence[str]) -> Iterator[dict[str, Setting]]:
            if not rest:
                yield settings
                return
            dimension = self.dimensions[rest[0]]
            values: Sequence[Setting | None] = dimension.grid() if dimension.exists(settings) else [None]
            for value in values:
                more = settings if value is None else {**settings, rest[0]: value}
                yield from extend(more, rest[1:])

        yield from extend({}, list(self.dimensions))

    def job(self, settings: Mapping[str, Setting], data: str, name: str) -> Job:
        """The job of a trial: `base` with its settings, as `vaedist-train` would take it.

        Args:
            settings: By dimension.
            data: Folder of the shards.
            name: Of the job.

        Raises:
            UserError: the settings make no job.
        """
        content = json.loads(json.dumps(self.base))
        for key, setting in settings.items():
            dimension = self.dimensions[key]
            value = dimension.options[setting] if isinstance(dimension, Categorical) else setting
            _put(content, key, value)
        content.setdefault("data", {})["path"] = data
        content["name"] = name
        train = content.setdefault("train", {})
        if isinstance(train, dict) and train.get("threads") is None:
            train["threads"] = self.resources.cpus
        described = ", ".join(f"{key}={setting}" for key, setting in settings.items())
        return parse(Job, content, where=f"the space {self.name!r} with {described or 'its base alone'}")


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; the sections on its way must be there."""
    *sections, last = key.split(".")
    place = content
    for depth, part in enumerate(sections):
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            where = ".".join(sections[: depth + 1])
            raise UserError(
                f"dimensions.{key}: {where} is a value in the base job, not a section: make it a section there"
            )
        place = inner
    place[last] = json.loads(json.dumps(value))


# Reading ----------------------------------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    """The spaces that come with vaedist."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def load_space(given: str, overrides: Sequence[str] = ()) -> Space:
    """A space by the name of a shipped one, or by the path of a file.

    Args:
        given: `beta_vae`, or a path: it ends in .yaml or .yml, or has a slash.
        overrides: `key.sub=value` for its base job.

    Raises:
        UserError: there is none, or it has a mistake; one sentence.
    """
    by_path = "/" in given or given.endswith((".yaml", ".yml"))
    path = expand(given, "--space") if by_path else SHIPPED / f"{given}.yaml"
    if not by_path and not path.exists():
        raise UserError(
            f"there is no space {given!r}{did_you_mean(given, shipped())}; a file of your own is given by its path, as "
            f"in ./{given}.yaml"
        )
    content = read_yaml(path)
    base = content.get("base")
    if isinstance(base, str):
        job_file = path.parent / expand(base, f"base of {path}")
        base = read_yaml(job_file)
        if isinstance(base.get("data"), dict):
            base["data"].pop("path", None)
    if overrides:
        if not isinstance(base, dict):
            raise UserError(f"{path}: the key 'base' is missing: the job that is searched")
        searched = [one.partition("=")[0] for one in overrides]
        clash = [key for key in searched if key in (content.get("dimensions") or {})]
        if clash:
            raise UserError(
                f"{clash[0]} is a dimension of this space: to fix it, take the dimension out of a file of your own "
                "(--print-space prints one)"
            )
        base = apply_overrides(one_length(base, overrides), overrides)
    if base is not None:
        content = {**content, "base": base}
    return parse(Space, content, where=str(path))


def differences(old: Space, new: Space) -> list[Change]:
    """What a search that goes on may not change: everything but what is marked free."""
    free = {
        name
        for name, field in Space.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("resume") == "free"
    }
    before, after = (dict(_flat("", one.model_dump(mode="json", exclude=free))) for one in (old, new))
    return [
        Change(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value
