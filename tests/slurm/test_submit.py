"""Submitting without Slurm, the launch folder, and the view of what has become of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import submitit

from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.slurm import launch_record, logs
from vaedist.slurm.chain import Stage, Task
from vaedist.slurm.launch_config import LaunchConfig
from vaedist.slurm.launch_record import LaunchedTask
from vaedist.slurm.local_run import run_locally
from vaedist.slurm.status import (
    SlurmQueue,
    TaskStatus,
    cancel_launch,
    has_ended,
    launch_status,
    parse_scontrol,
    status_table,
)
from vaedist.slurm.submit import scripts_to_submit, submit_stages
from vaedist.slurm.submitit_executor import PRIVATE_METHODS, ScriptExecutor, sbatch_command

ROOT = Path(__file__).resolve().parents[2]
MISSING = Task("shard", ("shard", "no-such-folder", "--out", "shards"))
PHANTOM = Task("shard", ("shard", "phantom", "--size", "16", "--count", "train=8", "--out", "shards"))


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchConfig:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = launch_record.unused_folder(tmp_path / "launches", "demo")
    launch_record.create_folder(folder)
    (folder / "site.yaml").write_text("name: here\n")
    return LaunchConfig(folder, Site(name="here"), python_folder=Path(sys.executable).parent)


def launched(folder: Path, **changes: object) -> LaunchedTask:
    log = str(folder / "train-7.log")
    plain = LaunchedTask(
        "train", "demo", "7", "slurm", ("train", "x"), None, log, None, f"vaedist:{folder}", 0.0
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def status(*tasks: LaunchedTask) -> list[TaskStatus]:
    return launch_status(tasks, SlurmQueue(tasks))


# Without Slurm ----------------------------------------------------------------------------------------------


def test_a_chain_runs_locally_and_a_failed_stage_keeps_later_ones_from_running(
    launch: LaunchConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    verify = Task("verify", ("shard", "shards", "--verify"))
    good = [Stage("shard", (PHANTOM,)), Stage("evaluate", (verify,), "shard")]
    assert run_locally(good, launch, said.append) == 0
    assert [line.split(" after ")[0] for line in said if "log" not in line] == [
        "shard: finished",
        "evaluate: finished",
    ]
    assert (
        "every byte and image is as it was packed"
        in Path(launch_record.read(launch.folder)[1].log).read_text()
    )
    tasks = launch_record.read(launch.folder)
    assert [row.job.state for row in status(*tasks)] == ["COMPLETED", "COMPLETED"]
    assert not SlurmQueue(tasks).silent

    said.clear()
    bad = [
        Stage("shard", (MISSING,)),
        Stage("train", (verify, verify), "shard"),
        Stage("sample", (verify, verify), "train"),
    ]
    assert run_locally(bad, launch, said.append) == 2
    assert said[1].startswith("shard: failed with exit code 2")
    assert [line for line in said if "not run, because" in line] == [
        "train verify: not run, because shard did not finish",
        "train verify: not run, because shard did not finish",
        "sample verify: not run, because train did not finish",
        "sample verify: not run, because train did not finish",
    ]
    row = status(*launch_record.read(launch.folder))[-1]
    assert row.job.state == "FAILED"
    assert row.note.startswith("exit code 2: vaedist-shard: error: no-such-folder does not exist")


def test_a_local_launch_is_cancelled_with_all_its_processes(launch: LaunchConfig) -> None:
    """The launcher, submitit's two processes and the script's own: none is left."""
    script = (
        "import sys; from pathlib import Path; from vaedist.slurm.local_run import *\n"
        "from vaedist.config.site import *\n"
        "from vaedist.slurm.chain import Stage, Task; folder = Path(sys.argv[1])\n"
        "site = Site(setup=('echo begun', 'exec sleep 61.25'))\n"
        "launch = LaunchConfig(folder, site)\n"
        "sys.exit(run_locally([Stage('shard', (Task('x', ('shard', 'x')),))], launch, print))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(launch.folder)]) as process:
        log = launch.folder / "shard-0.log"
        for _ in range(600):
            if log.exists() and log.read_text():
                break
            time.sleep(0.1)
        tasks = launch_record.read(launch.folder)
        assert status(*tasks)[0].job.state == "RUNNING"
        said: list[str] = []
        cancel_launch(tasks, said.append)
        assert said == [f"cancelled: {tasks[0].job}"]
        assert process.wait(timeout=60) == 128 + 15
    assert status(*tasks)[0].job.state == "FAILED"
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"61.25" in _content(path)]
    assert left == []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# What is submitted ------------------------------------------------------------------------------------------


def test_without_sbatch_the_error_names_local(launch: LaunchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="login node, or add --local"):
        submit_stages([Stage("shard", (PHANTOM,))], launch, print)
    assert ScriptExecutor.affinity() == -1


def test_sbatch_does_not_get_variables_of_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "VAEDIST")):
            monkeypatch.delenv(name)
    assert sbatch_command() == ["sbatch"]
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("VAEDIST_SITE", "/other.yaml")
    monkeypatch.setenv("VAEDIST_SETUP", "true")
    unset = ["SBATCH_PARTITION", "SLURM_MEM_PER_CPU", "VAEDIST_SETUP", "VAEDIST_SITE"]
    assert sbatch_command() == ["env", *(word for name in unset for word in ("-u", name)), "sbatch"]


def test_stages_wait_for_success_and_end_with_failure(launch: LaunchConfig) -> None:
    verify = Task("verify", ("shard", "shards", "--verify"))
    stages = [
        Stage("shard", (PHANTOM,)),
        Stage("train", (verify, verify), "shard"),
        Stage("evaluate", (verify, verify), "train"),
    ]
    waiting = {stage.name: options for stage, _, options in scripts_to_submit(stages, launch)}
    assert waiting == {
        "shard": [],
        "train": ["--dependency=afterok:<shard>", "--kill-on-invalid-dep=yes"],
        "evaluate": ["--dependency=aftercorr:<train>", "--kill-on-invalid-dep=yes"],
    }


def test_only_what_trains_gets_several_nodes_and_all_gpus(launch: LaunchConfig) -> None:
    site = Site(gpu_syntax="gres", gpus_per_node=4)
    wide = replace(launch, site=site, nodes=2, ranks_per_node=3, engine="srun")
    train = wide.script(Stage("train", (PHANTOM,)))
    assert {"#SBATCH --nodes=2", "#SBATCH --gres=gpu:4", "#SBATCH --ntasks-per-node=3"} <= set(
        train.splitlines()
    )
    assert "set -- --engine srun --ranks-per-node 3 shard phantom" in train
    evaluate = wide.script(Stage("evaluate", (PHANTOM,)))
    assert {"#SBATCH --nodes=1", "#SBATCH --gres=gpu:1", "#SBATCH --ntasks-per-node=1"} <= set(
        evaluate.splitlines()
    )
    assert "set -- shard phantom" in evaluate


def test_a_folder_that_sbatch_would_read_otherwise_is_refused(launch: LaunchConfig) -> None:
    with pytest.raises(UserError, match="as a place to fill in"):
        replace(launch, folder=launch.folder / "100%j").script(Stage("shard", (PHANTOM,)))


@pytest.mark.parametrize("name", PRIVATE_METHODS)
def test_a_submitit_without_a_private_method_is_refused_in_one_sentence(
    launch: LaunchConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for kind in submitit.SlurmExecutor.__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(UserError, match=rf"has no SlurmExecutor\.{name} .*install submitit 1\.5"):
        ScriptExecutor(launch.folder, "#!/bin/sh\n")


def test_submitit_is_one_whose_private_methods_are_known() -> None:
    """Where this fails, read `vaedist.slurm.submitit_executor` beside the new submitit, and cap its version."""
    missing = [name for name in PRIVATE_METHODS if not hasattr(submitit.SlurmExecutor, name)]
    assert missing == [], f"submitit {submitit.__version__} has no {missing}: see submitit_executor.py"


# The launch folder ------------------------------------------------------------------------------------------


def test_a_launch_folder_is_its_owners_alone(launch: LaunchConfig) -> None:
    assert launch.folder.stat().st_mode & 0o777 == 0o700
    launch_record.append(launch.folder, [launched(launch.folder)])
    assert (launch.folder / launch_record.RECORD).stat().st_mode & 0o777 == 0o600
    assert launch_record.read(launch.folder) == [launched(launch.folder)]
    launch.folder.chmod(0o770)
    with pytest.raises(UserError, match="others may write"):
        launch_record.read(launch.folder)


def test_a_place_where_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        launch_record.create_folder(tmp_path / "open" / "demo")
    assert not (tmp_path / "open" / "demo").exists()


def test_a_record_is_not_written_through_a_link(launch: LaunchConfig, tmp_path: Path) -> None:
    (launch.folder / launch_record.RECORD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        launch_record.append(launch.folder, [launched(launch.folder)])
    assert not (tmp_path / "elsewhere").exists()


def test_names_of_launches_are_never_used_twice(launch: LaunchConfig) -> None:
    root = launch.folder.parent
    assert launch_record.unused_folder(root, "demo") == root / "demo-2"
    with pytest.raises(UserError, match="another launch"):
        launch_record.create_folder(launch.folder)


@pytest.mark.parametrize("damage", ["{", "[]", '{"link": "train"}', "7"])
def test_a_damaged_record_is_refused(launch: LaunchConfig, damage: str) -> None:
    launch_record.append(launch.folder, [launched(launch.folder)])
    with (launch.folder / launch_record.RECORD).open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(UserError, match="line 2, is not what vaedist-launch wrote"):
        launch_record.read(launch.folder)


def test_the_newest_launch_is_meant(launch: LaunchConfig) -> None:
    root = launch.folder.parent
    with pytest.raises(UserError, match="nothing has been launched"):
        launch_record.newest_folder(root)
    launch_record.append(launch.folder, [launched(launch.folder)])
    other = root / "other"
    launch_record.create_folder(other)
    launch_record.append(other, [launched(other)])
    os.utime(launch.folder / launch_record.RECORD, (1, 1))
    assert launch_record.newest_folder(root) == other


def test_a_group_that_is_not_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no group of yours"):
        launch_record.create_folder(tmp_path / "launches" / "demo", group="no-such-group-here")


# The view ---------------------------------------------------------------------------------------------------


def test_the_state_of_a_job_that_slurm_has_forgotten_comes_from_its_files(
    launch: LaunchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = launch.folder / "run"
    run.mkdir()
    (run / "job.yaml").write_text("name: x\ntrain:\n  steps: 40\n")
    (run / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    done = launched(launch.folder, run=str(run))
    (row,) = status(done)
    assert SlurmQueue([done]).silent and (row.job.state, row.step, row.ended) == ("ENDED", "20/40", True)
    Path(done.log).write_text(
        "step 20\nvaedist-train: error: no room\nslurmstepd: error: *** JOB 7 CANCELLED\n"
    )
    (row,) = status(done)
    assert row.note == "vaedist-train: error: no room"
    (run / "finished.json").write_text("{}")
    (row,) = status(done)
    assert (row.job.state, row.note) == ("FINISHED", "")
    after = launched(launch.folder, link="sample", job="8", after="7", log=str(launch.folder / "none.log"))
    failed = launched(launch.folder)
    rows = status(failed, after)
    assert rows[1].note == "never ran, because train (7) did not finish"
    assert status_table(rows).splitlines()[0].split() == [
        "LINK",
        "RUN",
        "JOB",
        "STATE",
        "STEP",
        "RESTARTS",
        "NOTE",
    ]
    with pytest.raises(UserError, match="Slurm does not answer"):
        cancel_launch([failed], print)


def test_parse_scontrol() -> None:
    lines = (
        "JobId=7 JobName=a b UserId=x(0) JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=3:0 NodeList=n1\n"
        "JobId=9 ArrayJobId=9 ArrayTaskId=0,2-3%2 JobName=x JobState=PENDING Reason=Dependency ExitCode=0:0\n"
        "slurm_load_jobs error: Invalid job id specified\n"
    )
    found = list(parse_scontrol(lines))
    assert (found[0].job, found[0].state, found[0].code, found[0].restarts) == ("7", "FAILED", 3, 2)
    assert [job.job for job in found[1:]] == ["9_0", "9_2", "9_3"]
    assert {job.state for job in found[1:]} == {"PENDING"}


def test_logs_are_followed_to_the_end(launch: LaunchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_FOLLOW_SECONDS", 0.05)
    monkeypatch.setattr(logs, "_STATE_SECONDS", 0.5)
    monkeypatch.setenv("PATH", "/nowhere")
    one = launched(launch.folder)
    Path(one.log).write_text("".join(f"line {number}\n" for number in range(9)))
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if "line 8" in text:
            with Path(one.log).open("a") as file:
                file.write("and more\n")

    logs.follow_logs(logs.show_logs([Path(one.log)], 2, write), write, lambda: has_ended([one]))
    assert "".join(seen) == "line 7\nline 8\nand more\n"
    seen.clear()
    logs.show_logs([Path("/nowhere/x.log")], 2, seen.append)
    assert seen == ["(nothing yet in /nowhere/x.log)\n"]


def test_the_record_is_plain_json(launch: LaunchConfig) -> None:
    launch_record.append(launch.folder, [launched(launch.folder)])
    content = json.loads((launch.folder / launch_record.RECORD).read_text())
    assert content["arguments"] == ["train", "x"] and content["job"] == "7"
