"""The site file: where jobs run, never what they train.

One YAML per cluster says what every job there needs (partition, account, the site's way to ask for GPUs, modules,
shared and node-local folders) and how a job that was stopped goes on. `vaedist-launch` fills it into the batch
scripts, the supervisor of a batch job (`vaedist.slurm.supervisor`) reads it again from `$VAEDIST_SITE`, and plain
`sbatch` gets it as `SBATCH_*` variables:

    eval "$(vaedist-launch --site FILE --print-env)"

`continue_by` says how a job that ran out of time or was preempted goes on: `requeue` (`scontrol requeue`, the same
job number), `resubmit` (a successor that waits for this job's end: for sites where users may not requeue, or where
`scontrol` is out of reach), or `none`. Slurm's options are those of sbatch(1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vaedist.config.settings import NAME, Strict, apply_overrides, parse, read_yaml
from vaedist.core.errors import UserError

GpuSyntax = Literal["gres", "gpus_per_node", "typed", "none"]
ContinueBy = Literal["requeue", "resubmit", "none"]

RESERVED_OPTIONS = frozenset(
    """
    array chdir dependency error export-file help job-name kill-on-invalid-dep nodes no-requeue ntasks
    ntasks-per-node open-mode output parsable requeue signal test-only usage version wait wrap
    """.split()
)
"""sbatch options that a site may not set: those that define a job, and those that stopping and continuing need."""

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})|(\d{1,4}):(\d{2}):(\d{2})")


class Site(Strict):
    """What every job at one site needs; the fields without a default value in the file are left to Slurm."""

    name: str = Field("site", pattern=NAME)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_syntax: GpuSyntax = Field(
        "none",
        description="How this site wants GPUs asked for: --gres=gpu:N (gres), --gres=gpu:TYPE:N (typed), "
        "--gpus-per-node=N (gpus_per_node), or not at all (none).",
    )
    gpus_per_node: int | None = Field(None, ge=1)
    gpu_type: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cpus_per_task: int | None = Field(None, ge=1)
    mem: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Memory per node, such as 32G.")
    time: str | None = Field(None, description="Wall time of a job that states none, HH:MM:SS.")
    time_max: str | None = Field(None, description="The longest that this site takes.")
    modules: tuple[str, ...] = Field((), description="Names for `module load`, in this order.")
    setup: tuple[str, ...] = Field((), description="Lines of shell, run before Python, such as conda's.")
    variables: dict[str, str] = Field(default_factory=dict, description="Exported to every process.")
    scratch: str | None = Field(
        None,
        description="Shared folder for runs and logs; $USER and such are expanded where jobs are sent from.",
    )
    node_local: str | None = Field(
        None,
        description="Folder on a node's own disk; $SLURM_JOB_ID, $USER and such are expanded on the node.",
    )
    group: str | None = Field(
        None, pattern=r"^[a-z_][a-z0-9_-]*$", description="Unix group that may read runs and shards."
    )
    interface: str | None = Field(
        None, pattern=r"^[A-Za-z0-9^=][A-Za-z0-9._,^=-]*$", description="Network interface for NCCL and gloo."
    )
    container: str | None = Field(None, description="Apptainer image that Python runs in.")
    continue_by: ContinueBy = "requeue"
    max_restarts: int = Field(20, ge=0)
    engine: Literal["ray", "srun"] | None = None
    mail: str | None = Field(None, pattern=r"^[^\s@]+@[^\s@]+$", description="Told when a job ends or fails.")
    extra: tuple[str, ...] = Field((), description="Further options of sbatch, such as --reservation=course.")

    @field_validator("time", "time_max", mode="before")
    @classmethod
    def _times_are_text(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 12:00:00 as 43200
            raise ValueError("write it in quotes, such as '12:00:00'")
        if isinstance(value, str):
            seconds(value)
        return value

    @field_validator("variables", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, inner in value.items():
            if isinstance(inner, bool) or inner is None:
                raise ValueError(f"the value of {name} is {inner!r}: write the text in quotes")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return {
            name: str(inner) if isinstance(inner, int | float) else inner for name, inner in value.items()
        }

    @field_validator("extra")
    @classmethod
    def _options_are_not_reserved(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = re.match(r"--([a-z][a-z-]*)(=|$)", option)
            if name is None:
                raise ValueError(f"{option!r} is no option of sbatch: write --name=value")
            if name[1] in RESERVED_OPTIONS:
                raise ValueError(f"{option!r} is set by vaedist for each job: leave it out")
        return value

    @model_validator(mode="after")
    def _one_line_each(self) -> Site:
        """A line break in a value would end its line in the batch script and begin one of its own."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            texts = value.values() if isinstance(value, dict) else value
            for text in texts if isinstance(value, dict | tuple) else (value,):
                check_text(text, name)
        return self

    @model_validator(mode="after")
    def _gpus_fit_the_syntax(self) -> Site:
        if self.gpu_syntax == "none":
            if self.gpus_per_node is not None or self.gpu_type is not None:
                raise ValueError("gpu_syntax: none asks for no GPU: set gres, typed or gpus_per_node")
        elif self.gpus_per_node is None:
            raise ValueError(f"gpu_syntax: {self.gpu_syntax} needs gpus_per_node, the number of GPUs")
        if self.gpu_syntax == "typed" and self.gpu_type is None:
            raise ValueError("gpu_syntax: typed needs gpu_type, such as a100")
        if (
            self.time is not None
            and self.time_max is not None
            and seconds(self.time) > seconds(self.time_max)
        ):
            raise ValueError(f"time: {self.time} is longer than time_max: {self.time_max}")
        return self

    @model_validator(mode="after")
    def _a_container_has_no_sbatch(self) -> Site:
        if self.container is not None and self.continue_by == "resubmit":
            raise ValueError("container: sbatch is out of reach in it: set continue_by to requeue or none")
        return self

    def options(self, *, time: str | None = None) -> list[tuple[str, str]]:
        """Name and value of the sbatch options that this site wants; an option without a value has "".

        Args:
            time: Wall time of this job, HH:MM:SS; default: the site's.

        Raises:
            UserError: `time` is longer than the site takes.
        """
        options = [(name, getattr(self, name)) for name in ("partition", "account", "qos", "constraint")]
        options += self.gpu_options()
        options += [
            ("cpus-per-task", self.cpus_per_task),
            ("mem", self.mem),
            ("time", self.checked_time(time)),
        ]
        options += [("mail-user", self.mail), ("mail-type", self.mail and "END,FAIL")]
        for option in self.extra:
            name, _, value = option.removeprefix("--").partition("=")
            options.append((name, value))
        return [(name, str(value)) for name, value in options if value is not None]

    def gpu_options(self) -> list[tuple[str, str]]:
        """The option that asks for GPUs, or none."""
        count = self.gpus_per_node
        if self.gpu_syntax == "none":
            return []
        if self.gpu_syntax == "gpus_per_node":
            return [("gpus-per-node", f"{self.gpu_type}:{count}" if self.gpu_type else str(count))]
        kind = f"{self.gpu_type}:" if self.gpu_syntax == "typed" else ""
        return [("gres", f"gpu:{kind}{count}")]

    def checked_time(self, time: str | None) -> str | None:
        """`time`, or the site's.

        Raises:
            UserError: it is no time, or longer than the site takes.
        """
        if time is None:
            return self.time
        try:
            asked = seconds(time)
        except ValueError as error:
            raise UserError(f"--time: {error}") from None
        if self.time_max is not None and asked > seconds(self.time_max):
            raise UserError(
                f"--time {time} is longer than site {self.name} takes: give {self.time_max} or less; a job that runs "
                "out of time saves and goes on"
            )
        return time

    def node_local_folder(self, environment: Mapping[str, str] | None = None) -> str | None:
        """`node_local` with the variables of the node's environment in place.

        Args:
            environment: default: this process's.

        Raises:
            UserError: a variable in it is not set there.
        """
        if self.node_local is None:
            return None
        known = os.environ if environment is None else environment

        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in known:
                raise UserError(
                    f"node_local of site {self.name} is {self.node_local!r}, but ${name} is not set on this node: "
                    "name the folder otherwise, or leave node_local out"
                )
            return known[name]

        return re.sub(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", value, self.node_local)


def seconds(time: str) -> int:
    """Seconds in `HH:MM:SS` or `D-HH:MM:SS`.

    Raises:
        ValueError: it is neither.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is not a time: write HH:MM:SS, such as 04:00:00, or D-HH:MM:SS")
    days, *parts = [int(part or 0) for part in match.groups()]
    hours, minutes, rest = parts[:3] if match[2] is not None else parts[3:]
    if minutes > 59 or rest > 59 or days * 86400 + hours * 3600 + minutes * 60 + rest == 0:
        raise ValueError(f"{time!r} is not a time: write HH:MM:SS, such as 04:00:00, or D-HH:MM:SS")
    return days * 86400 + hours * 3600 + minutes * 60 + rest


def check_text(value: object, what: str) -> None:
    """Refuse what cannot stand in one line of a batch script, however it is quoted.

    Raises:
        ValueError: a line break or another control character is in it.
    """
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", value):
        raise ValueError(f"{what}: {value!r} has a line break or another control character in it: remove it")


def load_site(path: str | Path, overrides: Sequence[str] = ()) -> Site:
    """Read and check a site file; overrides are `key=value`.

    Raises:
        UserError: one sentence about the first mistakes.
    """
    content = apply_overrides(read_yaml(path), overrides)
    content.setdefault("name", _plain(Path(path).stem))
    return parse(Site, content, where=str(path))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-._") or "site"
