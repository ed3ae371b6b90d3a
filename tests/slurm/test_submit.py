"""Handing in without Slurm, the launch folder, and the view of what has become of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vaedist.config.site import Site
from vaedist.core.errors import UserError
from vaedist.slurm import launch_record as record
from vaedist.slurm import status as queue
from vaedist.slurm.chain import Link, Task
from vaedist.slurm.launch_record import Entry
from vaedist.slurm.submit import Executor, Launch, plan, run_local, sbatch, submit

ROOT = Path(__file__).resolve().parents[2]
MISSING = Task("shard", ("shard", "no-such-folder", "--out", "shards"))
PHANTOM = Task("shard", ("shard", "phantom", "--size", "16", "--count", "train=8", "--out", "shards"))


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = record.new_name(tmp_path / "launches", "demo")
    record.make(folder)
    site = folder / "site.yaml"
    site.write_text("name: here\n")
    return Launch(folder, Site(name="here"), site, python_folder=Path(sys.executable).parent)


def entry(folder: Path, **changes: object) -> Entry:
    log = str(folder / "train-7.log")
    plain = Entry("train", "demo", "7", "slurm", ("train", "x"), None, log, None, f"vaedist:{folder}", 0.0)
    return replace(plain, **changes)  # type: ignore[arg-type]


# Without Slurm ----------------------------------------------------------------------------------------------


def test_a_chain_runs_here_and_a_failed_link_keeps_its_successors_from_running(
    launch: Launch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    verify = Task("verify", ("shard", "shards", "--verify"))
    good = [Link("shard", (PHANTOM,)), Link("evaluate", (verify,), "shard")]
    assert run_local(good, launch, told.append) == 0
    assert [line.split(" after ")[0] for line in told if "log" not in line] == [
        "shard: finished",
        "evaluate: finished",
    ]
    assert "every byte and image is as it was packed" in Path(record.read(launch.folder)[1].log).read_text()
    found, silent = queue.rows(record.read(launch.folder))
    assert ([row.seen.state for row in found], silent) == (["COMPLETED", "COMPLETED"], False)

    told.clear()
    bad = [
        Link("shard", (MISSING,)),
        Link("train", (verify, verify), "shard"),
        Link("sample", (verify, verify), "train"),
    ]
    assert run_local(bad, launch, told.append) == 2
    assert told[1].startswith("shard: failed with exit code 2")
    assert [line for line in told if "not run, because" in line] == [
        "train verify: not run, because shard did not finish",
        "train verify: not run, because shard did not finish",
        "sample verify: not run, because train did not finish",
        "sample verify: not run, because train did not finish",
    ]
    row = queue.rows(record.read(launch.folder))[0][-1]
    assert row.seen.state == "FAILED"
    assert row.note.startswith("exit code 2: vaedist-shard: error: no-such-folder does not exist")


def test_a_local_launch_is_cancelled_with_all_its_processes(launch: Launch) -> None:
    """The launcher, submitit's two processes and the script's own: none is left."""
    script = (
        "import sys; from pathlib import Path; from vaedist.slurm.submit import *; from vaedist.config.site import *\n"
        "from vaedist.slurm.chain import Link, Task; folder = Path(sys.argv[1])\n"
        "site = Site(setup=('echo begun', 'exec sleep 61.25'))\n"
        "launch = Launch(folder, site, folder / 'site.yaml')\n"
        "sys.exit(run_local([Link('shard', (Task('x', ('shard', 'x')),))], launch, print))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(launch.folder)]) as process:
        log = launch.folder / "shard-0.log"
        for _ in range(600):
            if log.exists() and log.read_text():
                break
            time.sleep(0.1)
        entries = record.read(launch.folder)
        assert queue.rows(entries)[0][0].seen.state == "RUNNING"
        told: list[str] = []
        assert queue.cancel(entries, told.append) == 0
        assert told == [f"cancelled: {entries[0].job}"]
        assert process.wait(timeout=60) == 128 + 15
    assert queue.rows(entries)[0][0].seen.state == "FAILED"
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"61.25" in _content(path)]
    assert left == []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# What is handed in ------------------------------------------------------------------------------------------


def test_without_sbatch_one_is_told_where_to_go(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="login node, or add --local"):
        submit([Link("shard", (PHANTOM,))], launch, print)
    assert Executor.affinity() == -1


def test_variables_for_another_job_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "VAEDIST")):
            monkeypatch.delenv(name)
    assert sbatch() == ["sbatch"]
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("VAEDIST_SITE", "/other.yaml")
    monkeypatch.setenv("VAEDIST_SETUP", "true")
    unset = ["SBATCH_PARTITION", "SLURM_MEM_PER_CPU", "VAEDIST_SETUP", "VAEDIST_SITE"]
    assert sbatch() == ["env", *(word for name in unset for word in ("-u", name)), "sbatch"]


def test_links_wait_for_success_and_end_with_failure(launch: Launch) -> None:
    verify = Task("verify", ("shard", "shards", "--verify"))
    links = [
        Link("shard", (PHANTOM,)),
        Link("train", (verify, verify), "shard"),
        Link("evaluate", (verify, verify), "train"),
    ]
    waiting = {link.name: options for link, _, options in plan(links, launch)}
    assert waiting == {
        "shard": [],
        "train": ["--dependency=afterok:<shard>", "--kill-on-invalid-dep=yes"],
        "evaluate": ["--dependency=aftercorr:<train>", "--kill-on-invalid-dep=yes"],
    }


def test_only_what_trains_gets_several_nodes_and_all_gpus(launch: Launch) -> None:
    site = Site(gpu_syntax="gres", gpus_per_node=4)
    wide = replace(launch, site=site, nodes=2, ranks_per_node=3, engine="srun")
    train = wide.script(Link("train", (PHANTOM,)))
    assert {"#SBATCH --nodes=2", "#SBATCH --gres=gpu:4", "#SBATCH --ntasks-per-node=3"} <= set(
        train.splitlines()
    )
    assert "set -- --engine srun --ranks-per-node 3 shard phantom" in train
    evaluate = wide.script(Link("evaluate", (PHANTOM,)))
    assert {"#SBATCH --nodes=1", "#SBATCH --gres=gpu:1", "#SBATCH --ntasks-per-node=1"} <= set(
        evaluate.splitlines()
    )
    assert "set -- shard phantom" in evaluate


def test_a_folder_that_sbatch_would_read_otherwise_is_refused(launch: Launch) -> None:
    with pytest.raises(UserError, match="as a place to fill in"):
        replace(launch, folder=launch.folder / "100%j").script(Link("shard", (PHANTOM,)))


# The launch folder ------------------------------------------------------------------------------------------


def test_a_launch_folder_is_its_owners_alone(launch: Launch) -> None:
    assert launch.folder.stat().st_mode & 0o777 == 0o700
    record.append(launch.folder, [entry(launch.folder)])
    assert (launch.folder / record.RECORD).stat().st_mode & 0o777 == 0o600
    assert record.read(launch.folder) == [entry(launch.folder)]
    launch.folder.chmod(0o770)
    with pytest.raises(UserError, match="others may write"):
        record.read(launch.folder)


def test_a_place_where_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match="others may write"):
        record.make(tmp_path / "open" / "demo")
    assert not (tmp_path / "open" / "demo").exists()


def test_a_record_is_not_written_through_a_link(launch: Launch, tmp_path: Path) -> None:
    (launch.folder / record.RECORD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        record.append(launch.folder, [entry(launch.folder)])
    assert not (tmp_path / "elsewhere").exists()


def test_names_of_launches_are_never_used_twice(launch: Launch) -> None:
    root = launch.folder.parent
    assert record.new_name(root, "demo") == root / "demo-2"
    with pytest.raises(UserError, match="another launch"):
        record.make(launch.folder)


@pytest.mark.parametrize("damage", ["{", "[]", '{"link": "train"}', "7"])
def test_a_damaged_record_is_told(launch: Launch, damage: str) -> None:
    record.append(launch.folder, [entry(launch.folder)])
    with (launch.folder / record.RECORD).open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(UserError, match="line 2, is not what vaedist-launch wrote"):
        record.read(launch.folder)


def test_the_newest_launch_is_meant(launch: Launch) -> None:
    root = launch.folder.parent
    with pytest.raises(UserError, match="nothing has been launched"):
        record.newest(root)
    record.append(launch.folder, [entry(launch.folder)])
    other = root / "other"
    record.make(other)
    record.append(other, [entry(other)])
    os.utime(launch.folder / record.RECORD, (1, 1))
    assert record.newest(root) == other


def test_a_group_that_is_not_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no group of yours"):
        record.make(tmp_path / "launches" / "demo", group="no-such-group-here")


# The view ---------------------------------------------------------------------------------------------------


def test_what_slurm_has_forgotten_is_told_by_what_it_left(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = launch.folder / "run"
    run.mkdir()
    (run / "job.yaml").write_text("name: x\ntrain:\n  steps: 40\n")
    (run / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    done = entry(launch.folder, run=str(run))
    (row,), silent = queue.rows([done])
    assert silent and (row.seen.state, row.step, row.ended) == ("ENDED", "20/40", True)
    Path(done.log).write_text(
        "step 20\nvaedist-train: error: no room\nslurmstepd: error: *** JOB 7 CANCELLED\n"
    )
    (row,), _ = queue.rows([done])
    assert row.note == "vaedist-train: error: no room"
    (run / "finished.json").write_text("{}")
    (row,), _ = queue.rows([done])
    assert (row.seen.state, row.note) == ("FINISHED", "")
    after = entry(launch.folder, link="sample", job="8", after="7", log=str(launch.folder / "none.log"))
    failed = entry(launch.folder)
    rows, _ = queue.rows([failed, after])
    assert rows[1].note == "never ran, because train (7) did not finish"
    assert queue.table(rows).splitlines()[0].split() == [
        "LINK",
        "RUN",
        "JOB",
        "STATE",
        "STEP",
        "RESTARTS",
        "NOTE",
    ]
    with pytest.raises(UserError, match="Slurm does not answer"):
        queue.cancel([failed], print)


def test_what_scontrol_says_of_jobs_and_arrays() -> None:
    lines = (
        "JobId=7 JobName=a b UserId=x(0) JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=3:0 NodeList=n1\n"
        "JobId=9 ArrayJobId=9 ArrayTaskId=0,2-3%2 JobName=x JobState=PENDING Reason=Dependency ExitCode=0:0\n"
        "slurm_load_jobs error: Invalid job id specified\n"
    )
    found = list(queue._shown(lines))
    assert (found[0].job, found[0].state, found[0].code, found[0].restarts) == ("7", "FAILED", 3, 2)
    assert [seen.job for seen in found[1:]] == ["9_0", "9_2", "9_3"]
    assert {seen.state for seen in found[1:]} == {"PENDING"}


def test_logs_are_followed_to_the_end(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_FOLLOW_SECONDS", 0.05)
    monkeypatch.setattr(queue, "_LOOK_SECONDS", 0.5)
    monkeypatch.setenv("PATH", "/nowhere")
    one = entry(launch.folder)
    Path(one.log).write_text("".join(f"line {number}\n" for number in range(9)))
    seen: list[str] = []

    def write(text: str) -> None:
        seen.append(text)
        if "line 8" in text:
            with Path(one.log).open("a") as file:
                file.write("and more\n")

    assert queue.logs([one], 2, follow=True, write=write) == 0
    assert "".join(seen) == "line 7\nline 8\nand more\n"
    seen.clear()
    assert queue.logs([entry(launch.folder, log="/nowhere/x.log")], 2, follow=False, write=seen.append) == 0
    assert seen == ["(nothing yet in /nowhere/x.log)\n"]


def test_the_record_is_plain_json(launch: Launch) -> None:
    record.append(launch.folder, [entry(launch.folder)])
    content = json.loads((launch.folder / record.RECORD).read_text())
    assert content["arguments"] == ["train", "x"] and content["job"] == "7"
