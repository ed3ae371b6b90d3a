"""The default extractor, and TorchScript ones."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vaedist.core.errors import UserError
from vaedist.evaluation.metrics.features import WEIGHTS, Extractor, FeatureNetwork, default_extractor


def images(count: int, channels: int, height: int, width: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(1))
    return generator.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def test_the_committed_weights_are_small_and_name_the_extractor() -> None:
    content = WEIGHTS.read_bytes()
    assert len(content) < 2_000_000
    extractor = default_extractor()
    assert extractor.sha256 == hashlib.sha256(content).hexdigest()
    assert extractor.label == f"vd-{extractor.sha256[:8]}"


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 128), (64, 64, 128), (127, 127, 128), (128, 128, 256), (300, 20, 256)],
)
def test_any_size_of_image(height: int, width: int, size: int) -> None:
    found = default_extractor()(images(2, 1, height, width))
    assert found.values.shape == (2, size) and found.values.dtype == np.float32
    assert found.logits is not None and found.logits.shape == (2, FeatureNetwork.classes)


def test_gray_is_three_equal_channels() -> None:
    gray = images(3, 1, 32, 32)
    assert (default_extractor()(gray).values == default_extractor()(gray.repeat(3, 1)).values).all()


def test_the_batch_does_not_enter() -> None:
    many = images(9, 3, 40, 40)
    whole = default_extractor()(many)
    single = np.concatenate([default_extractor()(many[i : i + 1]).values for i in range(9)])
    assert np.abs(whole.values - single).max() < 1e-4


def test_a_small_change_in_a_tile_changes_features_at_full_resolution() -> None:
    """A one-pixel checkerboard: gone at 64x64, so the whole view cannot see it, and the tiles do."""
    plain = np.full((1, 1, 256, 256), 128, np.uint8)
    checked = plain.copy()
    checked[..., ::2, ::2] += 60
    checked[..., 1::2, 1::2] += 60
    checked[..., ::2, 1::2] -= 60
    checked[..., 1::2, ::2] -= 60
    change = np.abs(default_extractor()(plain).values - default_extractor()(checked).values)[0]
    assert change[:128].max() < 0.1 < 0.5 < change[128:].max()


def test_a_tiles_features_are_those_of_the_tile() -> None:
    """The second half is the mean over tiles of what each would give alone."""
    picture = images(1, 3, 128, 192)
    extractor = default_extractor()
    tiles = [picture[..., i : i + 64, j : j + 64] for i in (0, 64) for j in (0, 64, 128)]
    alone = np.mean([extractor(tile).values for tile in tiles], axis=0)
    np.testing.assert_allclose(extractor(picture).values[:, 128:], alone, atol=1e-4)


# TorchScript ----------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)


class Classifier(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)
        return features, features[:, :5]


class Asked(nn.Module):
    """As the Inception that StyleGAN's authors publish: probabilities, unless features are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().mean([2, 3]) if return_features else torch.zeros(len(images), 1008)


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


class Infinite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean([2, 3]) / 0.0


def saved(folder: Path, kind: type[nn.Module], name: str = "radimagenet v1.pt") -> Path:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(kind()).save(str(folder / name))
    return folder / name


def test_a_torchscript_file(tmp_path: Path) -> None:
    path = saved(tmp_path, Pooled)
    lines: list[str] = []
    extractor = Extractor.from_torchscript(path, echo=lines.append)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.label == f"radimagenet-v1-{digest[:8]}"
    (line,) = lines
    assert "holds code, and it runs" in line and digest in line
    found = extractor(images(5, 1, 16, 16))
    assert found.values.shape == (5, 12) and found.logits is None


def test_a_torchscript_file_with_classes(tmp_path: Path) -> None:
    found = Extractor.from_torchscript(saved(tmp_path, Classifier), echo=print)(images(5, 3, 16, 16))
    assert found.logits is not None and found.logits.shape == (5, 5)


def test_features_are_asked_for_where_they_have_to_be(tmp_path: Path) -> None:
    assert Extractor.from_torchscript(saved(tmp_path, Asked))(images(4, 3, 8, 8)).values.shape == (4, 3)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the feature extractor .*none\.pt: No such file"):
        Extractor.from_torchscript(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(UserError, match=r"text\.pt is not a TorchScript file"):
        Extractor.from_torchscript(tmp_path / "text.pt")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(UserError, match=r"weights\.pt is not a TorchScript file"):
        Extractor.from_torchscript(tmp_path / "weights.pt")


def test_networks_that_give_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must give features \(B, D\), .*its features are \(\)"):
        Extractor.from_torchscript(saved(tmp_path, Flat))(images(4, 3, 8, 8))
    with pytest.raises(UserError, match=r"does not take uint8 images \(4, 3, 8, 8\)"):
        Extractor.from_torchscript(saved(tmp_path, Linear))(images(4, 3, 8, 8))
    with pytest.raises(UserError, match="features that are not finite"):
        Extractor.from_torchscript(saved(tmp_path, Infinite))(images(4, 3, 8, 8))


# The training script -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.shared
def test_the_training_script_makes_such_a_file(shared_data: Path, repository: Path, tmp_path: Path) -> None:
    """Three steps instead of 1,200: the same tensors, and the same bytes from a second run."""
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out in outs:
        command = [sys.executable, "tools/train_features", shared_data, "--steps", "3", "--out", out]
        environment = {**os.environ, "VAEDIST_ANY_PYTHON": "1", "PYTHONPATH": str(repository)}
        subprocess.run([*map(str, command)], cwd=repository, env=environment, check=True, capture_output=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    from safetensors.torch import load_file

    made, committed = load_file(outs[0]), load_file(WEIGHTS)
    assert {name: one.shape for name, one in made.items()} == {
        name: one.shape for name, one in committed.items()
    }
