"""What sample metrics look at: an image's features, from a network that is named by the hash of its weights.

A distance between distributions of images is taken between their features, and a number means nothing without the
network that made them. So every metric's name carries the first eight hexadecimal digits of the sha256 of the
extractor's file (`kid[vd-1a2b3c4d]`), and only equal names compare.

An extractor's network is a module that takes uint8 (B, 3, H, W), gray images as three equal channels, and gives
features (B, D), or a pair of features and class logits (B, K). Real and generated images alike come as uint8.

The default one, `vd`, is small, trained by `tools/train_features` and committed; no download, no Inception, and its
numbers are no FID. It sees an image whole at 64x64, bilinear, anti-aliased when shrinking: without that, a resize
changes features more than many models do (Parmar, Zhang, Zhu: On aliased resizing and surprising subtleties in GAN
evaluation, 2022). But a slice of 256x256 shrunk to 64x64 has no texture left to judge, so from 128 pixels a side it
also sees the tiles of 64x64, at the largest multiple of 64 up to 256, and appends their mean features. Training asks
of its 128 features three things at once: what the picture is (class logits), how blurred and how noisy it is, and
its content at 16x16; so they respond to damage, which a classifier alone learns to overlook, and to missing content.
Over the training images they have mean 0, variance 1 and little correlation.

Another network (Inception, RadImageNet) comes as a TorchScript file: `Extractor.from_torchscript`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vaedist.core.errors import UserError
from vaedist.core.imaging import Pixels

WEIGHTS = Path(__file__).parent / "weights" / "vd.safetensors"
SIDE = 64
MOST_TILES = 4
"""Tiles along a side, at most: a larger image is shrunk to that."""
_BATCH_PIXELS = 1 << 20

Matrix = NDArray[np.float64]
"""Features of a set as its metrics take them, (N, D)."""


class Features(NamedTuple):
    """Of N images."""

    values: NDArray[np.float32]
    """(N, D)."""
    logits: NDArray[np.float32] | None
    """(N, K), where the extractor has classes."""


class Extractor:
    """A network with a name.

    Args:
        name: Short, of what the network is.
        sha256: Of the file that holds it, 64 hexadecimal digits.
        network: uint8 (B, 3, H, W) to features (B, D) or (features, logits (B, K)); moved to `device`.
        device: Where it runs.
    """

    def __init__(
        self, name: str, sha256: str, network: nn.Module, device: str | torch.device = "cpu"
    ) -> None:
        assert re.fullmatch(r"[0-9a-f]{64}", sha256)
        self.name, self.sha256, self.device = name, sha256, torch.device(device)
        self._network = network.to(self.device).eval()

    @classmethod
    def from_torchscript(
        cls, path: str | Path, device: str | torch.device = "cpu", echo: Callable[[str], None] = print
    ) -> Extractor:
        """A TorchScript file's network. If its `forward` has an argument `return_features`, that is set.

        Args:
            path: The file; its name, without the ending, becomes the extractor's.
            echo: Gets one sentence before anything is loaded: such a file holds code, and it is run.

        Raises:
            UserError: there is no such file, or it is not TorchScript.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"cannot read the feature extractor {path}: {error.strerror}; give a TorchScript file"
            ) from None
        echo(f"{path} holds code, and it runs in this process as you: use files you trust (sha256 {digest})")
        try:
            with warnings.catch_warnings():
                # torch has deprecated TorchScript, and it is still the one form in which others publish these.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(str(path), map_location=device)
        except (RuntimeError, ValueError, OSError) as error:
            lines = str(error).strip().split(". ")[0].splitlines()  # torch goes on with what may be the cause
            raise UserError(
                f"{path} is not a TorchScript file ({lines[0] if lines else 'unreadable'}): "
                "save one with torch.jit.script(module).save(path)"
            ) from None
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", path.stem).strip("-.")[:32] or "file"
        return cls(name, digest, _WithFeatures(module), device)

    @property
    def label(self) -> str:
        """`vd-1a2b3c4d`: what stands in the brackets of a metric's name."""
        return f"{self.name}-{self.sha256[:8]}"

    @torch.no_grad()
    def __call__(self, images: Pixels) -> Features:
        """Features of uint8 (N, C, H, W), C 1 or 3, N >= 1; batches are chosen here.

        Raises:
            UserError: the network refuses such images, or gives something else than features.
        """
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and len(images)
        rows = max(1, min(256, _BATCH_PIXELS // (images.shape[2] * images.shape[3])))
        parts = [self._part(images[start : start + rows]) for start in range(0, len(images), rows)]
        values = np.concatenate([features for features, _ in parts])
        if not np.isfinite(values).all():
            raise UserError(f"the feature extractor {self.label} gives features that are not finite")
        logits = [part for _, part in parts if part is not None]
        return Features(values, np.concatenate(logits) if logits else None)

    def _part(self, images: Pixels) -> Features:
        # A copy: images may be a read-only view of a file.
        batch = torch.from_numpy(images.copy()).to(self.device)
        shown = batch.expand(-1, 3, -1, -1).contiguous()
        try:
            given = self._network(shown)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"the feature extractor {self.label} does not take uint8 images {tuple(shown.shape)}: {reason}"
            ) from None
        features, logits = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        for what, value in (("features", features), ("logits", logits)):
            if value is not None and not (isinstance(value, Tensor) and value.shape[:-1] == (len(batch),)):
                raise UserError(
                    f"the feature extractor {self.label} must give features (B, D), or features and logits (B, K): "
                    f"its {what} are {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
                )
        return Features(
            features.float().cpu().numpy(), None if logits is None else logits.float().cpu().numpy()
        )


def default_extractor(device: str | torch.device = "cpu") -> Extractor:
    """The committed extractor `vd`: 128 features of an image below 128 pixels a side, else 256; 31 classes."""
    from safetensors.torch import load

    content = WEIGHTS.read_bytes()
    with torch.device("meta"):  # no random start that would only be overwritten
        network = FeatureNetwork()
    # Stored in half precision, computed in single.
    network.load_state_dict({name: value.float() for name, value in load(content).items()}, assign=True)
    return Extractor("vd", hashlib.sha256(content).hexdigest(), network, device)


class FeatureNetwork(nn.Module):
    """The default extractor's network: seven convolutions on 64x64, then one linear layer to the features.

    That layer sees where things are (the last 4x4 map) and, as means over the image, how strongly the finer
    layers respond: texture, blur and noise.
    """

    features = 128
    classes = 31
    widths = (24, 48, 48, 96, 96, 128, 128)
    strides = (2, 2, 1, 2, 1, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *self.widths[:-1])
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3 if layer else 5, stride, 1 if layer else 2)
            for layer, (a, b, stride) in enumerate(zip(inputs, self.widths, self.strides, strict=True))
        )
        last = self.widths[-1] * (SIDE // 16) ** 2
        self.head = nn.Linear(sum(self.widths[:-1]) + last, self.features)
        self.classify = nn.Linear(self.features, self.classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 128 or 256) and logits (B, 31) of uint8 (B, 3, H, W)."""
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        features = self.embed(_resize(x, SIDE, SIDE))
        logits = self.classify(features)
        down, across = (max(1, min(MOST_TILES, side // SIDE)) for side in x.shape[2:])
        if down * across > 1:
            sheet = _resize(x, down * SIDE, across * SIDE)
            tiles = sheet.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)  # (B, 3, down, across, 64, 64)
            tiles = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, SIDE, SIDE)
            detail = self.embed(tiles).view(len(x), down * across, -1).mean(1)
            features = torch.cat([features, detail], dim=1)
        return features, logits

    def embed(self, x: Tensor) -> Tensor:
        """(B, 128) of (B, 3, 64, 64) in [-1, 1]."""
        means = []
        for layer in self.layers:
            x = functional.relu(layer(x))
            means.append(x.mean((2, 3)))
        return self.head(torch.cat([*means[:-1], x.flatten(1)], dim=1))


class _WithFeatures(nn.Module):
    """A TorchScript module, asked for features where it has to be asked (the Inception of StyleGAN's authors)."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.module = module
        schema: Any = module.forward.schema  # type: ignore[attr-defined]
        names = [argument.name for argument in schema.arguments]
        self.asked = {"return_features": True} if "return_features" in names else {}

    def forward(self, images: Tensor) -> object:
        return self.module(images, **self.asked)


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[2:] == (height, width):
        return x
    return functional.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
