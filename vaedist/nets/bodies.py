"""Bodies: the encoder and decoder networks between an image and a latent.

An encoder maps an image (B, C, H, W) in [-1, 1] to features, either one vector per image (B, out) or a map
(B, out, h, w); a decoder goes the other way. Three kinds:

| kind | what it is |
|---|---|
| `mlp` | hidden layers of `width` units over the flattened image |
| `conv` | strided convolutions, each followed by `depth` 3x3 convolutions at the same grid size |
| `resnet` | the same with pre-activation residual blocks: x + conv(act(norm(conv(act(norm(x)))))) |

Grids. `downsample` is the whole factor between image and latent grid. A part of it, `patch`, is space-to-depth (an
image of C channels becomes C * patch^2 channels on a grid `patch` times coarser, without loss), and every further
factor of two is a strided convolution. A 3x3 convolution at half the grid size costs a quarter, so a `patch` makes
large images cheap. `width` is the number of channels at the coarsest grid; each finer grid has half as many, at least
16. A list gives the channels of every grid, finest first. `dense` adds a layer of so many units between the coarsest
grid and a latent vector.

`upsample` says how the decoder doubles a grid: `transpose` (transposed 4x4 convolution), `resize` (nearest
neighbor, then 3x3 convolution: no checkerboard) or `shuffle` (3x3 convolution to four times the channels, then
depth-to-space; sub-pixels initially equal, after Aitken et al., "Checkerboard artifact free sub-pixel convolution").

Normalization is GroupNorm (Wu and He, "Group normalization") or none. It uses one sample at a time, so the result
depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.core.errors import UserError
from vaedist.nets.bodies_config import Activation, Body, Conv, GridBody, Mlp

_LEAK = 0.2  # slope of leaky_relu below 0
_GAINS: dict[Activation, float] = {  # 1 / sqrt(E[f(x)^2]) for x ~ N(0, 1)
    "silu": 1.68,
    "relu": math.sqrt(2),
    "leaky_relu": math.sqrt(2 / (1 + _LEAK**2)),
    "tanh": 1.59,
}


def _activation(name: Activation) -> nn.Module:
    if name == "leaky_relu":
        return nn.LeakyReLU(_LEAK)
    return {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}[name]()


def grid(body: Body, spec: Spec, where: str = "model.encoder") -> tuple[int, int]:
    """(h, w) of the latent map that `body` emits for images of `spec`.

    Raises:
        UserError: the image side is not a multiple of the downsampling.
    """
    if isinstance(body, Mlp):
        return body.grid, body.grid
    factor = body.downsample
    if any(side % factor for side in spec.shape):
        fitting = [str(1 << k) for k in range(12) if not math.gcd(*spec.shape) % (1 << k)]
        up = -(-max(spec.shape) // factor) * factor
        raise UserError(
            f"{where}.downsample is {factor}, which does not divide images of {'x'.join(map(str, spec.shape))}: "
            f"use {' or '.join(fitting)}, or pack the images with --size {up}"
        )
    height, width = (side // factor for side in spec.shape)
    return height, width


def matching_grid(down: Body, up: Body, spec: Spec, where: str = "model") -> tuple[int, int]:
    """(h, w) of the latent map between an encoder and a decoder.

    Raises:
        UserError: they differ.
    """
    size = grid(down, spec, f"{where}.encoder")
    if (other := grid(up, spec, f"{where}.decoder")) != size:
        raise UserError(
            f"{where}.encoder emits a {size[0]}x{size[1]} map and {where}.decoder reads {other[0]}x{other[1]}: "
            "give both the same downsampling"
        )
    return size


def encoder(
    body: Body, spec: Spec, out: int, *, vector: bool, extra: int = 0, where: str = "model.encoder"
) -> nn.Sequential:
    """A network from (B, C, H, W) to (B, out) if `vector`, else to (B, out, h, w) with (h, w) = `grid(...)`.

    Its children are the blocks that a layer table shows. With `extra` it takes as many further inputs besides the
    image (`nets.conditioning`): further channels, or for an mlp further values (B, C * H * W + extra).
    """
    h, w = grid(body, spec, where)
    _check_latent(body, vector, where)
    net = nn.Sequential()
    if isinstance(body, Mlp):
        net.add_module("flatten", nn.Flatten() if body.black else BlackToZero(spec.pixels))
        _add_hidden_layers(net, body, spec.pixels + extra)
        net.add_module("head", nn.Linear(body.width, out * h * w))
        if not vector:
            net.add_module("map", nn.Unflatten(1, (out, h, w)))
        return net
    widths, gain = body.widths, _GAINS[body.activation]
    patches: list[nn.Module] = [nn.PixelUnshuffle(body.patch)] if body.patch > 1 else []
    stem = _conv(body, (spec.channels + extra) * body.patch**2, widths[0])
    net.add_module("stem", nn.Sequential(*patches, *stem))

    def downsample(inputs: int, outputs: int) -> list[nn.Module]:
        return [_unit_variance(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), _resampling_gain(body))]

    _add_levels(net, body, widths, "down", downsample)
    head = [] if isinstance(body, Conv) else _norm_activation(body, widths[-1])
    if vector:
        head += [nn.Flatten(), *_linear(body, widths[-1] * h * w, out)]
    else:
        head += [_unit_variance(nn.Conv2d(widths[-1], out, 1), gain)]
    net.add_module("head", nn.Sequential(*head))
    return net


def decoder(
    body: Body,
    spec: Spec,
    latent: int,
    *,
    vector: bool,
    extra: int = 0,
    channels: int | None = None,
    where: str = "model.decoder",
) -> nn.Sequential:
    """A network from (B, latent) if `vector`, else from (B, latent, h, w), to an image (B, `channels`, H, W).

    `channels` are those that the likelihood needs (`ObservationModel.outputs`), by default one per channel of the
    image. The output is not bounded: the likelihood reads -1 as black and 1 as white. `extra` is as for `encoder`.
    """
    h, w = grid(body, spec, where)
    _check_latent(body, vector, where)
    channels = channels or spec.channels
    net = nn.Sequential()
    if isinstance(body, Mlp):
        if not vector:
            net.add_module("flatten", nn.Flatten())
        _add_hidden_layers(net, body, latent * h * w + extra)
        net.add_module("head", nn.Linear(body.width, channels * math.prod(spec.shape)))
        net.add_module("image", nn.Unflatten(1, (channels, *spec.shape)))
        return net
    widths = body.widths[::-1]
    if vector:
        stem = [*_linear(body, latent + extra, widths[0] * h * w), nn.Unflatten(1, (widths[0], h, w))]
        stem += _after_conv(body, widths[0])
    else:
        stem = _conv(body, latent + extra, widths[0])
    net.add_module("stem", nn.Sequential(*stem))
    _add_levels(net, body, widths, "up", functools.partial(_upsample, body))
    image = [_equal_subpixels(widths[-1], channels, body.patch), nn.PixelShuffle(body.patch)]
    head = [] if isinstance(body, Conv) else _norm_activation(body, widths[-1])
    net.add_module("head", nn.Sequential(*head, *image))
    return net


def _check_latent(body: Body, vector: bool, where: str) -> None:
    if isinstance(body, Mlp):
        if vector and body.grid != 1:
            raise UserError(
                f"{where}.grid is {body.grid}, but this model's latent is a vector: leave it at 1"
            )
    elif body.dense is not None and not vector:
        raise UserError(f"{where}.dense is {body.dense}, but this model's latent is a map: leave it out")


def _add_hidden_layers(net: nn.Sequential, body: Mlp, inputs: int) -> None:
    for layer in range(body.depth):
        linear = nn.Linear(body.width if layer else inputs, body.width)
        net.add_module(f"hidden{layer}", nn.Sequential(linear, _activation(body.activation)))


def _linear(body: GridBody, inputs: int, outputs: int) -> list[nn.Module]:
    """From the coarsest grid to a latent vector, or back."""
    if body.dense is None:
        return [nn.Linear(inputs, outputs)]
    return [nn.Linear(inputs, body.dense), _activation(body.activation), nn.Linear(body.dense, outputs)]


def _norm_activation(body: GridBody, width: int) -> list[nn.Module]:
    norm: list[nn.Module] = [nn.GroupNorm(math.gcd(8, width), width)] if body.norm == "group" else []
    return [*norm, _activation(body.activation)]


def _after_conv(body: GridBody, width: int) -> list[nn.Module]:
    """Plain bodies have normalization and activation after each convolution, residual ones before it."""
    return _norm_activation(body, width) if isinstance(body, Conv) else []


def _conv(body: GridBody, inputs: int, width: int, gain: float = 1.0) -> list[nn.Module]:
    return [_unit_variance(nn.Conv2d(inputs, width, 3, padding=1), gain), *_after_conv(body, width)]


def _add_levels(
    net: nn.Sequential,
    body: GridBody,
    widths: Sequence[int],
    name: str,
    resample: Callable[[int, int], list[nn.Module]],
) -> None:
    """The blocks of each grid size, and before each but the first a change of the grid, called `name`."""
    for level, width in enumerate(widths):
        if level:
            layers = resample(widths[level - 1], width)
            net.add_module(f"{name}{level}", nn.Sequential(*layers, *_after_conv(body, width)))
        blocks: list[nn.Module] = []
        for _ in range(body.depth):
            gain = _GAINS[body.activation]
            blocks += _conv(body, width, width, gain) if isinstance(body, Conv) else [Residual(body, width)]
        net.add_module(f"blocks{level}", nn.Sequential(*blocks))


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def _resampling_gain(body: GridBody) -> float:
    """Plain bodies change the grid after an activation, residual ones before it."""
    return _GAINS[body.activation] if isinstance(body, Conv) else 1.0


def _unit_variance(layer: _Layer, gain: float = 1.0) -> _Layer:
    """The layer, initialized so that inputs of variance 1 / gain^2 give outputs of variance 1.

    torch's own initialization divides the variance by 3 at every layer, and without normalization that leaves a
    latent too small to distinguish codes.
    """
    with torch.no_grad():
        fan = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            fan = layer.weight[:, 0].numel() // math.prod(layer.stride)
        layer.weight *= gain / math.sqrt(fan) / layer.weight.std()
        assert layer.bias is not None
        layer.bias.zero_()
    return layer


class BlackToZero(nn.Module):
    """Pixels from [-1, 1] to [0, 1], flattened; further values after the pixels are not changed."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([(x[:, : self.pixels] + 1) / 2, x[:, self.pixels :]], dim=1)


class Residual(nn.Module):
    """x + f(x), where f is initially 0, so that a deep stack starts as the identity."""

    def __init__(self, body: GridBody, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        first = _unit_variance(nn.Conv2d(width, width, 3, padding=1), _GAINS[body.activation])
        self.f = nn.Sequential(*_norm_activation(body, width), first, *_norm_activation(body, width), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def _equal_subpixels(inputs: int, outputs: int, factor: int) -> nn.Conv2d:
    """3x3 convolution before a depth-to-space by `factor`; the sub-pixels of a channel are initially equal."""
    conv = nn.Conv2d(inputs, outputs * factor**2, 3, padding=1)
    with torch.no_grad():
        assert conv.bias is not None
        conv.weight.copy_(conv.weight[:outputs].repeat_interleave(factor**2, dim=0))
        conv.bias.copy_(conv.bias[:outputs].repeat_interleave(factor**2, dim=0))
    return conv


def _upsample(body: GridBody, inputs: int, outputs: int) -> list[nn.Module]:
    gain = _resampling_gain(body)
    if body.upsample == "transpose":
        return [_unit_variance(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), gain)]
    if body.upsample == "resize":
        conv = _unit_variance(nn.Conv2d(inputs, outputs, 3, padding=1), gain)
        return [nn.Upsample(scale_factor=2, mode="nearest"), conv]
    return [_unit_variance(_equal_subpixels(inputs, outputs, 2), gain), nn.PixelShuffle(2)]
