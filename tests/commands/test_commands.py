"""Commands parse, call and print: `--help` answers before any heavy library is loaded, and mistakes are one line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
VERBS = sorted(name.removeprefix("vaedist-") for name in SCRIPTS)
HEAVY = {
    "torch",
    "ray",
    "skimage",
    "matplotlib",
    "numpy",
    "scipy",
    "sklearn",
    "PIL",
    "webdataset",
    "pydantic",
    "tensorboard",
    "optuna",
    "yaml",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_verbs_are_those_that_exist() -> None:
    """No stub is shipped: a command stands in pyproject.toml if and only if its module is there."""
    commands = {"shard", "train", "tune", "evaluate", "sample", "launch", "export", "board"}
    assert set(VERBS) == {path.stem for path in (ROOT / "vaedist").glob("*.py")} & commands
    assert {f"vaedist-{verb}": f"vaedist.{verb}:main" for verb in VERBS} == SCRIPTS


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb: str) -> None:
    """Not timed, which would be noise on a busy machine: what costs time is what was imported."""
    done = run(sys.executable, "-X", "importtime", "-m", f"vaedist.{verb}", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"vaedist-{verb}" in done.stdout
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert loaded & HEAVY == set()
    assert {"argparse", "vaedist"} <= loaded  # the listing was read


IN_PROCESS = """
import importlib, sys
try:
    code = importlib.import_module(f"vaedist.{sys.argv[1]}").main(sys.argv[2:])
except SystemExit as exit:
    code = exit.code
print(code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("train --print-completion bash", 0),
        ("launch JOB data.path=DATA --site generic --dry-run", 0),
        ("launch JOB data.path=DATA --site generic --dry-run --grid model.latent=2,x", 2),
        ("train JOB model.latnet=3", 2),
        ("train JOB model.kind=vqave", 2),
        ("train JOB --engine srun --workers 2", 2),
        ("train JOB data.path=nowhere --workers 2", 2),
        ("train JOB data.path=DATA train.steps=2 train.batch_size=8 --workers 2 --device cpu", 0),
    ],
)
def test_a_process_that_does_not_compute_loads_no_torch(
    words: str, code: int, phantom: Path, tmp_path: Path
) -> None:
    """A completion script, a dry run, a refusal, and the launcher of a run: its workers load torch, it does not."""
    places = {"JOB": str(ROOT / "jobs" / "vae_phantom.yaml"), "data.path=DATA": f"data.path={phantom}"}
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, *(places.get(word, word) for word in words.split())],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{code} False", done.stderr[-2000:]


@pytest.mark.parametrize("verb", VERBS)
def test_console_script_is_the_same_command(verb: str) -> None:
    script = Path(sys.executable).parent / f"vaedist-{verb}"
    assert script.exists(), f"{script.name} is not installed: pip install -e '.[test]'"
    as_script, as_module = run(str(script), "--help"), run(sys.executable, "-m", f"vaedist.{verb}", "--help")
    assert as_script.returncode == as_module.returncode == 0
    assert as_script.stdout == as_module.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    parser = importlib.import_module(f"vaedist.{verb}").build_parser()
    assert parser.prog == f"vaedist-{verb}"
    assert parser.description
    silent = [action.dest for action in parser._actions if not action.help]
    assert silent == []


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_refused_with_exit_code_2(verb: str) -> None:
    done = run(sys.executable, "-m", f"vaedist.{verb}", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


MISTAKES = {
    "train": ["no-such-job.yaml"],
    "evaluate": ["no-such-run"],
    "sample": ["no-such-run"],
    "tune": ["--space", "no-such-space"],
    "launch": ["--local", "no-such-job.yaml"],
    "export": ["no-such-run", "no-such-run"],
    "board": ["no-such-run"],
}


@pytest.mark.parametrize("verb", sorted(set(MISTAKES) & set(VERBS)))
def test_a_mistake_is_one_sentence(verb: str) -> None:
    done = run(sys.executable, "-m", f"vaedist.{verb}", *MISTAKES[verb])
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"vaedist-{verb}: error: ")
    assert MISTAKES[verb][-1] in lines[0]
