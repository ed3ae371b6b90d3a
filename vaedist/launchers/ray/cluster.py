"""A Ray cluster of our own on this machine, or the one that is there; and whether a run can ever fit into it.

Unless Ray is already initialised, a private cluster is started:

- with the CPUs, GPUs and memory of the allocation (`vaedist.launchers.allocation`), not the machine's, and a small
  object store, because images never pass through it;
- with every port on the loopback address, no dashboard, and a token of its own in a 0600 file, never in argv or logs;
- in a short temporary folder, 0700 (unix sockets allow 107 bytes);
- without idle workers started in advance (Ray Train runs in processes of its own), and without the watch over nodes
  that will be taken away;
- without Ray's memory monitor, which looks at the whole node, and kills here when another user has filled it.

A cluster that is merely found (RAY_ADDRESS) is never joined. The private one ends with this process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError
from vaedist.core.temporary_folder import temporary_folder
from vaedist.launchers.allocation import Allocation, allocation
from vaedist.launchers.environment import loopback_interface, python_path, temporary_environment

Resources = Mapping[str, float]
"""What a node offers, by Ray's names: CPU, GPU, memory..."""

RAY_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a job mean the same as everywhere
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # training is what this machine is for; Ray would run it at nice 15
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PRIVATE_RAY_ENV = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}
"""Switches off what a private cluster does not need."""

_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's name for: this node is the loopback address; read when Ray loads."""


@dataclass(frozen=True)
class ResourceRequest:
    """The workers of a run, and what each reserves.

    Attributes:
        least, most: Workers; they differ where the run is elastic.
        cpus: CPUs per worker, and its threads; None: one is reserved, and the workers of a node share its CPUs.
        gpus: 0 or 1 per worker; None: 1 unless `device` is `cpu` or there are no GPUs.
        device: `auto`, `cpu` or `cuda`.
    """

    least: int
    most: int
    cpus: int | None = None
    gpus: int | None = None
    device: str = "auto"

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def reserved_cpus(self) -> int:
        return self.cpus or 1

    def describe(self, gpus: int, workers: int) -> str:
        """For a line on the console.

        Args:
            gpus, workers: As `fit` gave them.
        """
        kind = "one GPU" if gpus else "CPU" if self.reserved_cpus == 1 else f"{self.reserved_cpus} CPUs"
        count = f"{self.least} to {self.most} ({workers} now)" if self.elastic else str(self.least)
        return f"{count} x {kind}"

    def fit(self, nodes: Sequence[Resources], set_by: Mapping[str, str] | None = None) -> tuple[int, int]:
        """GPUs per worker, and how many workers fit on these nodes (`most` at most).

        Args:
            nodes: What each node offers.
            set_by: Who limits a resource, for the message.

        Raises:
            UserError: the cluster can never hold `least` workers; Ray itself would wait for ever.
        """
        cpus, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
        each = self._gpus_per_worker(gpus)
        limits = {name: f" (limited by {by})" for name, by in (set_by or {}).items()}
        has = {
            name: f"but Ray has {n} here{limits.get(name, '')}" for name, n in (("CPU", cpus), ("GPU", gpus))
        }
        workers, need = ("1 worker", "needs") if self.least == 1 else (f"{self.least} workers", "need")
        if self.least * each > gpus:
            raise UserError(
                f"{workers} with one GPU each {need} {self.least} GPUs, {has['GPU']}: start "
                f"at most {gpus} workers, ask the allocation for more, or use --device cpu"
                if gpus
                else f"Ray sees no GPU here{limits.get('GPU', '')}: use --device cpu, or ask the allocation for GPUs"
            )
        if self.least * self.reserved_cpus > cpus:
            each_has = f" with {self.reserved_cpus} CPUs each" if self.reserved_cpus > 1 else ""
            raise UserError(
                f"{workers}{each_has} {need} {self.least * self.reserved_cpus} CPUs, {has['CPU']}: "
                f"start at most {cpus // self.reserved_cpus} workers, or ask the allocation for more"
            )
        room = sum(_workers_on(node, {"CPU": self.reserved_cpus, "GPU": each}) for node in nodes)
        if room < self.least:
            raise UserError(
                f"{workers} with {self.reserved_cpus} CPUs and {each} GPUs each {need} more than these "
                f"{len(nodes)} nodes have: there is room for {room} whole ones; start fewer workers, or lower "
                "--cpus-per-worker"
            )
        return each, min(room, self.most)

    def _gpus_per_worker(self, available: int) -> int:
        if self.device == "cpu":
            if self.gpus:
                raise UserError("--gpus-per-worker 1 has no effect with --device cpu: leave one of them out")
            return 0
        if self.gpus is None:
            return 1 if self.device == "cuda" or available else 0
        if self.device == "cuda" and not self.gpus:
            raise UserError("--device cuda needs a GPU per worker: leave --gpus-per-worker 0 out")
        return self.gpus


def _workers_on(node: Resources, worker: Resources) -> int:
    """Workers that fit on one node."""
    return min(int(node.get(name, 0) // amount) for name, amount in worker.items() if amount)


@dataclass(frozen=True)
class Cluster:
    """Which cluster this process is connected to.

    Attributes:
        private: Whether it was started for this run alone, and ends with it.
        description: For a line on the console.
    """

    private: bool
    description: str


@contextlib.contextmanager
def cluster(request: ResourceRequest | None = None, *, cpus: int | None = None) -> Iterator[Cluster]:
    """Connect to the Ray cluster of a run.

    Where Ray is initialised already, that one; in a Slurm job over several nodes the one that the supervisor started on
    them (VAEDIST_RAY_CLUSTER); else a private one on this machine, which is shut down on exit.

    Args:
        request: What has to fit.
        cpus: Logical CPUs of a private cluster; default: the allocation's.

    Raises:
        UserError: it would be too small; nothing has been started then.
    """
    ray = sys.modules.get("ray")
    # Ray reads some variables once, when it is first loaded; if it is loaded already, it turns tokens on by itself.
    tokens = {} if ray else {"RAY_AUTH_MODE": "token"}
    if ray and ray.is_initialized():
        with temporary_environment(RAY_ENV | {"PYTHONPATH": python_path()}):
            yield Cluster(private=False, description="found")
        return
    if folder := os.environ.get("VAEDIST_RAY_CLUSTER"):
        from vaedist.launchers.ray.nodes import join_cluster

        with join_cluster(Path(folder)) as count:
            yield Cluster(private=True, description=f"on {count} nodes of this job")
        return
    ours = allocation()
    size = {
        "CPU": float(cpus or ours.cpus),
        "GPU": float(_usable_gpus(ours, "auto" if request is None else request.device)),
    }
    if request is not None:
        request.fit([size], {} if cpus else {"CPU": ours.cpus_by, "GPU": ours.gpus_by})
    variables = RAY_ENV | PRIVATE_RAY_ENV | tokens | loopback_interface() | {"PYTHONPATH": python_path()}
    with temporary_environment(variables | _LOOPBACK), contextlib.ExitStack() as exits:
        _start(size, ours, exits)
        yield Cluster(private=True, description="started on this machine")


def _start(size: Resources, ours: Allocation, exits: contextlib.ExitStack) -> None:
    import ray

    # A machine under heavy load can miss Ray's time limit of 30 s, which is fixed: try three times.
    for tries_left in (2, 1, 0):
        folder = exits.enter_context(temporary_folder())
        exits.enter_context(_token(folder))
        exits.callback(ray.shutdown)
        try:
            ray.init(
                address="local",
                num_cpus=int(size["CPU"]),
                num_gpus=int(size["GPU"]),
                object_store_memory=ours.object_store,
                _memory=max(ours.memory - ours.object_store, ours.memory // 2),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "r"),  # Ray opens its own folder to everybody; ours stays 0700
            )
            return
        except Exception as error:  # noqa: BLE001 - Ray raises all kinds, Exception itself too
            exits.close()
            if not tries_left:
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"Ray did not start on this machine ({reason}): look at the machine's load and memory; "
                    "vaedist-train can do without it, with --engine local"
                ) from None


def nodes() -> list[dict[str, float]]:
    """What each living node of the cluster offers."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def current_node() -> str:
    """Ray's name of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def run_on_node(node: str, work: Callable[..., Any], *given: Any) -> None:
    """Have `work` done on a node; whether it was is not waited for, because the node may have gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    remote: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)  # type: ignore[call-overload]
    remote(work).remote(*given)


def free_cpus() -> int:
    """CPUs of the cluster that nobody has reserved."""
    import ray

    return int(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def _usable_gpus(ours: Allocation, device: str) -> int:
    """GPUs of the allocation that this torch can use; torch is only loaded where there may be one."""
    if device == "cpu" or not ours.gpus:
        return 0
    import torch

    return min(ours.gpus, torch.cuda.device_count())


@functools.cache
def _secret() -> str:
    # One per process: Ray caches the first token that it reads.
    return secrets.token_hex(32)


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[None]:
    """A token of the cluster's own, in a file that only this user can read; never in argv, environment or logs."""
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_secret())
    inherited = os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    try:
        with temporary_environment({"RAY_AUTH_TOKEN_PATH": str(path)}):
            yield
    finally:
        if inherited is not None:
            os.environ["RAY_AUTH_TOKEN"] = inherited
