"""What the table of mistakes works on: files and folders that are wrong in one way each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

JOB: dict[str, Any] = {
    "name": "small",
    "model": {"kind": "vae", "encoder": {"kind": "mlp", "width": 16, "depth": 1}, "latent": 3},
    "train": {
        "steps": 4,
        "batch_size": 8,
        "threads": 1,
        "validate_every": 2,
        "save_every": 2,
        "ema_half_life": 50,
    },
}
SPACE: dict[str, Any] = {
    "name": "small",
    "base": {"model": JOB["model"], "train": JOB["train"]},
    "dimensions": {"model.latent": {"kind": "choice", "values": [2, 4]}},
    "objectives": [{"metric": "rate"}, {"metric": "distortion"}],
    "trials": 3,
}
PRIOR = {"kind": "pixelcnn", "net": {"width": 8, "layers": 2, "hidden": 8}}


def files(place: Path, data: Path, vqvae: Path) -> None:
    """Job files, spaces, sites and whatever else a person may name by mistake."""
    texts = {
        "unclosed.yaml": "a: [1, 2\n",
        "list.yaml": "- 1\n",
        "empty.yaml": "",
        "twice.yaml": "name: a\nname: b\n",
        "tab.yaml": "name: a\n\tseed: 1\n",
        "typo_site.yaml": "partiton: gpu\n",
        "gpu_site.yaml": "gpu_syntax: gres\n",
        "notes.txt": "hello\n",
        "page.png": "<html>404</html>",
        "module.pt": "no zip",
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    job = JOB | {"data": {"path": str(data)}}
    no_kind = job | {"model": {"latent": 3}}
    prior = job | {"model": PRIOR | {"tokenizer": str(vqvae)}}
    space = SPACE | {
        "data": {"path": str(data), "make": "vaedist-shard phantom --out shards/phantom", "phantom": 16}
    }
    wrong = {"model.latnet": {"kind": "choice", "values": [2, 4]}}
    for name, content in {
        "job.yaml": job,
        "no_kind.yaml": no_kind,
        "no_data.yaml": JOB,
        "prior.yaml": prior,
        "space.yaml": space,
        "typo_space.yaml": space | {"dimensions": wrong},
        "loss_space.yaml": space | {"objectives": [{"metric": "loss"}]},
        "low_space.yaml": space
        | {"dimensions": {"model.beta": {"kind": "loguniform", "low": 20, "high": 10}}},
    }.items():
        (place / name).write_text(yaml.safe_dump(content))


def pictures(place: Path) -> None:
    """Folders of image files: sound ones, one that is a web page, rectangles, none."""
    (place / "nothing").mkdir()
    for label, sizes in {"cat": [(20, 20), (20, 24)], "dog": [(20, 20)]}.items():
        folder = place / "photos" / label
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("L", size, 40 * number + 9).save(folder / f"{number}.png")
    (place / "broken").mkdir()
    shutil.copy(place / "page.png", place / "broken" / "a.png")
    Image.new("L", (16, 16)).save(place / "one.png")


def runs(place: Path, vae: Path) -> None:
    """Copies of a finished run, each spoilt."""

    def copy(name: str) -> list[Path]:
        shutil.copytree(vae, place / name)
        return sorted((place / name / "checkpoints").iterdir())

    for checkpoint in copy("newer"):
        manifest = checkpoint / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    for checkpoint in copy("torn"):
        state = checkpoint / "state.pt"
        state.write_bytes(state.read_bytes()[:1000])
    for checkpoint in copy("no_manifest"):
        (checkpoint / "manifest.json").unlink()
    copy("no_checkpoint")
    shutil.rmtree(place / "no_checkpoint" / "checkpoints")


def packed(place: Path, data: Path) -> None:
    """Copies of a packed folder, each spoilt."""

    def copy(name: str) -> Path:
        shutil.copytree(data, place / name)
        for path in (place / name).iterdir():
            path.chmod(0o644)
        return place / name

    (copy("half") / "test-000000.tar").unlink()
    (copy("no_json") / "index.json").write_text("{")
    index = copy("newer_index") / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))
