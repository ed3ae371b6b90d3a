"""Make what lies beside this file, with the code of commit 369db07: files that later code must go on reading.

    git clone . THEN && git -C THEN checkout 369db07
    mkdir THEN/tests/made_at_369db07 && cp tests/made_at_369db07/make.py THEN/tests/made_at_369db07/
    cd THEN && OMP_NUM_THREADS=1 PYTHONPATH=$PWD python tests/made_at_369db07/make.py

Everything is made below ROOT, a folder in the root of the file system that no machine has, by the commands that users
type, and is then copied beside this file. So an absolute path in these files begins with ROOT, and the tests put their
own place there; job files say `$MADE` for it. Only what tells of the machine is rewritten: its name, and where its
Python lies.
It takes about a minute. It needs the rights of root, or a ROOT that was made beforehand, empty.

    shards/        vaedist-shard phantom; foreign/ are tars of others with our index
    jobs/          the job files and the search space
    runs/KIND/     a run that was asked to stop in its middle: 12 steps wanted, 6 done
    told/KIND.json what 369db07 made of it: the rows of the rest and of all validations, digests of the last weights,
                   an evaluation; KIND.npz: samples, latents and reconstructions of the run that was stopped
    launches/tiny/ vaedist-launch --local, a chain of three; launched/ is its run
    search/        vaedist-tune, two trials; told/search.jsonl: the record after a third
    export/vae/    vaedist-export of runs/vae, with programs
    told/links.json  symbolic links (search/best), which a source distribution would not keep as such

The digest of weights is the sha256 over the sorted names of a state dict, each followed by its tensor's bytes (C order,
little-endian) with nothing between.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path("/made_at_369db07")
HERE = Path(__file__).resolve().parent
PACK = ["phantom", "--size", "16", "--count", "train=40,validate=16,test=16", "--samples-per-shard", "32"]
STEPS, STOPPED = 12, 6

BODY = {"kind": "resnet", "width": 4, "depth": 1, "downsample": 4}
SMALL = {"kind": "conv", "width": 4, "depth": 0, "downsample": 4}
CRITIC = SMALL | {"norm": "none"}
CODES = {"kind": "ema", "codes": 16, "dim": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vae": {
        "kind": "vae",
        "latent": 4,
        "encoder": BODY,
        "beta": {"start": 0.1, "end": 1.0, "steps": 4},
        "condition": {"dropout": 0.2, "how": "concat"},
    },
    "infovae": {"kind": "infovae", "latent": 4, "encoder": SMALL, "alpha": 0.5, "mmd_weight": 100.0},
    "vqvae": {"kind": "vqvae", "encoder": BODY, "codebook": CODES},
    "gan": {
        "kind": "gan",
        "latent": 4,
        "generator": SMALL,
        "discriminator": CRITIC,
        "output": "sigmoid_logits",
        "r1_every": 4,
        "diffaugment": ["translation"],
    },
    "vaegan": {"kind": "vaegan", "latent": 4, "encoder": SMALL, "discriminator": CRITIC, "r1_every": 4},
    "pixelcnn": {
        "kind": "pixelcnn",
        "tokenizer": "$MADE/runs/vqvae",
        "net": {"width": 4, "layers": 2, "first": 3, "hidden": 8},
    },
    "transformer": {
        "kind": "transformer",
        "tokenizer": "$MADE/runs/vqvae",
        "net": {"width": 8, "layers": 1, "heads": 2},
        "conditional": True,
    },
}
PHASES = {"gan": ("discriminator", "generator"), "vaegan": ("discriminator", "encoder", "decoder")}
MONITORS = {"gan": "kid", "vaegan": "distortion/encoder"}
SPACE = {
    "name": "small",
    "data": {"path": "$MADE/shards", "make": "vaedist-shard phantom --out shards", "phantom": 16},
    "base": {
        "seed": 3,
        "model": {"kind": "vae", "encoder": {"kind": "mlp", "width": 4, "depth": 1}, "latent": 2},
        "train": {
            "steps": 4,
            "batch_size": 8,
            "log_every": 2,
            "validate_every": 4,
            "save_every": 4,
            "threads": 1,
            "precision": "fp64",
        },
    },
    "dimensions": {
        "model.beta": {"kind": "loguniform", "low": 0.1, "high": 10.0},
        "model.latent": {"kind": "choice", "values": [2, 4]},
    },
    "objectives": [{"metric": "rate"}, {"metric": "distortion"}],
    "search": {"kind": "tpe", "startup": 2},
    "trials": 2,
}


def job(name: str) -> dict[str, Any]:
    """The content of a job file."""
    optim = {"learning_rate": 2e-3, "clip": 1e5, "schedule": {"kind": "cosine", "warmup": 3}}
    later = {"generator", "decoder"}
    content: dict[str, Any] = {
        "name": name,
        "seed": 5,
        "data": {"path": "$MADE/shards", "workers": 0},
        "model": MODELS[name],
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "precision": "fp64",
            "threads": 1,
            "ema_half_life": 100,
            "log_every": 1,
            "validate_every": 4
            if name == "vae"
            else STOPPED,  # of one, the best checkpoint is not the newest
            "save_every": 100,
            "keep": 1,
            "monitor": {"metric": MONITORS.get(name, "loss")},
            "optim": {
                phase: optim | ({"start": 2} if phase in later else {})
                for phase in PHASES.get(name, ("main",))
            },
        },
    }
    if name not in ("pixelcnn", "transformer"):
        content["augment"] = {"flip": 0.5, "shift": 1}
    if name == "gan":
        content["init_from"] = {"run": "$MADE/runs/infovae", "map": {"decoder": "generator"}}
    return content


def typed(main: Callable[[list[str]], int], *words: str, code: int = 0) -> None:
    """Run a command as if it had been typed."""
    print("$", main.__module__, *words, flush=True)
    found = main(list(words))
    assert found == code, found


def digest(state: dict[str, Any]) -> str:
    """See above."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def machine() -> dict[str, str]:
    """What bits depend on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": model, "level": torch.backends.cpu.get_cpu_capability(), "torch": str(torch.__version__)}


def rows(run: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def outputs(opened: Any, images: Any) -> dict[str, Any]:
    """What a run that was opened makes of four images, and four samples."""
    classes = [0, 1, 0, 1] if opened.run.model.conditional else None
    made = {}
    if opened.kind != "vqvae":
        made["sample"] = opened.sample(4, seed=1, classes=classes)
    if opened.kind != "gan":
        made["encode"] = opened.encode(images, classes)
        made["reconstruct"] = opened.reconstruct(images, classes)
    return {name: value.numpy() for name, value in made.items()}


def asked(name: str) -> list[str]:
    """Options of vaedist-evaluate."""
    return [] if name == "vqvae" else ["--importance", "4", "--num-samples", "16"]


def pictures() -> Any:
    """Four images, uint8 (4, 1, 16, 16)."""
    import torch

    axis = torch.arange(16)
    return torch.stack(
        [((axis[:, None] * (3 + k) + axis * (5 - k)) * 2 % 256).to(torch.uint8) for k in range(4)]
    )[:, None]


def foreign(folder: Path) -> None:
    """Tars as others write them."""
    import numpy as np

    folder.mkdir()
    for split, count in (("train", 6), ("val", 3)):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for number in range(count):
                buffer = io.BytesIO()
                np.save(buffer, np.full((8, 8), 20 * number, np.uint8))
                for ending, content in (("npy", buffer.getvalue()), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{split}{number:03d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def stopping(after: int) -> Callable[[], None]:
    """Ask this process to stop once a step is logged; the function that undoes it."""
    from vaedist.training.log import Log

    plain = Log.train

    def train(self: Log, step: int, *rest: Any, **more: Any) -> None:
        plain(self, step, *rest, **more)
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM)

    Log.train = train  # type: ignore[method-assign]

    def undo() -> None:
        Log.train = plain  # type: ignore[method-assign]

    return undo


def make_runs() -> None:
    import numpy as np
    import yaml

    import vaedist
    from vaedist import evaluate, train

    for name in MODELS:
        path, run = ROOT / "jobs" / f"{name}.yaml", ROOT / "runs" / name
        path.write_text(yaml.safe_dump(job(name), sort_keys=False))
        undo = stopping(STOPPED - 1)  # it is heard in the step that follows
        typed(train.main, str(path), "--run-dir", str(run), "--device", "cpu", "-q", code=75)
        undo()
        assert rows(run)[-1]["step"] == STOPPED
        np.savez(ROOT / "told" / f"{name}.npz", **outputs(vaedist.load(run), pictures()))

        goes_on = ROOT / "resumed" / name
        shutil.copytree(run, goes_on, symlinks=True)
        # On a copy, because an evaluation is written into the run.
        typed(evaluate.main, str(goes_on), *asked(name), "--device", "cpu", "-q")
        evaluation = json.loads((goes_on / "evaluation" / "test" / "metrics.json").read_text())
        typed(train.main, str(path), "--run-dir", str(goes_on), "--device", "cpu", "-q")
        last = goes_on / "checkpoints" / f"step-{STEPS:09d}"
        told = {
            "machine": machine(),
            "rows": rows(goes_on),
            "weights": {
                which: digest(vaedist.load(last, weights=which).run.model.state_dict())
                for which in ("raw", "ema")
            },
            "evaluation": {part: evaluation.get(part) for part in ("terms", "metrics")},
        }
        (ROOT / "told" / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def make_launch() -> None:
    import yaml

    from vaedist import launch

    tiny = {
        "name": "tiny",
        "data": {"path": "$MADE/shards"},
        "model": {"kind": "vae", "latent": 2, "encoder": {"kind": "mlp", "width": 4, "depth": 1}},
        "train": {"steps": 4, "batch_size": 8, "log_every": 2, "validate_every": 4, "save_every": 4},
    }
    path = ROOT / "jobs" / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny, sort_keys=False))
    place = ["--runs", str(ROOT / "launched"), "--folder", str(ROOT / "launches")]
    chain = [
        "--chain",
        "train,evaluate,sample",
        "--evaluate",
        "--importance 0",
        "--sample",
        "--num-samples 4",
    ]
    typed(launch.main, str(path), "--local", *place, *chain)


def make_search() -> None:
    import yaml

    from vaedist import tune

    space = ROOT / "jobs" / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE, sort_keys=False))
    search = ["--space", str(space), "--device", "cpu", "--max-parallel", "1"]
    typed(tune.main, *search, "--run-dir", str(ROOT / "search"))
    longer = ROOT / "resumed" / "search"
    shutil.copytree(ROOT / "search", longer, symlinks=True)
    typed(tune.main, *search, "--run-dir", str(longer), "--trials", "3")
    shutil.copyfile(longer / "trials.jsonl", ROOT / "told" / "search.jsonl")


def make_export() -> None:
    import numpy as np

    import vaedist
    from vaedist import export

    typed(export.main, str(ROOT / "runs" / "vae"), str(ROOT / "export" / "vae"), "--licence", "CC0")
    made = outputs(vaedist.load(ROOT / "export" / "vae"), pictures())
    np.savez(ROOT / "told" / "export.npz", **made)


def without_this_machine(folder: Path) -> None:
    """Rewrite what tells of the machine, in names and in files that are text."""
    host = socket.gethostname()
    words = {
        str(Path(sys.executable).parent): f"{ROOT}/venv/bin",
        str(HERE.parents[1]): f"{ROOT}/sources",
        f'"host": "{host}"': '"host": "machine"',
    }
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_dir():
            continue
        if path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".log", ".out", ".sbatch", ".md"):
            content = text = path.read_text()
            for word, other in words.items():
                text = text.replace(word, other)
            if text != content:
                path.write_text(text)
        if f".{host}." in path.name:
            path.rename(path.with_name(path.name.replace(f".{host}.", ".machine.")))


def main() -> None:
    os.environ["MADE"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ROOT.mkdir(exist_ok=True)
    assert not any(ROOT.iterdir()), f"{ROOT} is not empty"
    for name in ("jobs", "runs", "told", "resumed", "export"):
        (ROOT / name).mkdir()
    os.chdir(ROOT)

    from vaedist import shard

    typed(shard.main, *PACK, "--out", str(ROOT / "shards"))
    foreign(ROOT / "foreign")
    typed(shard.main, str(ROOT / "foreign"), "--index")
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((ROOT / "shards").iterdir())
        if path.is_file() and path.suffix != ".png"
    }
    (ROOT / "told" / "shards.json").write_text(json.dumps(sums, indent=1) + "\n")
    make_runs()
    make_export()
    make_launch()
    make_search()

    shutil.rmtree(ROOT / "resumed")
    without_this_machine(ROOT)
    links = {str(path.relative_to(ROOT)): os.readlink(path) for path in ROOT.rglob("*") if path.is_symlink()}
    for name in links:
        (ROOT / name).unlink()
    (ROOT / "told" / "links.json").write_text(json.dumps(links, indent=1) + "\n")
    for path in sorted(ROOT.iterdir()):
        shutil.rmtree(HERE / path.name, ignore_errors=True)
        shutil.copytree(path, HERE / path.name)
    print("made:", sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()), "bytes")


if __name__ == "__main__":
    main()
