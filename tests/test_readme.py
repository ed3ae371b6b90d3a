"""The README's commands run as they stand there, in the order of the page, in one fresh copy of the repository.

A block may be followed by a remark: `<!-- test: shortened -->` trains two steps instead of all, through a
`vaedist-train` that appends the settings; `<!-- test: not run here, because ... -->` gives the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTER = "train.steps=2 train.epochs=null train.validate_every=2 train.save_every=2 train.log_every=1"


class Block(NamedTuple):
    language: str
    code: str
    remark: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.remark.startswith("not run here, because ")


BLOCKS = [
    Block(language, code, remark or "")
    for language, code, remark in re.findall(
        r"^```(\w*)\n(.*?)^```\n(?:<!-- test: (.*?) -->)?", README, re.MULTILINE | re.DOTALL
    )
]


def test_every_block_is_understood() -> None:
    assert README.count("\n```") == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml"}
    for block in BLOCKS:
        assert block.remark in ("", "shortened") or block.remark.startswith("not run here, because ")
    assert sum(block.runs for block in BLOCKS) >= 5


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"])
def test_job_files_of_the_readme_are_valid(block: Block) -> None:
    parse(Job, yaml.safe_load(block.code), "README.md")


def test_links_and_files_of_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:vaedist|jobs|tools|tests)/[\w./-]+)`", README))
    named |= set(re.findall(r"(?:^|\s)((?:jobs|tools)/[\w.-]+)", " ".join(block.code for block in BLOCKS)))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_exit_codes_of_the_readme_are_those_of_the_code() -> None:
    from vaedist.core import errors

    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    classes = [UserError, *UserError.__subclasses__()]
    ends = {errors.EXIT_FINISHED, 1, errors.EXIT_STOPPED, errors.EXIT_INTERRUPTED}
    assert codes == ends | {one.exit_code for one in classes}


@pytest.mark.docs
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    copy = tmp_path / "vaedist"
    here = {
        ".git",
        ".venv",
        "runs",
        "shards",
        "quickstart",
        "bench",
    }  # of the top level: `vaedist/runs` is a room

    def ignored(folder: str, names: list[str]) -> set[str]:
        caches = {name for name in names if name == "__pycache__" or name.endswith("_cache")}
        return caches | (here if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, copy, ignore=ignored)
    _what_the_reader_has(copy)
    scripts, shims = Path(sys.executable).parent, tmp_path / "shims"
    shims.mkdir()
    shim = shims / "vaedist-train"
    shim.write_text(f'#!/bin/sh\nexec "{scripts}/vaedist-train" "$@" $SHORTER\n')
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{shims}:{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(copy)}
    environment.pop("VAEDIST_DATA", None)
    exported = ""
    for block in BLOCKS:
        if not block.runs:
            continue
        python = [sys.executable, "-c", block.code]
        bash = ["bash", "-euo", "pipefail", "-c", exported + block.code]
        done = subprocess.run(
            python if block.language == "python" else bash,
            cwd=copy,
            env={**environment, "SHORTER": SHORTER if block.remark == "shortened" else ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        exported += "".join(line + "\n" for line in block.code.splitlines() if line.startswith("export "))
    assert (copy / "photos.html").is_file() and (copy / "photos.yaml").is_file()
    for made in (
        "samples.png",
        "classes.png",
        "photo_and_reconstruction.png",
        "runs/vae_phantom/evaluation/test/pairs.png",
    ):
        with Image.open(copy / made) as picture:
            assert min(picture.size) > 16, made


def _what_the_reader_has(folder: Path) -> None:
    """A photo, a folder in OASIS layout and one of classes: the README's examples of the reader's own images."""
    rng = np.random.Generator(np.random.PCG64(0))

    def image(path: Path, *shape: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)

    image(folder / "photo.png", 80, 60)
    for split, cases in (("train", range(1, 41)), ("validate", range(41, 45)), ("test", range(45, 49))):
        for case in cases:
            image(folder / "oasis" / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_0.nii.png", 64, 64)
    for kind in ("cats", "old cars"):
        for number in range(40):
            image(folder / "photos" / kind / f"{number}.png", 40, 30 + number, 3)
