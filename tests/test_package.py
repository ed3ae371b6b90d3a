"""The wheel and the sdist hold what the doors need, away from the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.run_commands import ROOT, small_job, write_job

pytestmark = pytest.mark.slow  # it builds, fetches and installs
DOORS = ("shard", "train", "tune", "evaluate", "sample", "launch", "export", "board")


def tracked(folder: str) -> set[str]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As an index would get it; pip fetches what builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(command, check=True)
    return site


def run(site: Path, place: Path, *command: str | Path) -> str:
    """Standard output of a command in `place`, with the installed package before the sources."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package_and_of_the_cluster(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == tracked("vaedist") | {f"vaedist/{name}" for name in tracked("cluster")}


def test_it_works_away_from_the_sources(installed: Path, tmp_path: Path, phantom: Path) -> None:
    assert run(installed, tmp_path, "-c", "import vaedist; print(vaedist.__file__)").startswith(
        str(installed)
    )
    for door in DOORS:
        assert run(installed, tmp_path, installed / "bin" / f"vaedist-{door}", "--help").startswith(
            f"usage: vaedist-{door}"
        )
    for space in ("beta_vae", "gan", "infovae", "mmdvae", "vqvae"):
        assert "dimensions:" in run(
            installed, tmp_path, "-m", "vaedist.tune", "--space", space, "--print-space"
        )
    job = write_job(tmp_path / "job.yaml", small_job(phantom, steps=2, validate_every=2))
    out = run(installed, tmp_path, "-m", "vaedist.train", job, "--run-dir", "run")
    assert "finished after 2 steps" in out
    measure = ("-m", "vaedist.evaluate", "run", "--num-samples", "32", "--report", "report.html")
    assert "kid[" in run(installed, tmp_path, *measure), "with the extractor that comes with it"
    assert "<html" in (tmp_path / "report.html").read_text()
    order = ("-m", "vaedist.launch", "job.yaml", "--site", "site.yaml", "--dry-run")
    (tmp_path / "site.yaml").write_text("partition: short\n")
    assert "#SBATCH --partition=short" in run(installed, tmp_path, *order), (
        "from the templates that come with it"
    )


def test_the_sdist_holds_what_the_repository_does(tmp_path: Path) -> None:
    """Built by the build backend itself, in an environment of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "hatch", "hatchling"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hatch")}
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=environment)
    (archive,) = (tmp_path / "dist").glob("vaedist-*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {name for name in tracked(".") if not name.startswith(".")}
    assert wanted <= held, sorted(wanted - held)
    assert {name for name in held if not name.startswith(".")} - wanted == {"PKG-INFO"}
