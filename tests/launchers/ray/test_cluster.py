"""Whether a run can ever fit into a cluster, who is to blame for a loss, and what is refused before any Ray starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_commands import ROOT, small_job, write_job
from vaedist.core.errors import UserError
from vaedist.launchers.ray.cluster import ResourceRequest
from vaedist.launchers.ray.driver_log import find_lost_rank
from vaedist.train import build_parser

FOUR = {"CPU": 4.0, "GPU": 0.0, "memory": 1e9}
TWO_GPUS = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "gpus", "room"),
    [
        (ResourceRequest(2, 2), [FOUR], 0, 2),
        (ResourceRequest(1, 8), [FOUR], 0, 4),  # elastic: as many as there is room for
        (ResourceRequest(1, 8, cpus=3), [FOUR, FOUR, TWO_GPUS], 1, 2),  # GPUs are there, so each has one
        (ResourceRequest(1, 8, cpus=3, device="cpu"), [FOUR, FOUR, TWO_GPUS], 0, 4),
        (ResourceRequest(2, 2), [TWO_GPUS], 1, 2),
        (ResourceRequest(2, 2, gpus=0), [TWO_GPUS], 0, 2),
        (ResourceRequest(1, 4, device="cuda"), [TWO_GPUS, TWO_GPUS], 1, 4),
    ],
)
def test_what_fits(resources: ResourceRequest, nodes: list[dict[str, float]], gpus: int, room: int) -> None:
    assert resources.fit(nodes) == (gpus, room)


@pytest.mark.parametrize(
    ("resources", "nodes", "told"),
    [
        (
            ResourceRequest(5, 5),
            [FOUR],
            "5 workers need 5 CPUs, but Ray has 4 here (limited by SLURM_CPUS_ON_NODE): start at",
        ),
        (ResourceRequest(5, 9), [FOUR], "5 workers need 5 CPUs, but Ray has 4 here"),
        (ResourceRequest(2, 2, cpus=3), [FOUR], "2 workers with 3 CPUs each need 6 CPUs, but Ray has 4 here"),
        (
            ResourceRequest(4, 4),
            [TWO_GPUS],
            "4 workers with one GPU each need 4 GPUs, but Ray has 2 here: start at most 2",
        ),
        (ResourceRequest(1, 1, device="cuda"), [FOUR], "Ray sees no GPU here"),
        (ResourceRequest(1, 1, gpus=1), [FOUR], "Ray sees no GPU here"),
        (
            ResourceRequest(1, 1, gpus=1, device="cpu"),
            [TWO_GPUS],
            "--gpus-per-worker 1 has no effect with --device cpu",
        ),
        (ResourceRequest(1, 1, gpus=0, device="cuda"), [TWO_GPUS], "--device cuda needs a GPU per worker"),
        (ResourceRequest(2, 2, cpus=3), [{"CPU": 2.0}] * 3, "there is room for 0"),
        (ResourceRequest(1, 1), [], "1 worker needs 1 CPUs, but Ray has 0 here"),
    ],
)
def test_what_can_never_fit_is_one_sentence(
    resources: ResourceRequest, nodes: list[dict[str, float]], told: str
) -> None:
    limits = {"CPU": "SLURM_CPUS_ON_NODE"} if "limited" in told else None
    with pytest.raises(UserError) as caught:
        resources.fit(nodes, limits)
    assert told in str(caught.value)


def test_the_loss_is_told_and_not_what_it_caused() -> None:
    died = ["WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError", "Exception"]
    hung = ["WorkerHealthCheckTimeoutError", "Exception"]
    caused, named = ["RuntimeError", "Exception"], ["DataError", "UserError", "Exception"]
    assert find_lost_rank({"0": caused, "3": died}, 45) == (3, "died (killed, or out of memory)")
    assert find_lost_rank({"0": caused, "2": hung, "3": died}, 45) == (
        2,
        "gave no sign of life for 45 s and was killed",
    )
    assert find_lost_rank({"0": caused, "1": named}, 45) is None, "it tells of itself"
    assert find_lost_rank({"0": caused, "1": ["NameError", "Exception"]}, 45) is None, (
        "another try would meet it again"
    )
    assert find_lost_rank({"11": caused, "2": caused}, 45) == (2, "failed (RuntimeError)")


# Told at once ---------------------------------------------------------------------------------------------------

ALONE = """
import sys
from vaedist.train import main
code = main(sys.argv[1:])
print(code, "ray" in sys.modules, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", "8"], "8 workers need 8 CPUs, but Ray has 3 here (limited by SLURM_CPUS_ON_NODE)"),
        (["--workers", "4:8"], "4 workers need 4 CPUs, but Ray has 3 here (limited by SLURM_CPUS_ON_NODE)"),
        (["--workers", "1:9"], "--workers 9 is more than train.batch_size=8"),
        (
            ["--workers", "2", "--gpus-per-worker", "1"],
            "Ray sees no GPU here (limited by Slurm, which gave this job none",
        ),
        (["data.path=/nowhere"], "/nowhere"),
    ],
)
def test_a_missing_resource_is_told_before_ray_is_even_loaded(
    arguments: list[str], told: str, phantom: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    # As in a Slurm job of 3 CPUs, on a node that shows all of its own.
    sitecustomize = "import os\nos.sched_getaffinity = lambda pid: set(range(64))\n"
    (tmp_path / "sitecustomize.py").write_text(sitecustomize)
    environment |= {"SLURM_CPUS_ON_NODE": "3", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            str(job),
            "--run-dir",
            str(tmp_path / "run"),
            "--engine",
            "ray",
            *arguments,
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "workers"), [("3", 3), ("1:4", (1, 4)), ("2:2", 2)])
def test_workers_are_a_number_or_a_span(text: str, workers: object) -> None:
    assert build_parser().parse_args(["job", "--workers", text]).workers == workers


@pytest.mark.parametrize("text", ["0", "4:1", "0:2", "1:", ":3", "1:2:3", "a"])
def test_anything_else_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["job", "--workers", text])
    assert repr(text) in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray_cluster")
def test_a_process_is_killed_through_ray_only_while_it_is_the_one_that_was_meant() -> None:
    from vaedist.launchers.ray.cluster import current_node, run_on_node
    from vaedist.launchers.ray.heartbeat import kill_process
    from vaedist.runs.run_lock import process_start_ticks

    with subprocess.Popen(["sleep", "600"]) as process:
        since = process_start_ticks(process.pid)
        assert since is not None
        try:
            assert not kill_process(process.pid, str(int(since) - 1)), "its number was another's before"
            assert process.poll() is None
            run_on_node(current_node(), kill_process, process.pid, since)
            assert process.wait(120) == -signal.SIGKILL
        finally:
            process.kill()
    assert not kill_process(process.pid, since)
