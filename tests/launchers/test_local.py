"""Local processes: one rank's death, errors by name, foreign launchers, stale variables, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.run_commands import ROOT, Training, curve, last_step, small_job, train, write_job
from vaedist.config.job import Job
from vaedist.core.errors import DataError, UserError, WorkerLost
from vaedist.launchers.local import _failure, _Rank
from vaedist.train import main

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job, and its uninterrupted run with two processes."""
    folder = tmp_path_factory.mktemp("two")
    job = write_job(folder / "job.yaml", small_job(phantom, steps=30))
    code, out, err = train(job, folder / "run", "--workers", "2")
    assert (code, err) == (0, "")
    assert out.count("step 1/30") == 1, "only rank 0 talks"
    return job, folder / "run"


def test_a_killed_rank_costs_a_restart_and_no_digit(two: tuple[Path, Path], tmp_path: Path) -> None:
    job, whole = two
    with Training(job, tmp_path / "run", "--workers", "2") as training:
        training.wait_for_step(7)
        first = training.everyone()
        training.signal(signal.SIGKILL, rank=1)
        code, _, err = training.end()
        assert code == 0
        _, alive = psutil.wait_procs(first, timeout=0.1)
        assert alive == []
    assert err.count("\n") == 1
    assert "rank 1 of 2 was killed by SIGKILL" in err
    assert "starting again from there (1 of at most 3 times)" in err
    assert curve(tmp_path / "run") == curve(whole)


DIES = """
import os, signal, sys, time
if os.environ.get("RANK") == "1":
    time.sleep(1)  # the launcher writes to its standard input
    os.closerange(3, 1000)  # the pipe ends, as in a death, and the death follows
    time.sleep({pause})
    {end}
"""


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "rank 1 of 2 was killed by SIGSEGV, a crash in compiled code",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 of 2 was killed by SIGKILL (often the kernel"),
        ("os._exit(7)", "rank 1 of 2 left with exit code 7"),
        ("time.sleep(600)", "rank 1 of 2 closed its pipe without an answer"),
    ],
)
def test_a_rank_that_dies_just_after_its_pipe_has_ended_is_named(
    end: str, told: str, phantom: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES.format(pause=0.5, end=end))
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    arguments = ("--workers", "2", "--max-failures", "0")
    code, _, err = train(job, tmp_path / "run", *arguments, environment={"PYTHONPATH": path})
    assert code == WorkerLost.exit_code, err
    assert err.count("\n") == 1 and told in err
    assert ("the same command continues" in err) == ("SIGSEGV" not in err)


@pytest.mark.parametrize("returncode", [-signal.SIGSEGV, -signal.SIGKILL])
def test_a_death_of_its_own_is_never_taken_for_the_launchers(returncode: int) -> None:
    """The rank dies between the launcher's look at it and the launcher's kill."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
        process.returncode = returncode
        rank = _Rank(0, process, -1, None, pipe_ended=True, killed_by_launcher=True)
        assert rank.died == (returncode == -signal.SIGSEGV)
        error = _failure([rank], 2)
    assert isinstance(error, WorkerLost)
    assert ("SIGSEGV" in str(error)) == rank.died


def test_a_debug_level_that_crashes_torch_is_lowered(phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=3))
    variables = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    code, out, err = train(job, tmp_path / "run", "--workers", "2", environment=variables)
    assert code == 0 and "finished after 3 steps" in out
    told = "vaedist: TORCH_DISTRIBUTED_DEBUG=DETAIL crashes torch's gloo, so the ranks use INFO instead\n"
    assert err == told


def test_torchrun_is_a_launcher_too(two: tuple[Path, Path], tmp_path: Path) -> None:
    job, whole = two
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "vaedist.train", str(job), "--run-dir", str(tmp_path / "run"), "-q"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == curve(whole)


def test_variables_of_an_interactive_allocation_join_nothing(phantom: Path, tmp_path: Path) -> None:
    """As left behind by `srun --pty bash`: without a purposeful RANK this is one process."""
    stale = {
        "SLURM_JOB_ID": "17",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "4",
        "SLURM_NPROCS": "4",
        "SLURM_NNODES": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
    }
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    code, out, err = train(job, tmp_path / "run", environment=stale)
    assert (code, err) == (0, "")
    assert "1 x cpu" in out
    assert last_step(tmp_path / "run") == 2


def test_an_error_in_the_ranks_is_told_once(phantom: Path, tmp_path: Path) -> None:
    job = small_job(phantom, steps=4, monitor={"metric": "los"}, validate_every=2)
    code, _, err = train(write_job(tmp_path / "job.yaml", job), tmp_path / "run", "--workers", "2")
    assert code == UserError.exit_code
    assert err.count("\n") == 1
    assert err.startswith("vaedist-train: error: ")
    assert "unknown metric 'los'" in err
    assert not (tmp_path / "run" / "lock").exists()


def test_damage_seen_by_one_rank_stops_all(phantom: Path, tmp_path: Path) -> None:
    from vaedist.data.format.index import Index

    copy = tmp_path / "shards"
    copy.mkdir()
    for file in phantom.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    split = Index.open(copy).split("train")
    tar = split.shards[0].tar
    columns = split.columns(0)
    content = bytearray(tar.read_bytes())
    content[int(columns.offset[3]) + 60] ^= 1
    tar.write_bytes(content)
    job = write_job(tmp_path / "job.yaml", small_job(copy, steps=20))
    code, _, err = train(job, tmp_path / "run", "--workers", "2")
    assert code == DataError.exit_code
    assert err.count("\n") == 1
    assert columns.keys[3] in err and tar.name in err


def test_a_second_launcher_is_refused_while_the_first_trains(phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=100_000))
    with Training(job, tmp_path / "run", "--workers", "2") as training:
        training.wait_for_step(1)
        code, _, err = train(job, tmp_path / "run", "--workers", "2")
        assert code == UserError.exit_code
        assert f"process {training.process.pid}" in err and err.count("\n") == 1
        assert training.process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus-per-worker", "1"], "--gpus-per-worker has no effect without --engine ray"),
        (["--max-failures", "2"], "--max-failures has no effect on a single process"),
        (["--max-failures", "2", "--workers", "1"], "--max-failures has no effect on a single process"),
        (["--hang-timeout", "9"], "--hang-timeout has no effect on a single process"),
        (["--workers", "1:2"], "--workers MIN:MAX needs --engine ray"),
        (["--cpus-per-worker", "2"], "--cpus-per-worker has no effect without --engine ray"),
    ],
)
def test_an_option_without_effect_is_refused(
    arguments: list[str], told: str, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    assert main([str(job), "--run-dir", str(tmp_path / "run"), *arguments]) == UserError.exit_code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_workers_under_another_launcher_are_refused(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    assert main([str(job), "--run-dir", str(tmp_path / "run"), "--workers", "2"]) == UserError.exit_code
    assert "rank 1 of 2 of another launcher" in capsys.readouterr().err


def test_the_printed_job_is_a_job_file_with_every_default(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vaedist.config.job import load_job

    path = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    assert main([str(path), "train.steps=7", "--print-job"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    job: Job = load_job(tmp_path / "printed.yaml")
    assert job.train.steps == 7
    assert job.data.lanes == 8
    assert job.model.beta == 1.0
    assert main([str(tmp_path / "printed.yaml"), "--print-job"]) == 0
    assert capsys.readouterr().out == printed


def test_the_layer_table_adds_up(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=2))
    assert main([str(path), "--summary", "--run-dir", str(tmp_path / "run")]) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "type", "output", "parameters"]
    counted = sum(int(row.split()[-1].replace(",", "")) for row in rows)
    assert f": {counted:,} parameters" in total
    assert not (tmp_path / "run").exists()


def test_a_new_run_never_continues(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    for _ in range(2):
        assert main([str(path), "--run-dir", str(tmp_path / "run"), "--new-run"]) == 0
    assert f"run folder: {tmp_path / 'run-2'}" in capsys.readouterr().out
    assert curve(tmp_path / "run") == curve(tmp_path / "run-2")


@pytest.mark.parametrize("setting", ["data.path=/nowhere/shards", "model.kind=vqvea", "model.latent=many"])
def test_a_mistake_leaves_no_folder(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    assert main([str(job), setting, "--run-dir", str(tmp_path / "run"), "--workers", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()
