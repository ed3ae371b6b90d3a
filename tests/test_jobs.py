"""Every job file that is shipped loads, builds and trains; every script beside them is one that sbatch takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import pack_phantom
from vaedist.config.job import load_job

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
BASELINES = sorted((ROOT / "jobs" / "baselines").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "jobs").glob("*.sh"))


SHORT = """
    train.steps=2 train.epochs=null train.batch_size=4 train.micro_batch_size=null train.threads=1 data.lanes=null
    train.log_every=1 train.validate_every=2 train.save_every=2
""".split()


def test_there_are_jobs() -> None:
    assert {"vqvae_oasis", "vqvae_phantom", "vae_phantom"} <= {path.stem for path in JOBS}
    assert {path.stem for path in SCRIPTS} == {path.stem for path in JOBS}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray images, as all shipped jobs so far want; of the smallest size that every body divides."""
    return pack_phantom(tmp_path_factory.mktemp("jobs") / "shards", size=32)


def train_two_steps(path: Path, runs: Path) -> Path:
    """The run of a shipped job, shortened; the runs that it builds on are trained first, by their own jobs."""
    from vaedist.distributed.process_group import Group
    from vaedist.runs.fit_options import FitOptions
    from vaedist.training.loop import fit

    def trained(named: str) -> str:
        source = {job.stem: job for job in (*JOBS, *BASELINES)}.get(Path(named).name)
        assert source is not None, f"it builds on {named}, and no job of that name trains it"
        return str(train_two_steps(source, runs))

    settings, job = [], load_job(path)
    if tokenizer := getattr(job.model, "tokenizer", None):
        settings.append(f"model.tokenizer={trained(tokenizer)}")
    if job.init_from is not None:
        section = job.init_from.model_dump(mode="json") | {"run": trained(job.init_from.run)}
        settings.append(f"init_from={json.dumps(section)}")
    run = runs / path.stem
    if not run.exists():
        outcome = fit(
            load_job(path, [*SHORT, *settings]), run, group=Group.join("cpu"), options=FitOptions(quiet=True)
        )
        assert (outcome.status, outcome.step) == ("finished", 2)
        assert all(value == value for value in outcome.metrics.values()), "a metric is not a number"
        assert outcome.metrics
    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("path", [*JOBS, *BASELINES], ids=lambda path: path.stem)
def test_a_job_trains_two_steps(path: Path, tiny: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained with its own model, optimizer and schedules on images of another size; then opened again."""
    import torch

    from vaedist.runs.open_run import open_run

    monkeypatch.setenv("VAEDIST_DATA", str(tiny))
    assert load_job(path).name == path.stem, "the run folder is named after the job"
    threads = torch.get_num_threads()
    try:
        run = open_run(train_two_steps(path, runs))
    finally:
        torch.set_num_threads(threads)
    assert run.step == 2 and sum(parameter.numel() for parameter in run.model.parameters()) > 0


@pytest.mark.parametrize("path", [*JOBS, *BASELINES], ids=lambda path: path.stem)
def test_a_job_says_what_but_not_where(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "a job opens with its cost, its expected number and its command"
    assert str(path.relative_to(ROOT).with_suffix("")) in text, "its command is in it"
    assert not re.search(r"\b(partition|account|gpus?|nodes?|device|engine)\s*:", text)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_has_the_data_and_the_budget_of_the_job_beside_it(path: Path) -> None:
    text = path.read_text()
    for part in ("Cost", "Expected", "Command", "Taken over", "Left out", "Differs"):
        assert f"\n# {part}: " in text, f"what it says about: {part}"
    beside = re.match(r"# .*? beside (jobs/\w+\.yaml)", text)
    assert beside, "its first line names the job that it is to be compared with"
    ours, theirs = load_job(ROOT / beside[1]), load_job(path)
    assert theirs.data == ours.data
    assert theirs.seed == ours.seed, "both are run with the same seeds"
    if ours.train.steps is None or theirs.train.steps is None:
        assert theirs.train.epochs == ours.train.epochs is not None
    else:
        images = ours.train.steps * ours.train.batch_size
        assert theirs.train.steps * theirs.train.batch_size == pytest.approx(images, rel=1e-3)
    tokens = [getattr(job.model, "tokenizer", None) for job in (ours, theirs)]
    assert tokens[0] == tokens[1], "nats per code compare over the same codes only"


def test_the_earlier_infovae_has_the_sizes_that_its_file_tells() -> None:
    """As it is, and as fine as the original was, at 128x128 and at its own 256x256."""
    import torch

    from vaedist.config.job import Spec
    from vaedist.config.model_section import kind_module

    path = ROOT / "jobs" / "baselines" / "earlier_infovae_oasis.yaml"
    (full,) = re.findall(r"^#   (model\.encoder\.patch=.*)$", path.read_text(), re.MULTILINE)

    def weights(size: int, settings: str = "") -> int:
        config = load_job(path, settings.split()).model
        with torch.device("meta"):
            model = kind_module("infovae").Model(config, Spec(1, (size, size)))
        return sum(parameter.numel() for parameter in model.parameters())

    assert [round(count / 1e6) for count in (weights(128), weights(128, full), weights(256, full))] == [
        19,
        76,
        302,
    ]
    # Padding makes the grid before the dense layer 128^2 instead of 126^2, and 4x4 kernels stand where 3x3 were.
    assert weights(256, full) - (128**2 - 126**2) * 64 * 256 == pytest.approx(293_870_881, rel=1e-3)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_one_that_sbatch_takes(path: Path) -> None:
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    code = "\n".join(line.partition(" # ")[0] for line in text.splitlines() if not line.startswith("#"))
    assert "$0" not in code
    assert "BASH_SOURCE" not in code
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--open-mode=append", "--signal=B:USR1@180", "--requeue"} <= set(directives)
    assert not [line for line in directives if re.match(r"--(partition|account|gpus|gres|qos)", line)]
    assert code.index("trap '' USR1") < code.index("cd "), (
        "the signal must not end a script that is still beginning"
    )
    last = code.strip().splitlines()[-1]
    assert last.startswith(f'source "$jobs/start" {path.stem} ')
    assert last.endswith(' "$@"')


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("found_by", ["current folder", "SLURM_SUBMIT_DIR", "installed package"])
def test_without_shards_a_script_prints_the_command_that_makes_them(
    path: Path, found_by: str, tmp_path: Path
) -> None:
    """Run as sbatch runs it: from a copy somewhere else."""
    copy = tmp_path / "slurm_script"
    copy.write_text(path.read_text())
    missing = tmp_path / "no-shards"
    environment = {**os.environ, "VAEDIST_DATA": str(missing)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("SLURM_SUBMIT_DIR", None)
    if found_by == "SLURM_SUBMIT_DIR":
        environment["SLURM_SUBMIT_DIR"] = str(ROOT)
    done = subprocess.run(
        ["bash", copy],
        cwd=ROOT if found_by == "current folder" else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert re.search(rf"^    vaedist-shard \S+ .*--out {re.escape(str(missing))}$", done.stderr, re.MULTILINE)


def test_without_vaedist_a_script_says_so(tmp_path: Path) -> None:
    """By absolute path from a folder that has nothing, and with a Python that has nothing."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPTS[0]],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "vaedist is not installed here" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", SCRIPTS[:1], ids=lambda path: path.stem)
def test_a_script_passes_settings_on_and_trains(path: Path, tiny: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "VAEDIST_DATA": str(tiny)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", path, *SHORT, "--run-dir", tmp_path / "run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "job.yaml").exists()
    assert f"checkpoints  {tmp_path}/run/checkpoints\n" in done.stdout
    assert f"TensorBoard  vaedist-board {tmp_path}/run --port " in done.stdout
