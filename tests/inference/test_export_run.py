"""A run to give away: the same images from a small folder that names no machine; and the one that is shipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch.torch_version import TorchVersion

import vaedist
from tests.commands.conftest import MLP, pack_phantom, trained
from tests.run_commands import small_job
from vaedist import sample
from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.core.context import SampleContext
from vaedist.core.errors import UserError
from vaedist.core.imaging import to_uint8
from vaedist.data.format.index import Index
from vaedist.data.sources import Limits
from vaedist.data.sources.mnist import read_idx
from vaedist.evaluate import main as evaluate
from vaedist.inference.export.export_run import export_run
from vaedist.inference.export.programs import PROGRAMS_NEED
from vaedist.inference.stored_mixture import fit_and_store_mixture, load_mixture
from vaedist.runs.fit_options import FitOptions
from vaedist.runs.open_run import Run, open_run
from vaedist.training.loop import fit

KINDS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "vae", "encoder": MLP, "latent": 3},
    "map": {
        "kind": "vae",
        "encoder": {"kind": "resnet", "width": 8, "depth": 1, "downsample": 4},
        "latent": {"kind": "map", "channels": 2},
    },
    "cvae": {"kind": "vae", "encoder": MLP, "latent": 2, "condition": {"dropout": 0.2, "how": "concat"}},
    "vqvae": {
        "kind": "vqvae",
        "encoder": {"kind": "conv", "width": 16, "depth": 0, "downsample": 4},
        "codebook": {"kind": "ema", "codes": 8, "dim": 4},
    },
    "fsq": {
        "kind": "vqvae",
        "encoder": {"kind": "conv", "width": 16, "depth": 0, "downsample": 4},
        "codebook": {"kind": "fsq", "levels": [5, 3]},
    },
}
SHIPPED = Path(__file__).parents[2] / "jobs" / "pretrained" / "vae_mnist"


@pytest.fixture(scope="module")
def run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vae"
    fit(small_job(phantom, steps=4, save_every=2, validate_every=2), folder, options=FitOptions(quiet=True))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_phantom(tmp_path_factory.mktemp("packed") / "phantom")


def names_in(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(path.read_bytes().decode("latin-1") for path in files)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_export_is_the_run_without_its_past(run: Path, weights: str, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "new" / "vae", weights=weights)
    was, now = open_run(run, weights=weights), open_run(folder)
    assert (now.step, now.weights, now.data_identity) == (was.step, was.weights, was.data_identity)
    assert (now.spec, now.classes, now.job.model) == (was.spec, was.classes, was.job.model)
    assert torch.equal(now.model.sample(3), was.model.sample(3))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "manifest.json", "state.pt"]
    size = sum(4 * tensor.numel() for tensor in was.model.state_dict().values())
    assert (folder / "state.pt").stat().st_size < size + 30_000
    assert str(run.parent) not in names_in(folder) and str(Path(was.data_path).parent) not in names_in(folder)
    other = "raw" if weights == "ema" else "ema"
    with pytest.raises(UserError, match="weights"):
        open_run(folder, weights=other)
    with pytest.raises(UserError, match="there already"):
        export_run(run, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]


def test_the_mixture_is_exported_too(run: Path, phantom: Path, tmp_path: Path) -> None:
    mixture = fit_and_store_mixture(open_run(run), Index.open(phantom))
    exported = open_run(export_run(run, tmp_path / "vae"))
    stored = load_mixture(exported)
    assert stored is not None
    assert torch.equal(stored.sample(4, seed=1), mixture.sample(4, seed=1))


def test_a_new_run_starts_from_an_export(run: Path, phantom: Path, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "vae")
    job = small_job(
        phantom, steps=1, save_every=1, validate_every=1, optim={"main": {"learning_rate": 1e-12}}
    )
    content = job.model_dump(mode="json") | {"init_from": {"run": str(folder)}}
    fit(parse(Job, content, where="the test's job"), tmp_path / "run", options=FitOptions(quiet=True))
    started, source = open_run(tmp_path / "run", weights="raw"), open_run(folder)
    for name, tensor in source.model.state_dict().items():
        torch.testing.assert_close(started.model.state_dict()[name], tensor, atol=1e-6, rtol=0)


# The one in this repository ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> Run:
    return open_run(SHIPPED)


def test_the_shipped_run_is_small_and_names_no_machine() -> None:
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000
    text = names_in(SHIPPED)
    assert not [word for word in ("/tmp", "/home", "/root", "/work", os.sep + "Users") if word in text]


def test_the_shipped_run_is_opened_and_sampled(
    shipped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.job.name == "vae_mnist" and len(shipped.classes) == 10
    for sampler in ("prior", "gmm"):
        assert sample.main([str(SHIPPED), "--sampler", sampler, "--npz", f"{sampler}.npz"]) == 0
    assert "fitted to 54,000 training latents" in capsys.readouterr().out
    ink = {name: np.load(f"{name}.npz")["images"] / 255 for name in ("prior", "gmm")}
    for images in ink.values():
        assert images.shape == (64, 1, 28, 28)
        assert 0.08 < images.mean() < 0.2  # of real digits: 0.13
        assert images.reshape(64, -1).max(1).min() > 0.5  # each shows something, on black
        assert np.abs(images[..., :2, :]).max() < 0.1
        assert images.std(0).max() > 0.3  # and not all the same


@pytest.mark.shared
def test_the_shipped_run_is_as_good_as_documented(shipped: Run, shared_data: Path) -> None:
    images = read_idx(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz", 3, Limits())[:200]
    batch = {"image": torch.from_numpy(images[:, None].copy())}
    terms = shipped.model(batch, SampleContext(seed=0, samples=range(200)))  # type: ignore[arg-type]
    assert float(terms["loss"].mean()) < 110  # 105 nats over the whole test split
    made = to_uint8(shipped.model.reconstruct(batch["image"]))[:, 0] / 255
    assert float(np.square(made - images / 255).mean()) < 0.0125


# For those who have no vaedist --------------------------------------------------------------------------------

programs = pytest.mark.skipif(
    torch.__version__ < PROGRAMS_NEED, reason=f"programs need torch {PROGRAMS_NEED}"
)

ALONE = """
import sys
sys.modules["vaedist"] = None
import torch
from safetensors.torch import load_file
images, labels = torch.load("given.pt")
label_input = {} if labels is None else {"label": labels}
latent = torch.export.load("encoder.pt2").module()(image=images, **label_input)
again = torch.export.load("decoder.pt2").module()(latent=latent, **label_input)
weights = load_file("weights.safetensors")
torch.save((latent, again, sum(tensor.numel() for tensor in weights.values())), "made.pt")
"""


@programs
@pytest.mark.parametrize("name", ["vae", "cvae", "map", "vqvae", "fsq"])
def test_programs_need_torch_alone(name: str, packed: Path, tmp_path: Path) -> None:
    """In a Python that refuses to import vaedist, for another number of images than they were made with."""
    opened = vaedist.load(trained(tmp_path / "run", packed, KINDS[name]))
    folder = export_run(tmp_path / "run", tmp_path / "new", programs=True, licence="CC0", data_licence="ours")
    numbers_of = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 1, 16, 16), generator=numbers_of, dtype=torch.uint8)
    conditional = opened.run.model.conditional
    labels = torch.tensor([0, 1, 0, 1, 0]) if conditional else None
    torch.save((images, labels), folder / "given.pt")
    subprocess.run([sys.executable, "-c", ALONE], cwd=folder, check=True)
    latent, again, numbers = torch.load(folder / "made.pt")
    classes = labels.tolist() if labels is not None else None
    torch.testing.assert_close(latent, opened.encode(images, classes))
    torch.testing.assert_close(again, opened.reconstruct(images, classes), rtol=1e-4, atol=1e-5)
    assert numbers == sum(tensor.numel() for tensor in opened.run.model.state_dict().values())
    for file in ("given.pt", "made.pt"):
        (folder / file).unlink()
    held = names_in(folder)
    assert str(tmp_path) not in held and str(Path(vaedist.__file__).parent) not in held
    card = (folder / "README.md").read_text()
    assert "licence of the weights: CC0" in card and "- licence: ours" in card
    assert opened.run.data_identity in card and "intended use: not stated" in card
    config = json.loads((folder / "config.json").read_text())
    assert (config["shape"], config["model"]["kind"]) == ([1, 16, 16], opened.kind)
    assert torch.equal(vaedist.load(folder).encode(images, classes), opened.encode(images, classes))


@programs
@pytest.mark.parametrize("name", ["vae", "cvae", "map", "vqvae", "fsq"])
def test_onnx_files_compute_what_the_run_does(name: str, packed: Path, tmp_path: Path) -> None:
    opened = vaedist.load(trained(tmp_path / "run", packed, KINDS[name]))
    folder = export_run(tmp_path / "run", tmp_path / "new", onnx=True)
    numbers_of = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 1, 16, 16), generator=numbers_of, dtype=torch.uint8)
    classes = [0, 1, 0, 1, 0] if opened.run.model.conditional else None
    label_input = {} if classes is None else {"label": np.array(classes)}

    def made(file: str, output: str, **inputs: np.ndarray) -> torch.Tensor:
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        (found,) = session.run([output], inputs)
        return torch.as_tensor(found)

    latent = made("encoder.onnx", "latent", image=images.numpy(), **label_input)
    torch.testing.assert_close(latent, opened.encode(images, classes), rtol=1e-4, atol=1e-5)
    again = made("decoder.onnx", "image", latent=latent.numpy(), **label_input)
    torch.testing.assert_close(again, opened.reconstruct(images, classes), rtol=1e-4, atol=1e-5)
    held = names_in(folder)
    assert str(tmp_path) not in held and str(Path(vaedist.__file__).parent) not in held
    assert "`encoder.onnx`, `decoder.onnx`" in (folder / "README.md").read_text()


@programs
def test_a_program_that_differs_from_the_model_is_not_given_away(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "run", packed, KINDS["vae"])
    real = torch.onnx.export

    def altered(program: torch.export.ExportedProgram, **how: Any) -> Any:
        made = real(program, **how)
        for weight in made.model.graph.initializers.values():
            if (values := weight.const_value.numpy()).dtype == np.float32:
                weight.const_value = onnx_ir.tensor(values + 1)
        return made

    monkeypatch.setattr(torch.onnx, "export", altered)
    with pytest.raises(
        UserError, match=r"encoder\.onnx differs from the model by up to .*: leave out --onnx"
    ):
        export_run(tmp_path / "run", tmp_path / "new", onnx=True)
    assert not (tmp_path / "new").exists()


@programs
def test_a_program_that_torch_cannot_write_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("SymInt graph input\nand a page more")

    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(
        UserError, match=r"encoder\.pt2: torch .* \(SymInt graph input\): install a newer torch, or give --no"
    ):
        export_run(run, tmp_path / "new", programs=True)


@programs
def test_onnx_without_its_libraries_is_refused_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="onnxscript cannot be found: pip install onnxscript"):
        export_run(run, tmp_path / "new", onnx=True)


def test_programs_of_an_old_torch_are_refused_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(UserError, match=r"need torch 2\.8 or newer, and this is 2\.6\.0: give --no-programs"):
        export_run(run, tmp_path / "new", programs=True)


@programs
def test_the_example_of_the_card_runs(packed: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", packed, KINDS["cvae"])
    folder = export_run(tmp_path / "run", tmp_path / "new", programs=True)
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


@programs
def test_what_cannot_be_a_program_is_named_with_the_reason(packed: Path, tmp_path: Path) -> None:
    body = {"kind": "conv", "width": 8, "depth": 0, "downsample": 4}
    gan = {"kind": "gan", "latent": 3, "generator": body, "discriminator": body}
    train = {"steps": 2, "batch_size": 8, "threads": 1, "monitor": {"metric": "kid"}}
    train["optim"] = {"discriminator": {}, "generator": {}}
    job = Job(name="gan", data={"path": str(packed)}, model=gan, train=train)
    fit(job, tmp_path / "run", options=FitOptions(quiet=True))
    folder = export_run(tmp_path / "run", tmp_path / "new", programs=True)
    card = (folder / "README.md").read_text()
    assert not (folder / "encoder.pt2").exists()
    assert "`encoder.pt2` is not there: encode is not defined, because" in card


def test_the_card_has_the_numbers_of_the_evaluation(packed: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", packed, KINDS["vae"])
    assert "It was not evaluated" in (export_run(run, tmp_path / "before") / "README.md").read_text()
    assert evaluate([str(run), "--importance", "0"]) == 0
    card = (export_run(run, tmp_path / "after") / "README.md").read_text()
    found = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert f"| this model | {found['metrics']['ssim']['mean']:.4f} |" in card
    assert f"| PCA-3 | {found['baselines']['PCA-3']['ssim']['mean']:.4f} |" in card
