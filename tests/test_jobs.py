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
    lines = code.strip().splitlines()
    assert len(lines) <= 12, "what scripts share belongs into jobs/start"
    assert f"job={path.stem} " in code
    assert lines[-1].startswith('source "$start" ')
    assert lines[-1].endswith(' "$@"')


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


class Spool:
    """A script in the way that a batch job runs it: a copy, under a Slurm that knows where it was submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submitted = folder / "submit dir"
        self.submitted.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        # A supervisor that prints the job file and what a successor would get; an installed package.
        python = f'#!/bin/sh\n[ "$2" = vaedist.slurm.supervisor ] || exec {sys.executable} "$@"\n'
        python += 'printf "%s\\n" "$3 $4 $5" "$VAEDIST_SCRIPT" "$VAEDIST_SCRIPT_FOLDER" "$VAEDIST_SCRIPT_ARGUMENTS"\n'
        self.tool(tools / "python", python)
        self.tool(tools / "vaedist-train", "#!/bin/sh\nexit 9\n")
        self.tools = [tools]

    @staticmethod
    def tool(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, text: str, *words: str, submitted_as: str = "", **variables: str) -> list[str]:
        """What the supervisor got: its arguments, and the three variables for a successor."""
        copy = self.folder / "spool" / "slurm_script"
        self.tool(copy, text)
        command = submitted_as or str(copy)
        line = (
            f"JobId=7 JobName=x Command={command} {' '.join(words)} WorkDir={self.submitted} StdIn=/dev/null"
        )
        self.tool(self.folder / "slurm" / "scontrol", f"#!/bin/sh\necho '{line}'\n")
        (self.folder / "shards").mkdir(exist_ok=True)
        (self.folder / "shards" / "index.json").touch()
        path = [self.folder / "slurm", *self.tools, "/usr/bin", "/bin"]
        done = subprocess.run(
            ["bash", copy, *words],
            cwd="/",
            env={
                "PATH": ":".join(map(str, path)),
                "PYTHONPATH": str(ROOT),
                "SLURM_JOB_ID": "7",
                "SLURM_SUBMIT_DIR": str(self.submitted),
                "VAEDIST_DATA": str(self.folder / "shards"),
                **variables,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-4:]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


SCRIPT = (ROOT / "jobs" / "vae_phantom.sh").read_text()


@pytest.mark.parametrize("lends", ["all", "only the job file"])
@pytest.mark.parametrize("where", ["submission folder", "folder of the script", "package"])
def test_the_job_file_beside_the_submitted_script_wins(spool: Spool, where: str, lends: str) -> None:
    """Blanks in every path; a folder may hold the job file alone, without jobs/start."""
    folder, submitted_as = ROOT / "jobs", ""
    if where == "submission folder":
        folder = spool.submitted / "jobs"
    elif where == "folder of the script":
        folder = spool.folder / "my own" / "experiments"
        submitted_as = str(folder / "vae_phantom.sh")
    if where != "package":
        folder.mkdir(parents=True)
        (folder / "vae_phantom.yaml").touch()
        if lends == "all":
            (folder / "start").write_text((ROOT / "jobs" / "start").read_text())
    arguments, *_ = spool.run(SCRIPT, "x=1", submitted_as=submitted_as)
    assert arguments == f"train {folder}/vae_phantom.yaml x=1"


def test_the_submission_folder_comes_first(spool: Spool) -> None:
    for folder in (spool.submitted / "jobs", spool.folder / "other" / "jobs"):
        folder.mkdir(parents=True)
        (folder / "vae_phantom.yaml").touch()
    arguments, *_ = spool.run(SCRIPT, submitted_as=f"{spool.folder}/other/jobs/vae_phantom.sh")
    assert arguments.strip() == f"train {spool.submitted}/jobs/vae_phantom.yaml"


def test_a_successor_reads_the_job_file_of_its_predecessor(spool: Spool) -> None:
    """It is submitted from the spool, so Slurm cannot say where the first script lay."""
    folder = spool.folder / "my own"
    folder.mkdir()
    (folder / "vae_phantom.yaml").touch()
    first = spool.run(SCRIPT, "x=1", "name=a b", submitted_as=f"{folder}/vae_phantom.sh")
    script, kept, words = first[1:]
    assert script == f"{spool.folder}/spool/slurm_script"
    assert words.split("\x1f") == ["x=1", "name=a b"]
    assert spool.run(SCRIPT, *words.split("\x1f"), VAEDIST_SCRIPT_FOLDER=kept) == first


@pytest.mark.parametrize("project", ["submission folder", "folder of the script"])
def test_no_environment_need_be_active(spool: Spool, project: str) -> None:
    """The project's own `.venv` is found, of the script's folder before that of the submission folder."""
    (tools,), spool.tools = spool.tools, []
    here = spool.submitted / ".venv"
    here.mkdir()
    (here / "bin").symlink_to(tools)
    jobs, submitted_as = ROOT / "jobs", ""
    if project == "folder of the script":
        jobs = spool.folder / "a project" / "jobs"
        jobs.mkdir(parents=True)
        (jobs / "vae_phantom.yaml").touch()
        (here / "bin").unlink()
        (spool.folder / "a project" / ".venv").mkdir()
        (spool.folder / "a project" / ".venv" / "bin").symlink_to(tools)
        submitted_as = f"{jobs}/vae_phantom.sh"
    arguments, *_ = spool.run(SCRIPT, submitted_as=submitted_as)
    assert arguments.strip() == f"train {jobs}/vae_phantom.yaml"


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
