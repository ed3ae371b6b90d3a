"""What a batch job starts, without a Slurm: the layout is a function of the job's variables and the command line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_commands import ROOT, small_job, write_job
from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.launchers.network import gloo_interface, interfaces, node_address
from vaedist.slurm import supervisor
from vaedist.slurm.batch_job import SlurmJob, SlurmTask, expand_counts
from vaedist.slurm.process_layout import ProcessLayout, plan_processes, train_arguments
from vaedist.slurm.requeue import RequeuePolicy
from vaedist.train import build_parser

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_CLUSTER_NAME": "c",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n1",
    "SLURM_JOB_CPUS_PER_NODE": "8,4",
}
ONE = JOB | {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_CPUS_PER_NODE": "8"}


def _command(variables: dict[str, str], *words: str, site: Site | None = None) -> list[str]:
    job = SlurmJob.current(variables)
    assert job is not None
    options = supervisor.build_parser().parse_args(list(words))
    layout = plan_processes(
        job, site or Site(), options, [sys.executable, "-m", f"vaedist.{options.verb}", *options.arguments]
    )
    return layout.command


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    return str(write_job(tmp_path / "job.yaml", small_job(tmp_path, steps=4)))


def test_the_supervisor_parses_the_command_line_as_vaedist_train_does(job_file: str) -> None:
    """Every option; those that make vaedist-train answer instead of train are left to it."""
    values = {
        "--run-dir": "r",
        "--engine": "ray",
        "--workers": "2:4",
        "--device": "cpu",
        "--gpus-per-worker": "0",
        "--print-completion": "bash",
    }
    answering = {"-h", "--help", "--version", "--print-completion", "--print-job", "--summary"}
    for action in build_parser()._actions:
        for option in action.option_strings:
            value = [] if action.nargs == 0 else [values.get(option, "1")]
            parsed = train_arguments([job_file, option, *value])
            assert (parsed is None) == (option in answering), option
    asked = train_arguments([job_file])
    assert asked is not None and asked.engine is None, "the default is not a wish"


@pytest.mark.parametrize("code", [0, 2, 3, 4, 6])
def test_a_final_exit_code_is_not_requeued(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    job = SlurmJob.current(JOB)
    assert job is not None
    with supervisor._Signals() as signals:
        signals.warned = True
        policy = RequeuePolicy(job, "requeue", 20)
        ending = supervisor._Supervisor(job, "train", ProcessLayout([], ""), policy, signals)
        assert ending.finish(code) == code
        assert capsys.readouterr().err == ""
        assert ending.finish(137) == 75, "killed while it saved: the last checkpoint is there"
        assert "requeue" in capsys.readouterr().err


def test_ranks_are_the_gpus_else_the_tasks_else_one(job_file: str) -> None:
    def step(**more: str) -> list[str]:
        return _command(JOB | more, "train", job_file)

    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4"} <= set(step())
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=2"} <= set(step(SLURM_NTASKS_PER_NODE="2"))
    assert "--ntasks=8" in step(SLURM_NTASKS_PER_NODE="2", SLURM_GPUS_ON_NODE="4")
    assert "--ntasks=6" in _command(JOB, "--ranks-per-node=3", "train", job_file)


def test_one_node_needs_no_step_and_one_rank_no_workers(job_file: str) -> None:
    assert _command(ONE, "train", job_file)[:3] == [sys.executable, "-m", "vaedist.train"]
    assert "--workers" not in _command(ONE, "train", job_file)
    several = _command(ONE | {"SLURM_GPUS_ON_NODE": "4"}, "train", job_file)
    assert several[-2:] == ["--workers", "4"] and "local" in several
    elastic = _command(ONE, "train", job_file, "--engine", "ray", "--workers", "1:4")
    assert elastic[-4:] == ["--engine", "ray", "--workers", "1:4"]


def test_the_command_line_wins_over_the_supervisors_option_and_that_over_the_site(job_file: str) -> None:
    site = Site(engine="ray")
    assert "ray" in _command(JOB, "train", job_file, site=site)
    assert _command(JOB, "--engine=srun", "train", job_file, site=site)[0] == "srun"
    assert "ray" in _command(JOB, "--engine=srun", "train", job_file, "--engine=ray")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new-run"], "--run-dir"),
        (["--workers=2"], "--ntasks-per-node"),
        (["--engine=local"], "2 nodes"),
    ],
)
def test_what_does_not_go_together_is_refused(job_file: str, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _command(JOB, "train", job_file, *words)


def test_settings_and_options_reach_the_ranks_whatever_their_order(job_file: str) -> None:
    given = ["--device", "cpu", job_file, "--override", "train.steps=7", "-q", "model.latent=3"]
    command = _command(JOB, "train", *given)
    assert {"train.steps=7", "model.latent=3", "--override", "-q"} <= set(command)
    assert command[command.index("--device") + 1] == "cpu"


def test_a_command_line_with_a_mistake_is_passed_on_unchanged(job_file: str) -> None:
    assert _command(JOB, "train", job_file, "--wokers=2")[-1] == "--wokers=2"


def test_outside_a_job_the_command_simply_runs() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [sys.executable, "-m", "vaedist.slurm.supervisor", "train", "--help"],
        capture_output=True,
        text=True,
        env=outside | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert "usage: vaedist-train" in done.stdout


def test_an_array_task_is_named_as_commands_take_it() -> None:
    job = SlurmJob.current(
        JOB | {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    )
    assert job is not None
    assert (job.number, job.marker) == ("11_3", "c.11_3.2")
    assert SlurmJob.current({}) is None


def test_slurms_short_form_of_numbers() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]


def test_a_task_knows_its_place_and_a_bare_allocation_makes_none() -> None:
    step = JOB | {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "5",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "3,2",
    }
    task = SlurmTask.current(step)
    assert (task.rank, task.world, task.local_rank, task.local_world, task.nodes) == (3, 5, 0, 2, 2)
    assert task.name == "12.0.0"
    with pytest.raises(UserError, match="put srun before the command"):
        SlurmTask.current(JOB)


def test_an_address_counts_only_if_this_machine_has_it() -> None:
    ours = {name: address for name, address in interfaces().items() if not address.startswith("127.")}
    if not ours:
        with pytest.raises(UserError, match="interface"):
            node_address({})
        return
    name, address = next(iter(ours.items()))
    assert node_address({"GLOO_SOCKET_IFNAME": name}) == address
    assert node_address({"NCCL_SOCKET_IFNAME": f"none0,{name}"}) == address
    assert node_address({"SLURMD_NODENAME": address}) == address
    assert node_address({"SLURM_LAUNCH_NODE_IPADDR": address}) in ours.values()
    assert gloo_interface(address, {}) == {"GLOO_SOCKET_IFNAME": name}
    assert gloo_interface(address, {"GLOO_SOCKET_IFNAME": f"none0,{name}"}) == {}
    assert gloo_interface(address, {"GLOO_SOCKET_IFNAME": "lo"}) == {"GLOO_SOCKET_IFNAME": name}


def test_the_loopback_address_is_known_to_be_one() -> None:
    assert interfaces()["lo"] == "127.0.0.1"
    assert socket.gethostbyname("localhost").startswith("127.")
