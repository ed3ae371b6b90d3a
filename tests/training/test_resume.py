"""Resume is the same command: a run that was killed or stopped goes on digit for digit, with 1, 2 and 4 processes.

Two ranks alone would hide an error here: a sum of two numbers does not depend on its order, so DDP's change of
buckets after the first backward first shows with three.
"""

from __future__ import annotations

import secrets
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.run_commands import Training, curve, held, last_step, small_job, train, write_job
from vaedist.core.errors import EXIT_STOPPED, WorkerLost

pytestmark = pytest.mark.timeout(1200)  # several runs in a row, each of which loads torch in every rank

STEPS = 60
WORLDS = [1, 2, pytest.param(4, marks=pytest.mark.slow)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Model, average and optimizer of the last checkpoint, flat."""
    found = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = torch.load(found / "state.pt", weights_only=True)
    flat: dict[str, torch.Tensor] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")

    walk({key: state[key] for key in ("model", "ema", "optim")}, "")
    assert len(flat) > 100
    return flat


def random_step(after: int) -> int:
    return after + 1 + secrets.randbelow(8)


@pytest.mark.parametrize("world", WORLDS)
def test_an_interrupted_run_equals_the_uninterrupted_one(world: int, phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=STEPS))
    several = ("--workers", str(world)) if world > 1 else ()
    code, _, err = train(job, tmp_path / "whole", *several)
    assert (code, err) == (0, "")
    whole, cut = curve(tmp_path / "whole"), tmp_path / "cut"

    # Killed at once: one rank where there are several.
    once = ("--max-failures", "0") if world > 1 else ()
    with Training(job, cut, *several, *once) as training:
        training.wait_for_step(random_step(after=5))
        training.signal(signal.SIGKILL, rank=world - 1)
        code, _, err = training.end()
    if world > 1:
        assert code == WorkerLost.exit_code
        assert err.count("\n") == 1
        assert f"rank {world - 1} of {world} was killed by SIGKILL" in err
    else:
        assert code == -signal.SIGKILL
    killed_at = last_step(cut)
    assert 5 < killed_at < STEPS

    # Asked to stop, each time in another way; every rank saves the same step and the exit code is the documented one.
    def sigterm_to_the_last_rank(training: Training) -> None:
        training.signal(signal.SIGTERM, rank=world - 1)

    def ctrl_c(training: Training) -> None:
        training.signal(signal.SIGINT)

    def stop_file(training: Training) -> None:
        with held(training.rank(0)):
            (training.run / "stop").write_text("any\n")

    ways = {1: [sigterm_to_the_last_rank, ctrl_c], 2: [sigterm_to_the_last_rank, stop_file]}
    for way in ways.get(world, [sigterm_to_the_last_rank]):
        before = last_step(cut)
        with Training(job, cut, *several) as training:
            # Rows beyond the checkpoint are cut first: wait for new ones.
            training.wait_until(lambda before=before: last_step(cut) != before, 240, "begin")  # type: ignore[misc]
            training.wait_for_step(random_step(after=last_step(cut)))
            way(training)
            code, out, err = training.end()
        assert (code, err) == (EXIT_STOPPED, ""), way.__name__
        assert "checkpoint saved, the same command continues" in out
        saved = sorted((cut / "checkpoints").glob("step-*"))[-1]
        assert not (cut / "stop").exists(), "an obeyed stop file stops no later attempt"
        assert int(saved.name.removeprefix("step-")) == last_step(cut), "a stop saves its own step"

    code, _, err = train(job, cut, *several)
    assert (code, err) == (0, "")
    assert curve(cut) == whole, f"killed at step {killed_at}"
    one, other = weights(tmp_path / "whole"), weights(cut)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    # A finished run says so.
    code, out, err = train(job, cut, *several)
    assert (code, err) == (0, "")
    assert "nothing left to do" in out and f"step {STEPS}" in out
    assert curve(cut) == whole


def test_a_killed_launcher_leaves_no_process_and_no_lock_in_the_way(phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=STEPS))
    run = tmp_path / "run"
    with Training(job, run, "--workers", "2") as training:
        training.wait_for_step(6)
        everyone = training.everyone()
        assert len(everyone) == 3
        training.signal(signal.SIGKILL)
        training.end()
        _, alive = psutil.wait_procs(everyone, timeout=5)
        assert alive == []
    assert (run / "lock").exists()
    code, _, err = train(job, run)  # with one process this time: a run is not tied to its engine
    assert (code, err) == (0, "")
    assert [row["step"] for row in curve(run) if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert not (run / "lock").exists()


def test_a_signal_before_the_first_step_saves_and_leaves(phantom: Path, tmp_path: Path) -> None:
    """The launcher hears it while the ranks are still loading torch."""
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=STEPS))
    with Training(job, tmp_path / "run", "--workers", "2") as training:
        training.wait_until(lambda: len(training.everyone()) == 3, 240, "start its ranks")
        training.signal(signal.SIGUSR1)
        code, _, err = training.end()
    assert (code, err) == (EXIT_STOPPED, "")
    assert last_step(tmp_path / "run") < STEPS
