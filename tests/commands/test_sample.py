from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.conftest import pixels
from vaedist.core.imaging import GRAY, RED, channels_last, grid, to_uint8
from vaedist.evaluation.metrics.image_quality import pair_metrics
from vaedist.runs.open_run import open_run
from vaedist.sample import main

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_the_grid_holds_the_models_samples(vae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(vae), "--num-samples", "7", "--grid-size", "3", "--seed", "5", "--temperature", "0.7"]
    assert main([*command, "--npz", "samples.npz"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote samples.png", "wrote samples.npz"]
    expected = to_uint8(open_run(vae).model.sample(7, seed=5, temperature=0.7))
    with np.load("samples.npz") as arrays:
        assert list(arrays) == ["images"]
        assert (arrays["images"] == expected).all()
    assert (pixels("samples.png") == grid(channels_last(expected), 3)[..., 0]).all()


def test_image_i_depends_on_the_seed_and_i_alone(vae: Path) -> None:
    for name, *options in (("a", "--num-samples", "9"), ("b", "--num-samples", "4"), ("c", "--seed", "1")):
        assert main([str(vae), *options, "--output-path", f"{name}.png", "--npz", f"{name}.npz"]) == 0
    a, b, c = (np.load(f"{name}.npz")["images"] for name in "abc")
    assert (a[:4] == b).all()
    assert len(c) == 64
    assert (c[:4] != b).any()
    assert pixels("c.png").shape == (8 * 18 + 2, 8 * 18 + 2)


def test_the_same_command_writes_the_same_bytes(vae: Path) -> None:
    written = []
    for name in ("first", "second"):
        assert main([str(vae), "--output-path", f"{name}/s.png", "--npz", f"{name}/s.npz"]) == 0
        written.append([Path(name, file).read_bytes() for file in ("s.png", "s.npz")])
    assert written[0] == written[1]


def test_temperature_zero_is_one_image(vae: Path) -> None:
    assert main([str(vae), "--temperature", "0", "--num-samples", "3", "--npz", "s.npz"]) == 0
    images = np.load("s.npz")["images"]
    assert (images == images[:1]).all()


def test_a_vqvae_without_a_prior_says_so(vqvae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(vqvae)]) == 2
    error = capsys.readouterr().err
    assert "sample is not defined, because this run has no prior over its codes" in error
    assert "--reconstruct" in error
    assert len(error.splitlines()) == 1
    assert not list(Path().iterdir())


def test_files_of_the_user_are_reconstructed(vqvae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramp = np.linspace(0, 255, 16 * 16).reshape(16, 16).astype(np.uint8)
    Image.fromarray(ramp).save("fits.png")
    wide = Image.new("RGB", (60, 30), (255, 255, 255))
    wide.save("wide.jpg")
    Image.new("RGBA", (16, 16), (255, 255, 255, 0)).save("clear.png")
    files = ["fits.png", "wide.jpg", "clear.png"]
    assert main([str(vqvae), "--reconstruct", *files, "--npz", "r.npz"]) == 0
    message = capsys.readouterr().out
    with np.load("r.npz") as arrays:
        originals, others = arrays["originals"], arrays["reconstructions"]
    assert (originals[0, 0] == ramp).all()
    assert not originals[1, 0, :4].any()  # padded with black to a square, never stretched
    assert not originals[1, 0, 12:].any()
    assert (originals[1, 0, 5:11] > 250).all()
    assert not originals[2].any()  # transparent lies over black
    expected = to_uint8(open_run(vqvae).model.reconstruct(torch.from_numpy(originals)))
    assert (others == expected).all()
    sheet = pixels("reconstructions.png")
    for i in range(3):
        left = 2 + 2 * i * 20  # each in a frame one pixel wide
        for image, frame, start in ((originals[i, 0], RED, left), (others[i, 0], GRAY, left + 20)):
            assert (sheet[3:19, start + 1 : start + 17] == image[..., None]).all()
            assert (sheet[2, start : start + 18] == frame).all()
            assert (sheet[2:20, start] == frame).all()
    line = next(line for line in message.splitlines() if line.startswith("fits.png"))
    assert f"{pair_metrics(originals[0], others[0])['psnr']:.2f}" in line


def test_fit_crop_cuts_the_middle(vqvae: Path) -> None:
    Image.new("L", (64, 16), 200).save("wide.png")
    assert main([str(vqvae), "--reconstruct", "wide.png", "--fit", "crop", "--npz", "r.npz"]) == 0
    assert (np.load("r.npz")["originals"] == 200).all()


def test_info_only_prints_what_the_run_is(vqvae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(vqvae), "--info-only"]) == 0
    message = capsys.readouterr().out
    run = open_run(vqvae)
    count = sum(parameter.numel() for parameter in run.model.parameters())
    assert f"{count:,}" in message
    assert str(run.step) in message
    assert run.data_identity in message
    assert "encoder.head" in message
    assert "kind: vqvae" in message
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "0"], "--num-samples is 0; give at least 1"),
        (["--num-samples=-3"], "--num-samples is -3"),
        (["--grid-size", "0"], "--grid-size is 0; give at least 1"),
        (["--seed=-1"], "--seed is -1"),
        (["--temperature=-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--output-path", "samples.jpg"], "let it end in .png"),
        (["--reconstruct", "none.png"], "none.png cannot be read"),
        (["--reconstruct", "text.png"], "text.png is not an image"),
        (["--reconstruct", "empty.png"], "empty.png is empty"),
        (["--output-path", "text.png/s.png"], "cannot write text.png/s.png"),
    ],
)
def test_mistakes_are_one_sentence(
    vae: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("not an image")
    Path("empty.png").touch()
    before = sorted(Path().iterdir())
    assert main([str(vae), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
