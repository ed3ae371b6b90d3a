"""Batch scripts: the same bytes as before, taken by the shell as they are meant, whatever the values are.

After a change that is meant to alter them: `VAEDIST_WRITE_GOLDEN=1 pytest tests/slurm/test_script.py`, look at the
difference, and say in the commit why it is right.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vaedist.config.site import Site, load_site
from vaedist.core.errors import UserError
from vaedist.slurm.script import (
    LAST_LINE,
    TEMPLATES,
    BatchSpec,
    batch_script,
    cluster_folder,
    environment_exports,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "sbatch"
SITES = {path.stem: load_site(path) for path in sorted((cluster_folder() / "sites").glob("*.yaml"))} | {
    "container": Site(
        name="container", gpu_syntax="gres", gpus_per_node=2, container="/shared/vae dist.sif", max_restarts=3
    )
}
SPECS = {
    "train": BatchSpec(
        "demo.train",
        (("train", "/launches/demo/jobs/demo.yaml", "--run-dir", "runs/demo"),),
        "/launches/demo/train-%j.log",
        comment="vaedist:/launches/demo",
        ranks_per_node=2,
        engine="srun",
    ),
    "array": BatchSpec(
        "demo.train",
        tuple(("train", "/launches/demo/jobs/demo.yaml", f"seed={seed}") for seed in range(3)),
        "/launches/demo/train-%A_%a.log",
        comment="vaedist:/launches/demo",
        time="02:00:00",
        max_parallel=2,
    ),
    "chain": BatchSpec(
        "demo.evaluate",
        (("evaluate", "runs/demo", "--split", "test"),),
        "/launches/demo/x.log",
        gpus_per_node=1,
    ),
    "tune": BatchSpec(
        "demo.tune", (("tune", "--space", "infovae"),), "/launches/demo/tune-%j.log", engine="ray"
    ),
}
HOSTILE = (
    "it's",
    'a "b" c',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "a\\b",
    "*",
    "~root",
    "#x",
    "--x",
    "",
    "é ü",
    "!!",
    "${HOME}",
    "a&b|c>d",
)


def filled(name: str, site: str, spec: BatchSpec | None = None) -> str:
    file = Path("/launches/demo/site.yaml")
    return batch_script(name, spec or SPECS[name], SITES[site], file, Path("/venv/bin"))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_golden(name: str, site: str) -> None:
    text = filled(name, site)
    path = GOLDEN / f"{site}-{name}.txt"
    if os.environ.get("VAEDIST_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_no_golden_text_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{s}-{n}.txt" for s in SITES for n in TEMPLATES}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_script_can_be_stopped_and_goes_on(name: str, site: str) -> None:
    lines = filled(name, site).splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--open-mode=append", "--signal=B:USR1@180"} <= set(options)
    assert ("--requeue" in options) == (SITES[site].continue_by == "requeue")
    names = [option.partition("=")[0] for option in options]
    assert len(names) == len(set(names)), "each option once"
    assert not [option for option in options if "wckey" in option]
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert all(lines.index(f"#SBATCH {option}") < first for option in options), (
        "sbatch reads to the first command"
    )
    assert any(line.startswith("trap '' USR1") for line in lines)
    assert (lines[-1] == LAST_LINE) == (SITES[site].container is None)


def test_the_module_that_queued_jobs_run_keeps_its_name() -> None:
    """Scripts wait in the queue for days: renaming the module would end them all at their start."""
    assert LAST_LINE == 'exec python -m vaedist.slurm.supervisor "$@"'
    for text in [
        *(path.read_text() for path in (ROOT / "cluster").glob("*.sbatch")),
        filled("train", "generic"),
    ]:
        assert text.endswith(f"\n{LAST_LINE}\n")
    done = subprocess.run(
        [sys.executable, "-m", "vaedist.slurm.supervisor", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--engine", "--ranks-per-node", "--continue-by", "--max-restarts"):
        assert option in done.stdout


def scripts() -> list[Path]:
    shell = [*(ROOT / "cluster").glob("*.s*"), *(ROOT / "jobs").glob("*.sh"), ROOT / "jobs" / "start"]
    return sorted(path for path in [*shell, *GOLDEN.glob("*.txt")] if path.is_file())


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI"):
            pytest.fail("shellcheck must be there in continuous integration")
        pytest.skip("shellcheck is not installed")
    assert len(scripts()) > 30
    # SC1090, SC1091: files that are only there on a cluster, or found at run time.
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "--exclude=SC1090,SC1091", *scripts()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[:5000]


# What the shell makes of it ---------------------------------------------------------------------------------


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A `python` that writes down its arguments and environment in place of running a supervisor."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = folder / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['WITNESS'], 'w'))\n"
        "sys.exit(int(os.environ.get('WITNESS_CODE', '0')))\n"
    )
    python.chmod(0o755)
    return folder


def run(text: str, folder: Path, *words: str, **variables: str) -> tuple[list[str], dict[str, str], int]:
    script = folder / "slurm_script"
    script.write_text(text)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "WITNESS": str(folder / "seen.json"),
        "SLURM_SUBMIT_DIR": str(folder),
        **variables,
    }
    done = subprocess.run(
        ["bash", script, *words], env=environment, capture_output=True, text=True, cwd="/", timeout=60
    )
    assert (folder / "seen.json").exists(), done.stderr
    arguments, seen = json.loads((folder / "seen.json").read_text())
    return arguments, seen, done.returncode


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_values_arrive_as_they_are(name: str, witness: Path, tmp_path: Path) -> None:
    site = Site(variables={f"V{number}": value for number, value in enumerate(HOSTILE)})
    several = name == "array"
    task = ("train", *HOSTILE)
    spec = BatchSpec("x", (task, task) if several else (task,), "/x.log")
    text = batch_script(name, spec, site, Path("/a b/$(touch pwned)'s.yaml"), witness)
    arguments, seen, code = run(text, tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert (arguments, code) == (["-m", "vaedist.slurm.supervisor", *task], 0)
    assert [seen[f"V{number}"] for number in range(len(HOSTILE))] == list(HOSTILE)
    assert seen["VAEDIST_SITE"] == "/a b/$(touch pwned)'s.yaml"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "a\x1fb", "a\u2028b"])
def test_what_cannot_be_quoted_is_refused(value: str) -> None:
    for spec in (BatchSpec("x", (("train", value),), "/x.log"), BatchSpec(value, (("train",),), "/x.log")):
        with pytest.raises(UserError, match="line break or another control character"):
            batch_script("train", spec, Site(), Path("/site.yaml"), None)


def test_a_backslash_in_an_option_is_refused() -> None:
    with pytest.raises(UserError, match="no backslash"):
        batch_script("train", BatchSpec("x", (("train",),), "/a\\b.log"), Site(), Path("/site.yaml"), None)


def test_each_task_of_an_array_runs_its_own_line(witness: Path, tmp_path: Path) -> None:
    text = batch_script("array", SPECS["array"], Site(), Path("/site.yaml"), witness)
    for number in range(3):
        arguments, _, _ = run(text, tmp_path, SLURM_ARRAY_TASK_ID=str(number))
        assert arguments[-1] == f"seed={number}"
    (tmp_path / "seen.json").unlink()
    with pytest.raises(AssertionError, match="there is no task 3 in this array"):
        run(text, tmp_path, SLURM_ARRAY_TASK_ID="3")


@pytest.mark.parametrize(
    ("name", "words", "arguments"),
    [
        ("train", ["a b.yaml", "x=1"], ["train", "a b.yaml", "x=1"]),
        ("chain", ["evaluate", "runs/a"], ["evaluate", "runs/a"]),
        ("tune", ["--space", "infovae"], ["tune", "--space", "infovae"]),
        (
            "array",
            ["jobs/vae.yaml", "x=1"],
            ["train", "jobs/vae.yaml", "seed=4", "--run-dir", "runs/vae-seed-4", "x=1"],
        ),
    ],
)
def test_a_template_works_by_hand(
    name: str, words: list[str], arguments: list[str], witness: Path, tmp_path: Path
) -> None:
    """With what `--print-env` exports; a line of the site that a strict shell would choke on included."""
    site = Site(setup=('echo "$UNSET_BY_CONDA"', "export FROM_SETUP='x y'"), variables={"MINE": "it's"})
    lines, without_variable = environment_exports(site, Path("/site.yaml"))
    assert without_variable == ""
    exported = dict(
        line.split("=", 1)
        for line in subprocess.run(
            ["bash", "-c", 'eval "$1"; env -0', "bash", "\n".join(lines)],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.environ["PATH"]},
        ).stdout.split("\0")
        if line.startswith("VAEDIST_")
    )
    seen_arguments, seen, code = run(
        (ROOT / "cluster" / f"{name}.sbatch").read_text(),
        tmp_path,
        *words,
        SLURM_ARRAY_TASK_ID="4",
        **exported,
    )
    assert (seen_arguments, code) == (["-m", "vaedist.slurm.supervisor", *arguments], 0)
    assert (seen["FROM_SETUP"], seen["MINE"], seen["VAEDIST_SITE"]) == ("x y", "it's", "/site.yaml")
    assert seen["VAEDIST_SCRIPT"] == str(tmp_path / "slurm_script")
    assert seen["VAEDIST_SCRIPT_ARGUMENTS"].split("\x1f") == words
    assert seen["PWD"] == str(tmp_path), "it runs where it was handed in"


def test_the_site_for_plain_sbatch() -> None:
    lines, without_variable = environment_exports(SITES["example"], Path("/my site.yaml"))
    assert "export SBATCH_PARTITION=gpu" in lines
    assert "export SBATCH_CONSTRAINT='a100|h100'" in lines
    assert "export SBATCH_GRES=gpu:a100:2" in lines
    assert "export SBATCH_RESERVATION=course" in lines
    assert "export VAEDIST_SITE='/my site.yaml'" in lines
    assert not [line for line in lines if "TIMELIMIT" in line], "a script's own time would lose against it"
    assert (
        without_variable
        == "--cpus-per-task=8 --mail-user=someone@example.org --mail-type=END,FAIL --exclude='node[13-14]'"
    )
    lines, _ = environment_exports(Site(time_max="01:00:00", continue_by="none"), Path("/s"))
    assert {"export SBATCH_TIMELIMIT=01:00:00", "export SBATCH_NO_REQUEUE=1"} <= set(lines)


# In a container ---------------------------------------------------------------------------------------------


@pytest.fixture
def container(witness: Path) -> Path:
    """Stand-ins for apptainer, which runs a command somewhere else, and for scontrol, which writes down its order."""
    apptainer = witness / "apptainer"
    apptainer.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$HOME/apptainer"\nshift 5\nexec "$@"\n')
    scontrol = witness / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$@" >"$HOME/ordered"\n')
    for path in (apptainer, scontrol):
        path.chmod(0o755)
    return witness


@pytest.mark.parametrize(
    ("code", "restarts", "ordered"),
    [(75, 0, True), (75, 2, True), (75, 3, False), (0, 0, False), (2, 0, False)],
)
def test_outside_the_container_the_script_requeues(
    code: int, restarts: int, ordered: bool, container: Path, tmp_path: Path
) -> None:
    arguments, _, left = run(
        filled("train", "container"),
        tmp_path,
        WITNESS_CODE=str(code),
        SLURM_JOB_ID="12",
        SLURM_RESTART_COUNT=str(restarts),
    )
    assert arguments[:4] == ["-m", "vaedist.slurm.supervisor", "--continue-by", "none"]
    seen = (tmp_path / "apptainer").read_text().split("\n")[:5]
    assert seen == ["exec", "--nv", "--bind", "/launches/demo", "/shared/vae dist.sif"]
    assert (tmp_path / "ordered").exists() == ordered
    assert left == (0 if ordered else code), "scontrol's own where it was asked"


def test_in_a_container_the_signal_is_passed_on(container: Path, tmp_path: Path) -> None:
    (container / "python").write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, pathlib, os, time\n"
        "def heard(*_):\n"
        "    time.sleep(0.5)  # saves\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, heard)\n"
        "pathlib.Path(os.environ['HOME'], 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    script = tmp_path / "slurm_script"
    script.write_text(filled("train", "container"))
    environment = {"PATH": f"{container}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", script], env=environment, cwd=tmp_path) as process:
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 0
    assert (tmp_path / "ordered").read_text() == "requeue 7\n"


def test_a_container_gets_the_scratch_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    site = SITES["container"].model_copy(update={"scratch": "/scratch/$USER"})
    text = batch_script("train", SPECS["train"], site, Path("/launches/demo/site.yaml"), None)
    assert (
        "apptainer exec --nv --bind /launches/demo --bind /scratch/ada '/shared/vae dist.sif' python" in text
    )
    with pytest.raises(UserError, match="Apptainer cannot take"):
        batch_script("train", SPECS["train"], site, Path("/a:b/site.yaml"), None)


def test_a_container_takes_one_node() -> None:
    with pytest.raises(UserError, match="--nodes 2 cannot work"):
        filled("train", "container", BatchSpec("x", (("train",),), "/x.log", nodes=2))


# Setting up -------------------------------------------------------------------------------------------------


def test_the_environment_script_says_what_is_wrong(tmp_path: Path) -> None:
    """What it does when nothing is wrong needs the internet."""

    def said(*words: object) -> str:
        script = ROOT / "cluster" / "environment.sh"
        environment = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", script, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert said().count("environment.sh") == said("instal").count("environment.sh") == 3
    assert "there is no source of vaedist in ." in said("fetch", "wheels")
    (tmp_path / "python-version").write_text("2.7\n")
    assert "these wheels are for Python 2.7" in said("install", tmp_path, tmp_path / "venv")
    assert not (tmp_path / "venv").exists()
