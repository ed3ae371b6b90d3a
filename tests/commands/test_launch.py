"""vaedist-launch without a Slurm: what it prints, what it refuses, and a chain that runs here."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vaedist import launch
from vaedist.cli import launch_options
from vaedist.slurm import launch_record

ROOT = Path(__file__).resolve().parents[2]
JOB = """
name: tiny
data: {path: DATA}
model: {kind: vae, latent: 4, encoder: {kind: mlp, width: 16, depth: 1}}
train: {steps: 4, batch_size: 8, log_every: 2, validate_every: 4, save_every: 4}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "VAEDIST")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("tiny.yaml").write_text(JOB.replace("DATA", str(phantom)))
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence that a mistake is told in."""
    assert launch.main([*words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vaedist-launch: error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny.yaml"], "which site?"),
        (["tiny.yaml", "--site", "genric"], "did you mean 'generic'"),
        (["tiny.yaml", "--site", "no/such.yaml"], "cannot read no/such.yaml"),
        (["--site", "generic"], "nothing to launch"),
        (["tiny.yaml", "--site", "generic", "train.stepz=1"], "did you mean 'steps'"),
        (["tiny.yaml", "--site", "generic", "--time", "5"], "--time: '5' is not a time"),
        (["tiny.yaml", "--site", "example", "--time", "48:00:00"], "give 1-00:00:00 or less"),
        (["tiny.yaml", "--site", "grouped.yaml"], "is no group of yours"),
        (["tiny.yaml", "--local", "--nodes", "2"], "leave --nodes out"),
        (["tiny.yaml", "--site", "generic", "--name", "a b"], "--name 'a b'"),
        (["tiny.yaml", "--site", "generic", "--dry-run", "--folder", "100%"], "as a place to fill in"),
        (["tiny.yaml", "--site", "generic", "--dry-run", "--runs", "a\nb"], "line break"),
        (["--space", "vqvae", "--site", "generic", "--data", "x"], "behind two dashes, as in -- --data DIR"),
        (["tiny.yaml", "--site", "generic", "--override"], "--override is an option of vaedist-train"),
        (["status"], "nothing has been launched"),
        (["status", "nowhere"], "is no launch folder"),
        (["cancel", "nowhere"], "is no launch folder"),
        (["logs", "nowhere"], "is no launch folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("grouped.yaml").write_text("group: no-such-group-here\n")
    assert told in refused(capsys, *words)
    assert sorted(path.name for path in Path().iterdir()) == ["grouped.yaml", "tiny.yaml"]


def test_a_dry_run_prints_a_script_and_makes_nothing(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    words = ["tiny.yaml", "--site", "generic", "--seeds", "0-1", "--chain", "train,evaluate", "--dry-run"]
    assert launch.main([*words, "--engine", "srun", "--nodes", "2", "--", "--override"]) == 0
    told = capsys.readouterr()
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]
    train, evaluate = ("#!/usr/bin/env bash" + text for text in told.out.split("#!/usr/bin/env bash")[1:])
    for text in (train, evaluate):
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        assert "#SBATCH --array=0-1\n" in text
    assert "#SBATCH --nodes=2\n" in train and "#SBATCH --nodes=1\n" in evaluate
    folder = place / "launches" / "tiny"
    assert f"1) set -- --engine srun train {folder}/jobs/tiny.yaml seed=1 " in train
    assert "--run-dir runs/tiny-seed-1 --override ;;" in train
    assert told.err.splitlines() == [
        f"# sbatch {folder}/train.sbatch",
        f"# sbatch --dependency=aftercorr:<train> --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
    ]


def test_a_site_that_resubmits_warns_of_chains(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tiny.yaml",
        "--site",
        "conda",
        "--folder",
        "x",
        "--runs",
        "y",
        "--chain",
        "train,sample",
        "--dry-run",
    ]
    assert launch.main(words) == 0
    assert "what waits for a job does not wait for its successor" in capsys.readouterr().err


def test_the_site_is_printed_for_the_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "my site.yaml"
    site.write_text(
        "partition: '$(touch pwned)'\naccount: \"it's\"\ngpu_syntax: gres\ngpus_per_node: 2\nmem: 4G\n"
        "setup: ['echo \"$HOME\"']\nmail: me@here\n"
    )
    assert launch.main(["--site", str(site), "--print-env"]) == 0
    told = capsys.readouterr()
    assert "--mail-user=me@here" in told.err
    done = subprocess.run(
        ["bash", "-euc", 'eval "$1"; env -0', "bash", told.out],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
    )
    seen = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    assert {name: value for name, value in seen.items() if name.startswith(("SBATCH", "VAEDIST"))} == {
        "SBATCH_PARTITION": "$(touch pwned)",
        "SBATCH_ACCOUNT": "it's",
        "SBATCH_GRES": "gpu:2",
        "SBATCH_MEM_PER_NODE": "4G",
        "VAEDIST_SETUP": 'echo "$HOME"',
        "VAEDIST_SITE": str(site),
    }
    assert not Path("pwned").exists()


def test_a_chain_runs_locally_and_status_shows_it(capfd: pytest.CaptureFixture[str], place: Path) -> None:
    shard = "phantom --size 16 --count train=32,validate=16,test=16 --out 'my shards'"
    words = ["tiny.yaml", "--local", "--chain", "shard,train", "--shard", shard, "--runs", "my runs"]
    assert launch.main(words) == 0
    out = capfd.readouterr().out
    assert "shard: finished" in out and "train: finished" in out
    assert (place / "my runs" / "tiny" / "finished.json").exists()
    assert launch.main(["status"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0:4:3] for line in lines[2:]] == [["shard", "COMPLETED"], ["train", "COMPLETED"]]
    assert lines[3].split()[4] == "4/4"
    assert launch.main(["logs", "launches/tiny", "--link", "train", "-n", "1"]) == 0
    assert capfd.readouterr().out == "run folder: my runs/tiny\n"
    assert launch.main(["cancel"]) == 0
    assert capfd.readouterr().out == "nothing to cancel: all have ended\n"
    # What runs is what was launched: a job file that is edited later changes nothing.
    (entry,) = [entry for entry in launch_record.read(Path("launches/tiny")) if entry.link == "train"]
    assert entry.arguments[1] == str(place / "launches" / "tiny" / "jobs" / "tiny.yaml")
    assert Path(entry.arguments[1]).read_text() == Path("tiny.yaml").read_text()


def test_ctrl_c_stops_a_local_chain_after_a_checkpoint(place: Path) -> None:
    """Sent to the whole group, as a terminal does: training saves, the rest is not begun, and nothing is left."""
    import signal
    import time

    command = [
        sys.executable,
        "-m",
        "vaedist.launch",
        "tiny.yaml",
        "train.steps=1000000",
        "train.log_every=1",
    ]
    command += ["--local", "--chain", "train,sample"]
    # A shell starts what it puts into the background with Ctrl-C ignored, and so it may have started these tests.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, text=True, **heard
    ) as process:
        metrics = place / "runs" / "tiny" / "metrics.jsonl"
        for _ in range(1200):
            if metrics.exists() and metrics.stat().st_size:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75, out
    assert "train: asked to stop" in out and "the same command goes on" in out and "sample" not in out
    assert list((place / "runs" / "tiny" / "checkpoints").iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_example_in_the_help_parses(capsys: pytest.CaptureFixture[str]) -> None:
    """The example in the help is one that parses."""
    parser = launch_options.build_parser()
    assert parser.epilog is not None
    words = shlex.split(parser.epilog.partition("vaedist-launch ")[2].partition(". What follows")[0])
    arguments = parser.parse_intermixed_args(words)
    assert (arguments.words, arguments.grid, arguments.seeds) == (
        ["jobs/infovae_oasis.yaml"],
        ["model.beta=0.5,1,4"],
        "0-4",
    )


def test_what_is_launched_again_from_a_run_is_called_after_its_folder(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """Every run's job file has the same name: a launch of what a search found should not be called `job`."""
    best = place / "runs" / "tune_vqvae" / "best"
    best.mkdir(parents=True)
    (best / "job.yaml").write_text((place / "tiny.yaml").read_text())
    assert launch.main([str(best / "job.yaml"), "--site", "generic", "--dry-run"]) == 0
    assert "--job-name=best" in capsys.readouterr().out
