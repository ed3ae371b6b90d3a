"""Ray Train: the same digits, a killed worker, errors by name, a cluster too small, and stopping the driver."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.run_commands import ROOT, Training, curve, held, last_step, small_job, train, write_job
from vaedist.config.job import Job
from vaedist.config.model_section import kind_module, kinds
from vaedist.config.settings import parse
from vaedist.core.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from vaedist.launchers.ray.cluster import free_cpus
from vaedist.train import main

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    # ray.data, which ray.train loads, sets options of its own that it calls deprecated.
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]
STEPS = 40


def ray_train(job: Path, run: Path, *arguments: str) -> int:
    """The door, in this process, whose Ray it then uses."""
    return main([str(job), "--run-dir", str(run), "--engine", "ray", "--device", "cpu", *arguments])


class Later(threading.Thread):
    """Does something once a run has reached a step."""

    def __init__(self, run: Path, step: int, act: object) -> None:
        super().__init__(daemon=True)
        self._run, self._step, self._act = run, step, act
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while last_step(self._run) < self._step and time.monotonic() < deadline:
            time.sleep(0.02)
        self._act()  # type: ignore[operator]


@pytest.fixture(scope="module")
def whole(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of two local processes."""
    folder = tmp_path_factory.mktemp("whole")
    job = write_job(folder / "job.yaml", small_job(phantom, "vqvae", steps=STEPS))
    code, _, err = train(job, folder / "run", "--workers", "2", "-q")
    assert (code, err) == (0, "")
    return folder / "run"


@pytest.mark.usefixtures("ray_cluster")
def test_the_curve_is_that_of_the_local_engine(
    whole: Path, phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=STEPS))
    assert ray_train(job, tmp_path / "run", "--workers", "2") == 0
    out, err = capfd.readouterr()
    assert curve(tmp_path / "run") == curve(whole)
    assert err == ""
    assert "2 x cpu" in out
    assert out.count(f"step {STEPS}/{STEPS}") == 1
    assert f"finished after {STEPS} steps" in out
    assert not (tmp_path / "run" / ".ray").exists()
    assert not (tmp_path / "run" / "lock").exists()


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "RayTrainWorker" in command:
            found.append(process)
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    return [process for process in found if process.pid in ours]


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_goes_on_from_the_last_checkpoint(whole: Path, phantom: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=STEPS))
    killed: list[int] = []

    def kill_one() -> None:
        victim = workers()[-1]
        killed.append(victim.pid)
        victim.kill()

    Later(tmp_path / "run", 8, kill_one)
    assert ray_train(job, tmp_path / "run", "--workers", "2", "-q") == 0
    assert len(killed) == 1
    assert curve(tmp_path / "run") == curve(whole)


@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_to_the_driver_saves_and_another_engine_goes_on(
    whole: Path, phantom: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=STEPS))
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        with held(*workers()):
            os.kill(os.getpid(), signal.SIGTERM)
            while not (run / "stop").exists():
                time.sleep(0.02)

    Later(run, 6, stop)
    assert ray_train(job, run, "--workers", "2", "-q") == EXIT_STOPPED
    assert signal.getsignal(signal.SIGTERM) is before
    stopped_at = last_step(run)
    assert 6 <= stopped_at < STEPS
    code, _, err = train(job, run, "--workers", "2", "-q")
    assert (code, err) == (0, "")
    assert curve(run) == curve(whole)


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_ctrl_c_leaves_nothing_at_work(
    phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=100_000))
    run = tmp_path / "run"
    ranks: list[psutil.Process] = []

    def interrupt() -> None:
        ranks.extend(workers())
        for one in ranks:
            one.suspend()  # or they would save and leave at the first
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    Later(run, 3, interrupt)
    assert ray_train(job, run, "--workers", "2", "-q") == EXIT_INTERRUPTED
    assert capfd.readouterr().err == "vaedist-train: interrupted\n"
    # A thread that waits for Ray when Ray is shut down ends the process, or starts a second Ray.
    assert "ray-train" not in [one.name for one in threading.enumerate()]
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, 20)[1]
    assert not (run / ".ray").exists()
    # Nor are its places kept from the next run, on a cluster that goes on.
    deadline = time.monotonic() + 20
    while free_cpus() < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_cpus() == 4


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_worker_is_its_one_sentence(
    phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = small_job(phantom, steps=4, monitor={"metric": "los"}, validate_every=2)
    path = write_job(tmp_path / "job.yaml", job)
    assert ray_train(path, tmp_path / "run", "--workers", "2", "-q") == UserError.exit_code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "unknown metric 'los'" in err


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", "7"], "7 workers need 7 CPUs, but Ray has 4 here: start at most 4"),
        (["--workers", "5:8"], "5 workers need 5 CPUs, but Ray has 4 here"),
        (["--workers", "2", "--cpus-per-worker", "3"], "2 workers with 3 CPUs each need 6 CPUs"),
        (["--workers", "2", "--gpus-per-worker", "1"], "--gpus-per-worker 1 has no effect with --device cpu"),
        (["--workers", "2", "--device", "cuda"], "Ray sees no GPU here"),
        (["--workers", "2", "--device", "auto", "--gpus-per-worker", "1"], "Ray sees no GPU here"),
    ],
)
def test_what_can_never_start_is_refused_at_once(
    arguments: list[str], told: str, phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    assert ray_train(job, tmp_path / "run", *arguments) == UserError.exit_code
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert told in err


BODY = {"kind": "conv", "width": 8, "depth": 0, "downsample": 4}
KINDS: dict[str, dict[str, Any]] = {
    "vae": {"encoder": BODY, "latent": 4},
    "infovae": {"encoder": BODY, "latent": 4, "mmd_weight": 50.0},
    "vqvae": {"encoder": BODY, "codebook": {"kind": "ema", "codes": 8, "dim": 3}},
    "gan": {"generator": BODY, "discriminator": BODY, "latent": 4, "r1_every": 2},
    "vaegan": {"encoder": BODY, "discriminator": BODY, "latent": 4},
    "pixelcnn": {"net": {"width": 8, "layers": 2, "hidden": 8}},
    "transformer": {"net": {"width": 16, "layers": 1, "heads": 2}},
}


def job_of(kind: str, data: Path, tokenizer: str = "", **train: Any) -> Job:
    """Two steps of a variant."""
    model = kind_module(kind).Model
    settings: dict[str, Any] = {
        "steps": 2,
        "batch_size": 8,
        "threads": 1,
        "log_every": 1,
        "validate_every": 2,
    }
    settings["optim"] = {phase: {"learning_rate": 1e-3} for phase in model.phases}
    if model.adversarial_terms:  # they are judged by their samples
        settings["monitor"] = {"metric": "kid", "images": 16}
    section = {"kind": kind, **KINDS[kind]} | ({"tokenizer": tokenizer} if model.reads == "codes" else {})
    content = {"name": kind, "data": {"path": str(data)}, "model": section}
    return parse(Job, {**content, "train": settings | train}, where="the test's job")


@pytest.fixture(scope="module")
def tokenizer(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run for the priors to build on, trained by one process."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert (
        main(
            [
                str(write_job(folder / "job.yaml", job_of("vqvae", phantom))),
                "--run-dir",
                str(folder / "run"),
                "-q",
            ]
        )
        == 0
    )
    return str(folder / "run")


def test_every_variant_is_in_the_table() -> None:
    assert set(KINDS) == set(kinds())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_trains_with_two_workers(
    kind: str, phantom: Path, tmp_path: Path, tokenizer: str
) -> None:
    """Its numbers are those of two local processes."""
    job = job_of(kind, phantom, tokenizer)
    path = write_job(tmp_path / "job.yaml", job)
    assert ray_train(path, tmp_path / "run", "--workers", "2", "-q") == 0
    code, _, err = train(path, tmp_path / "local", "--workers", "2", "-q")
    assert (code, err) == (0, "")
    assert last_step(tmp_path / "run") == 2
    assert curve(tmp_path / "run") == curve(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        (["--workers", "1"], {"precision": "bf16"}, "1 x cpu, 4 threads each, bf16"),
        (["--workers", "1", "--cpus-per-worker", "3"], {}, "1 x cpu, 3 threads each, fp32"),
        (["--workers", "1:2"], {}, "2 x cpu, 2 threads each, fp32"),
    ],
)
def test_threads_follow_the_cluster(
    arguments: list[str],
    settings: dict[str, Any],
    told: str,
    phantom: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With mixed precision, CPUs asked for, and as many workers as there is room for."""
    job = write_job(tmp_path / "job.yaml", job_of("vae", phantom, threads=None, **settings))
    assert ray_train(job, tmp_path / "run", *arguments) == 0
    out, err = capfd.readouterr()
    assert told in out
    assert err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_bodies_train_in_a_worker(
    phantom: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "job.yaml", job_of("vae", phantom, compile=True))
    assert ray_train(job, tmp_path / "run", "--workers", "1") == 0
    assert "compile encoder, decoder" in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
def test_a_private_cluster_starts_stops_and_leaves_nothing(phantom: Path, tmp_path: Path) -> None:
    """The door in a process of its own: its token, its temporary folder, SIGTERM, and what is left after it."""
    job = write_job(tmp_path / "job.yaml", small_job(phantom, "vqvae", steps=2000, validate_every=500))
    short = Path("/tmp") / f"vd-test-{os.getpid()}"
    short.mkdir(mode=0o700)
    stranger = {"RAY_ADDRESS": "192.0.2.1:6379", "RAY_AUTH_TOKEN": "not ours", "TMPDIR": str(short)}
    allocation = {"SLURM_CPUS_ON_NODE": "2", "SLURM_MEM_PER_NODE": "2048"}
    (short / f"vd-{os.getuid()}-stale").mkdir()
    arguments = ("--engine", "ray", "--workers", "2", "--device", "cpu")
    try:
        with Training(job, tmp_path / "run", *arguments, environment=stranger | allocation) as training:
            training.wait_for_step(3)
            (folder,) = short.glob("vd-*")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            token = folder / "token"
            assert stat.S_IMODE(token.stat().st_mode) == 0o600
            everyone = training.everyone()
            assert len(everyone) > 3
            for one in everyone:
                assert token.read_text() not in " ".join(one.cmdline())
                assert token.read_text() not in one.environ().values()
            readable = [
                path
                for path in folder.rglob("*")
                if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077
            ]
            assert not [path for path in readable if token.read_bytes() in path.read_bytes()]
            (raylet,) = (" ".join(one.cmdline()) for one in everyone if one.name() == "raylet")
            assert f"--object_store_memory={128 << 20} " in raylet, "a sixteenth of the allocation's memory"
            assert re.search(r"--static_resource_list=\S*CPU,2,", raylet)
            listening = {
                connection.laddr.ip
                for one in everyone
                for connection in one.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
            loop = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
            assert listening <= loop, "every port is this machine's own"
            training.signal(signal.SIGTERM)
            code, _, err = training.end()
            assert (code, err) == (EXIT_STOPPED, "")
            _, alive = psutil.wait_procs(everyone, timeout=20)
            assert [one.cmdline() for one in alive] == []
        assert list(short.glob("vd-*")) == []
        assert last_step(tmp_path / "run") < 2000
    finally:
        shutil.rmtree(short, ignore_errors=True)


def test_workers_find_this_package_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaedist.launchers.environment import python_path

    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    import vaedist

    home = str(Path(vaedist.__file__).resolve().parents[1])
    assert python_path().split(os.pathsep)[-1] == "/elsewhere"
    assert home in [*python_path().split(os.pathsep), *sys.path]


BUGGY = """
from typing import Literal

from vaedist.models import vae


class Config(vae.Config):
    kind: Literal["buggy_vae"] = "buggy_vae"


class Model(vae.Model):
    def forward(self, batch, ctx):
        if ctx.step == 2:
            forgotten()
        return super().forward(batch, ctx)
"""


@pytest.mark.slow
def test_a_bug_is_shown_with_its_traceback_and_not_tried_again(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "buggy_vae.py").write_text(BUGGY)
    # Every process of the run finds the model, as it would one in vaedist/models.
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import vaedist.models\nvaedist.models.__path__.append({str(tmp_path / 'site')!r})\n"
    )
    job = small_job(phantom, steps=20).model_dump(mode="json")
    job["model"] = {**job["model"], "kind": "buggy_vae"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    arguments = ("--engine", "ray", "--workers", "2", "--device", "cpu", "-q")
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    with Training(
        tmp_path / "job.yaml", tmp_path / "run", *arguments, environment={"PYTHONPATH": paths}
    ) as training:
        code, _, err = training.end()
    assert code == 1
    assert "NameError: name 'forgotten' is not defined" in err and "buggy_vae.py" in err
    assert "starting again" not in err
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())[-1]["start_step"] == 0
