"""vaedist-launch and the scripts of `cluster/` and `jobs/` on a real Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_slurm.cluster import ENDED, Slurm, until
from tests.run_commands import last_step
from vaedist.slurm import launch_record

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

JOB = """
name: tiny
data: {path: DATA, workers: 0}
model: {kind: vae, latent: 4, encoder: {kind: mlp, width: 16, depth: 1}}
train: {steps: 4, batch_size: 8, log_every: 2, validate_every: 1000000, save_every: 1000}
"""
SITE = "partition: debug\ncpus_per_task: 1\ntime: '00:30:00'\n"


class Desk:
    """Where a person sits: a folder with a job file and a site file, and a shell."""

    def __init__(self, slurm: Slurm, folder: Path, data: Path) -> None:
        self.slurm, self.folder = slurm, folder
        folder.mkdir()
        (folder / "tiny.yaml").write_text(JOB.replace("DATA", str(data)))
        (folder / "site.yaml").write_text(SITE)
        # Variables of another site, which must not count.
        self.environment = slurm.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def launch(self, *words: str, code: int = 0, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vaedist.launch", *words],
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stdout + done.stderr

    def status(self) -> dict[str, list[str]]:
        """The view: link and label to what stands behind them."""
        lines = self.launch("status").splitlines()[2:]
        return {" ".join(line.split()[:2]): line.split(None, 6)[2:] for line in lines}

    def shell(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment | {"PATH": f"{Path(sys.executable).parent}:{self.environment['PATH']}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def desk(slurm: Slurm, tmp_path: Path, phantom: Path) -> Iterator[Desk]:
    yield Desk(slurm, tmp_path / "a desk, 'quoted' & $(odd)", phantom)
    slurm.quiet()


def test_a_grid_of_runs_and_what_follows_them(desk: Desk) -> None:
    """In a folder with a hostile name; the bytes are those of the dry run, whatever another site left in the shell."""
    words = [
        "tiny.yaml",
        "--site",
        "site.yaml",
        "--seeds",
        "0-1",
        "--chain",
        "train,sample",
        "--engine",
        "srun",
    ]
    dry = desk.launch(*words, "--dry-run")
    stray = {"SBATCH_PARTITION": "nowhere", "SLURM_MEM_PER_GPU": "1", "VAEDIST_SETUP": "exit 9"}
    desk.launch(*words, **stray)
    (folder,) = (desk.folder / "launches").iterdir()
    jobs = {entry.link: entry.array for entry in launch_record.read(folder)}
    sent = [
        desk.slurm.run("scontrol", "write", "batch_script", jobs[link], "-") for link in ("train", "sample")
    ]
    # Where sbatch says so itself, it is after the script's last line.
    assert "".join(text.partition("\nbatch script for job")[0].rstrip("\n") + "\n" for text in sent) == dry
    for task in ("_0", "_1"):
        for link in ("train", "sample"):
            desk.slurm.wait(jobs[link] + task, "COMPLETED", seconds=240)
    for seed in (0, 1):
        assert last_step(desk.folder / "runs" / f"tiny-seed-{seed}") == 4
        assert (desk.folder / "runs" / f"tiny-seed-{seed}" / "samples.png").is_file()
    status = desk.status()
    assert {row[1] for row in status.values()} == {"COMPLETED"}
    assert status["train tiny-seed-1"][2] == "4/4"
    assert "finished after 4 steps" in desk.launch("logs", "--stage", "train")


def test_a_failed_stage_takes_later_ones_with_it_and_status_says_why(desk: Desk) -> None:
    shard = "no-such-folder --out shards"
    told = desk.launch(
        *("tiny.yaml", "--site", "site.yaml", "--seeds", "0-1"),
        *("--chain", "shard,train,evaluate", "--shard", shard),
    )
    number = re.findall(r"^shard: job (\d+)", told)[0]
    desk.slurm.wait(number, "FAILED", seconds=90)
    until("all have ended", lambda: not desk.slurm.run("squeue", "-h"), 30)
    status = desk.status()
    assert status["shard shard"][1] == "FAILED"
    assert "vaedist-shard: error: no-such-folder does not exist" in status["shard shard"][-1]
    assert status["train tiny-seed-1"][-1] == f"cancelled, because shard ({number}) did not finish"
    assert status["evaluate tiny-seed-0"][1] == "CANCELLED"
    # Once Slurm has forgotten them, or cannot be asked, the same is told by what they left behind.
    silent = desk.launch("status", SLURM_CONF="/nowhere/slurm.conf")
    assert "Slurm does not answer" in silent
    assert f"never ran, because shard ({number}) did not finish" in silent
    assert "no-such-folder does not exist" in silent


def test_of_an_array_only_the_failed_task_has_no_successor(desk: Desk) -> None:
    other = desk.folder / "gone.yaml"
    other.write_text((desk.folder / "tiny.yaml").read_text().replace("name: tiny", "name: gone"))
    # A run folder that cannot be made: found on the node, not before.
    (desk.folder / "runs").mkdir()
    (desk.folder / "runs" / "gone").touch()
    desk.launch("tiny.yaml", "gone.yaml", "--site", "site.yaml", "--chain", "train,sample")
    until("all have ended", lambda: not desk.slurm.run("squeue", "-h"), 240)
    status = desk.status()
    assert [status[name][1] for name in ("train tiny", "sample tiny", "train gone", "sample gone")] == [
        *("COMPLETED", "COMPLETED", "FAILED", "CANCELLED")
    ]
    assert "cannot make the run folder" in status["train gone"][-1]
    assert re.fullmatch(r"cancelled, because train \(\d+_1\) did not finish", status["sample gone"][-1])


def test_requeued_followed_and_cancelled(desk: Desk) -> None:
    """A requeued job goes on where it was, with its log kept; a job that waits for it ends with it."""
    desk.launch("tiny.yaml", "train.steps=1000000", "--site", "site.yaml", "--chain", "train,sample")
    train, sample = (entry.job for entry in launch_record.read(desk.folder / "launches" / "tiny"))
    run = desk.folder / "runs" / "tiny"
    until("two checkpoints", lambda: last_step(run) > 2000, 240)
    assert desk.status()["sample tiny"][-1] == f"waits for train ({train})"
    desk.slurm.run("scontrol", "requeue", train)
    until("queued again", lambda: desk.slurm.state(train) == "PENDING", 60)
    row = desk.status()["train tiny"]
    assert row[1] == "PENDING" and row[3] == "1"
    assert row[-1].startswith("Slurm holds it for two minutes after a requeue: until ")
    reached = last_step(run)
    desk.slurm.release(train)
    until("it went on", lambda: last_step(run) > reached + 1000, 240)
    log = desk.launch("logs", "--stage", "train", "-n", "1000000")
    assert log.count("vaedist: Slurm job") == 2, "each start is in the log"
    assert desk.launch("cancel") == f"cancelled: {train}, {sample}\n"
    until("an empty queue", lambda: not desk.slurm.run("squeue", "-h"), 60)
    assert [row[1] for row in desk.status().values()] == ["CANCELLED", "CANCELLED"]
    assert desk.launch("cancel") == "nothing to cancel: all have ended\n"


def test_a_successor_is_found_and_cancelled_with_the_rest(desk: Desk) -> None:
    """A site that continues by resubmitting: the view follows the work, not the number; of an array task by task."""
    (desk.folder / "site.yaml").write_text(f"{SITE}continue_by: resubmit\n")
    desk.launch("tiny.yaml", "train.steps=1000000", "--site", "site.yaml", "--seeds", "4-5")
    other, first = (entry.job for entry in launch_record.read(desk.folder / "launches" / "tiny"))
    run = desk.folder / "runs" / "tiny-seed-5"
    until("it trains", lambda: last_step(run) > 500, 240)
    assert desk.status()["train tiny-seed-5"][0] == first
    desk.slurm.run("scancel", "--batch", "--signal=USR1", first)
    until("its end", lambda: desk.slurm.state(first) in ENDED, 120)
    until("the successor", lambda: desk.status()["train tiny-seed-5"][1] == "RUNNING", 120)
    second = desk.status()["train tiny-seed-5"][0]
    assert second != first and second.endswith("_1")
    assert desk.status()["train tiny-seed-4"][0] == other
    reached = last_step(run)
    until("it went on", lambda: last_step(run) > reached + 500, 240)
    numbers = desk.slurm.run("squeue", "--noheader", "--array", "--format=%i").split()
    assert len(numbers) == 4, "two tasks, and one successor for each"
    cancelled = desk.launch("cancel").removeprefix("cancelled: ").strip().split(", ")
    assert sorted(cancelled) == sorted(numbers)
    until("an empty queue", lambda: not desk.slurm.run("squeue", "-h"), 60)


def test_what_sbatch_refuses_leaves_nothing_in_the_queue(desk: Desk) -> None:
    (desk.folder / "site.yaml").write_text("partition: nowhere\n")
    told = desk.launch("tiny.yaml", "--site", "site.yaml", code=2)
    assert "sbatch refused train: " in told and "nowhere" in told
    assert len(told.splitlines()) == 1
    assert not (desk.folder / "launches").exists()
    # The first link would be taken, the second not: nothing is handed in.
    (desk.folder / "site.yaml").write_text(SITE)
    shard = "phantom --size 16 --count train=8 --out shards"
    words = ["tiny.yaml", "--site", "site.yaml", "--chain", "shard,train", "--shard", shard, "--nodes", "9"]
    assert "sbatch refused train: " in desk.launch(*words, code=2)
    assert desk.slurm.run("squeue", "-h") == ""
    assert not (desk.folder / "launches").exists()


def test_the_check_of_a_site(desk: Desk, slurm: Slurm) -> None:
    text = f"{SITE}node_local: {slurm.scratch}/$SLURM_JOB_ID\ngpu_syntax: gres\ngpus_per_node: 2\ninterface: eth\n"
    (desk.folder / "site.yaml").write_text(text)
    told = desk.launch("--site", "site.yaml", "--check")
    rows = dict(re.findall(r"^(\S.*?)  +(ok|note|WRONG) ", told, re.MULTILINE))
    assert set(rows) >= {
        *("Slurm", "partition", "shared folder", "sbatch --test-only", "a job", "shared folder there"),
        *("versions there", "node-local", "interface", "continue_by: requeue"),
    }
    assert set(rows.values()) <= {"ok", "note"}, told
    assert "requeue works, resubmit works" in told
    assert "1 GPUs" in told
    until("an empty queue", lambda: not desk.slurm.run("squeue", "-h"), 30)
    (desk.folder / "site.yaml").write_text("partition: nowhere\nnode_local: /proc/no/such\n")
    told = desk.launch("--site", "site.yaml", "--check", code=2)
    assert re.search(
        r"^partition +WRONG +nowhere: .*there are debug, high, low, lowgrace$", told, re.MULTILINE
    )
    (desk.folder / "site.yaml").write_text(f"{SITE}node_local: /proc/no/such\ninterface: nosuch0\n")
    told = desk.launch("--site", "site.yaml", "--check", code=2)
    assert re.search(r"^node-local +WRONG ", told, re.MULTILINE), told
    assert re.search(r"^interface +WRONG ", told, re.MULTILINE), told
    assert not [path for path in desk.folder.iterdir() if path.name.startswith(".vaedist")]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_plain_sbatch_takes_the_site_and_two_nodes(desk: Desk, phantom: Path, where: str) -> None:
    """A script of jobs/, by absolute path from another folder; a template by hand."""
    short = "train.steps=4 train.batch_size=8 data.cache=none train.validate_every=100 data.lanes=null"
    mlp = "model.encoder='{kind: mlp, width: 16, depth: 1}'"
    evaluated = 'eval "$(python -m vaedist.launch --site site.yaml --print-env 2>/dev/null)"; '
    (desk.folder / "site.yaml").write_text(
        f"{SITE}partition: low\nsetup: ['export HERE_I_AM=\"it is me\"']\n".replace("partition: debug\n", "")
    )
    if where == "elsewhere":
        command = (
            f"VAEDIST_DATA={phantom} sbatch --parsable --nodes=2 {ROOT}/jobs/vae_phantom.sh {short} {mlp}"
        )
    else:
        command = f"sbatch --parsable --nodes=2 {ROOT}/cluster/train.sbatch tiny.yaml"
    job = desk.shell(evaluated + command).strip()
    desk.slurm.wait(job, "COMPLETED", seconds=240)
    assert desk.slurm.show(job)["Partition"] == "low"
    told = (desk.folder / f"slurm-{job}.out").read_text()
    assert "train 2 nodes x 1 ranks" in told and "finished after 4 steps" in told
    if where == "elsewhere":
        run = desk.folder / "runs" / "vae_phantom"
        assert f"log          {desk.folder}/slurm-{job}.out\n" in told
        assert f"checkpoints  {run}/checkpoints\n" in told
        assert re.search(r"ssh -L (\d+):localhost:\1 \w+@\S+$", told, re.MULTILINE)
        assert last_step(run) == 4


def test_a_script_of_ones_own_and_its_successor_find_the_job_file_beside_it(
    desk: Desk, phantom: Path, tmp_path: Path
) -> None:
    """Submitted from elsewhere, with blanks in every path and no environment active; resubmitted when time is up.

    The folder holds a script, a job file that differs from the shipped one, and the project's `.venv`; what scripts
    share comes from the package. sbatch runs copies of both scripts.
    """
    project = tmp_path / "a project of one's own"
    folder = project / "my jobs"
    folder.mkdir(parents=True)
    (project / ".venv").symlink_to(Path(sys.executable).parent.parent)
    script = (ROOT / "jobs" / "vae_phantom.sh").read_text()
    (folder / "vae_phantom.sh").write_text(script)
    job = JOB.replace("DATA", str(phantom)).replace("name: tiny", "name: of_ones_own")
    (folder / "vae_phantom.yaml").write_text(job.replace("steps: 4", "steps: 1000000"))
    (desk.folder / "site.yaml").write_text(f"{SITE}continue_by: resubmit\n")
    environment = desk.environment | {
        "PATH": "/usr/bin:/bin",
        "VAEDIST_DATA": str(phantom),
        "VAEDIST_SITE": str(desk.folder / "site.yaml"),
    }
    done = subprocess.run(
        ["sbatch", "--parsable", folder / "vae_phantom.sh", "--device", "cpu"],
        cwd=desk.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.strip()
    run = desk.folder / "runs" / "of_ones_own"

    def trained(job: str) -> bool:
        assert desk.slurm.state(job) not in ENDED, desk.slurm.output(job)
        return last_step(run) > 0

    until("training", lambda: trained(first), 120)
    (successor,) = set(desk.slurm.run("squeue", "-h", "-o%i").split()) - {first}
    desk.slurm.run("scancel", "--batch", "--signal=USR1", first)
    until("the end of the first job", lambda: desk.slurm.state(first) in ENDED, 60)
    steps = last_step(run)
    until("the successor trains", lambda: trained(successor) and last_step(run) > steps, 120)
    said = (desk.folder / f"slurm-{successor}.out").read_text()
    assert "restart 1" in said
    desk.slurm.quiet()
