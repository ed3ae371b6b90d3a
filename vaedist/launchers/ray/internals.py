"""The private parts of Ray that a run needs; another version of Ray may lack them, so pyproject.toml caps it.

Ray Train's public API has no way to say which failures are tried again, nor to end a run from the driver. Both are
needed: an error that a worker can name, or a bug, would fail again in the same way; and a run that is left early (a
second Ctrl-C) must not keep its workers.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vaedist.core.errors import UserError

SUPPORTED = "ray>=2.57,<2.61"
"""As in pyproject.toml."""


@contextlib.contextmanager
def supported_ray() -> Iterator[None]:
    """Around everything that uses private parts of Ray.

    Raises:
        UserError: this version of Ray lacks one.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"Ray {version('ray')} lacks a part that vaedist needs ({error}): install '{SUPPORTED}'; vaedist-train can "
            "do without Ray, with --engine local"
        ) from error


def make_trainer(failure_file: Path, train_function: Any, **settings: Any) -> Any:
    """Ray's DataParallelTrainer, which raises instead of trying again once `failure_file` exists.

    Its attribute `controller` is the running controller (None before `fit`), an actor with `abort`.

    Args:
        failure_file: Written by a worker.
        train_function: What each worker runs.
        settings: Of DataParallelTrainer.

    Raises:
        UserError: this version of Ray lacks a private part.
    """
    import ray

    with supported_ray():
        from ray.train.v2._internal.execution.failure_handling import FailureDecision
        from ray.train.v2.api import data_parallel_trainer

        module: Any = data_parallel_trainer
        controller_class = module.TrainController
        environment, warning = (
            module.get_env_vars_to_propagate,
            module.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        )
        _ = module.DataParallelTrainer._initialize_and_run_controller, FailureDecision.RAISE

    class Trainer(data_parallel_trainer.DataParallelTrainer):
        controller: Any = None

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            """As Ray's own, but with our policy, and the controller is kept."""
            if "failure_policy" not in settings:
                raise AttributeError("its controller takes no failure_policy")
            settings["failure_policy"] = _policy(settings["failure_policy"], failure_file)
            here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
            variables = {**environment(), warning: "0"}
            remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": variables})
            self.controller = remote(controller_class).remote(**settings)
            ray.get(self.controller.run.remote())
            return ray.get(self.controller.get_result.remote())

    return Trainer(train_function, **settings)


def _policy(of_ray: Any, failure_file: Path) -> Any:
    """Ray's own policy, but for an error that was written to `failure_file`: every try would meet it again."""
    path = str(failure_file)

    # Made inside a function, so that it is pickled as a whole: on other people's clusters Ray's controller cannot
    # import this package.
    class Policy(type(of_ray)):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            from ray.train.v2._internal.execution.failure_handling import FailureDecision

            if os.path.exists(path):
                return FailureDecision.RAISE
            return super().make_decision(training_failed_error)

    return Policy(of_ray.failure_config)


class ControllerThread(threading.Thread):
    """Runs Ray's controller (`fit`), so that the main thread stays free for signals and the console.

    Attributes:
        result: What it returned.
        error: What it raised.
    """

    def __init__(self, name: str, fit: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._fit = fit
        self._over = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with supported_ray():
                self.result = self._fit()
        except Exception as error:  # noqa: BLE001 - for the main thread
            self.error = error
        finally:
            self._over.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is over, after at most so long; unlike `join`, also when Ctrl-C interrupts it (CPython 3.11)."""
        return self._over.wait(seconds)
