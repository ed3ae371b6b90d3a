"""A small job and a packed folder without images, for tests of run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vaedist.config.job import Job
from vaedist.config.settings import apply_overrides, parse
from vaedist.data.format.index import DatasetInfo, Index, write_index

BODY = {"kind": "mlp", "width": 8}
CONTENT: dict[str, Any] = {
    "model": {"kind": "vae", "encoder": BODY, "latent": 2},
    "train": {"steps": 100, "batch_size": 24},
}


def job(*overrides: str) -> Job:
    return parse(Job, apply_overrides(CONTENT, overrides), where="test")


def empty_index(folder: Path) -> Index:
    folder.mkdir()
    write_index(folder, {"train": []}, DatasetInfo((1, 8, 8), "png", ("ill", "well")), identity="ab" * 32)
    return Index.open(folder)
