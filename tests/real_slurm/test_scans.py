"""Raw volumes to slices drawn by what a search found, over two nodes: the commands of cluster/README.md, shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel import orientations
from PIL import Image

from tests.real_slurm.cluster import Slurm
from tests.real_slurm.test_launch import ROOT, SITE
from tests.run_commands import last_step
from vaedist.slurm import launch_record

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

COMMANDS = [
    line.strip()
    for line in (ROOT / "cluster" / "README.md").read_text().replace("\\\n", " ").splitlines()
    if re.match(
        r"    vaedist-(shard scans|launch --space vqvae --site mysite|launch runs/tune_vqvae/best)", line
    )
]
SHORTER = "train.threads=1 train.log_every=5 train.validate_every=10 train.save_every=10"


def head(generator: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """An ellipsoid of noise in air, in a scanner's arbitrary units."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.9) ** 2 + (z / 0.95) ** 2 < 1
    return (inside * (900 + 200 * y + generator.normal(0, 60, shape))).astype(np.int16)


def write_scans(folder: Path) -> None:
    """Ten patients with two contrasts each: every second turned and packed, of several sizes and voxels."""
    generator = np.random.Generator(np.random.PCG64(7))
    for patient in range(10):
        for number, contrast in enumerate(("T1", "T2")):
            shape = (40 + 4 * (patient % 3), 48, 8 + number)
            affine = np.diag([1.0, 1.0 + 0.1 * (patient % 2), 3.0, 1.0])
            image = nibabel.Nifti1Image(head(generator, shape), affine)
            if patient % 2:
                turn = orientations.axcodes2ornt(tuple("PIR"))
                image = image.as_reoriented(
                    orientations.ornt_transform(orientations.axcodes2ornt(tuple("RAS")), turn)
                )
            place = folder / f"patient{patient}" / f"{contrast}.nii{'.gz' if patient % 2 else ''}"
            place.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(image, place)


def test_from_volumes_to_a_searched_model_with_a_prior(slurm: Slurm, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    (tmp_path / "mysite.yaml").write_text(SITE)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    scripts = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    environment = slurm.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": scripts}
    environment.pop("VAEDIST_DATA", None)

    def shell(command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    shard, search, chain = COMMANDS
    told = shell(shard.replace("--size 64", "--size 32"))
    assert re.findall(r"(\w+) +\d+ images, (\d+) subjects", told) == [
        ("train", "7"),
        ("validate", "1"),
        ("test", "2"),
    ]

    # The search, on both nodes at once.
    told = shell(f"{search} --trials 3 train.steps=20 {SHORTER}")
    assert "results: runs/tune_vqvae/results.csv" in told
    (job,) = re.findall(r"^tune: job (\d+)", told, re.MULTILINE)
    assert slurm.wait(job, seconds=240) == "COMPLETED", shell("vaedist-launch logs")
    assert "Ray on 2 nodes" in shell("vaedist-launch logs -n 100")
    best = tmp_path / "runs" / "tune_vqvae" / "best"
    assert json.loads((best / "finished.json").read_text())

    # What it found, for longer, with a prior; no link needs to be told again where the images are.
    chain = re.sub(r"train\.steps=\d+'", f"train.steps=10 {SHORTER}'", chain)
    told = shell(f"{re.sub(r'train[.]steps=[0-9]+ ', 'train.steps=30 ', chain, count=1)} {SHORTER}")
    assert "launches/best (" in told
    for link in launch_record.read(tmp_path / "launches" / "best"):
        state = slurm.wait(link.job, seconds=240)
        assert state == "COMPLETED", shell(f"vaedist-launch logs --stage {link.link}")
    assert "2 nodes x 1 ranks" in shell("vaedist-launch logs -n 100 --stage prior")
    assert "Grad strides" not in shell("vaedist-launch logs -n 100 --stage prior")
    runs = tmp_path / "runs"
    prior = runs / "pixelcnn_phantom-of-scans"
    assert (last_step(runs / "scans"), last_step(prior)) == (30, 10)
    found = json.loads((prior / "evaluation" / "test" / "metrics.json").read_text())
    assert found["data"]["split"] == "test"
    with Image.open(prior / "samples.png") as picture:
        assert np.asarray(picture).std() > 0
