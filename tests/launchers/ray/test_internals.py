"""What is said where Ray lacks a private part that a run needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_commands import ROOT
from vaedist.core.errors import UserError
from vaedist.launchers.ray.internals import SUPPORTED, ControllerThread, make_trainer

pytestmark = [
    pytest.mark.ray,
    # ray.data, which ray.train loads, sets options of its own that it calls deprecated.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]


def test_the_supported_versions_are_those_of_pyproject() -> None:
    wanted = SUPPORTED.replace("ray", "ray[default,train,tune]")
    assert f'"{wanted}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "part",
    [
        "ray.train.v2.api.data_parallel_trainer.TrainController",
        "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer",
        "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._initialize_and_run_controller",
        "ray.train.v2._internal.execution.failure_handling.FailureDecision",
    ],
)
@pytest.mark.usefixtures("ray_cluster")
def test_a_missing_private_part_is_one_sentence(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train.v2.api.data_parallel_trainer  # noqa: F401

    monkeypatch.delattr(part)
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path / "failure.json", print)
    assert part.rpartition(".")[2] in str(caught.value)
    assert SUPPORTED in str(caught.value) and "--engine local" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_that_is_missing_only_when_the_run_starts_is_one_sentence_too() -> None:
    def fit() -> None:
        raise AttributeError("module 'ray.train' has no attribute 'poll'")

    thread = ControllerThread("ray-train", fit)
    thread.start()
    assert thread.wait(60)
    assert isinstance(thread.error, UserError)
    assert "no attribute 'poll'" in str(thread.error) and "--engine local" in str(thread.error)
