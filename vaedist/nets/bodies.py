"""Bodies: the encoder and decoder networks between an image and a latent.

An encoder maps an image (B, C, H, W) in [-1, 1] to features, either one vector per image (B, out) or a map
(B, out, h, w); a decoder goes the other way. Three kinds:

| kind | what it is |
|---|---|
| `mlp` | hidden layers of `width` units over the flattened image |
| `conv` | strided convolutions, each followed by `depth` 3x3 convolutions at the same grid size |
| `resnet` | the same with pre-activation residual blocks: x + conv(act(norm(conv(act(norm(x)))))) |

Grids. `downsample` is the whole factor between image and latent grid. The first `patch` of it is space-to-depth
(an image of C channels becomes C * patch^2 channels on a grid `patch` times coarser, nothing lost), and every
further factor of two is a strided convolution. A 3x3 convolution at half the grid size costs a quarter, so `patch`
is what makes large images cheap. `width` is the number of channels at the coarsest grid; each finer grid has half of
the one below it, at least 16. A list names them all, finest first. Between the coarsest grid and a latent vector,
`dense` puts one more layer of so many units.

`upsample` says how the decoder doubles a grid: `transpose` (transposed 4x4 convolution), `resize` (nearest
neighbour, then 3x3 convolution: no checkerboard) or `shuffle` (3x3 convolution to four times the channels, then
depth-to-space; sub-pixels start equal, after Aitken et al., "Checkerboard artifact free sub-pixel convolution").

Normalisation is GroupNorm (Wu and He, "Group normalization") or none. It never looks across samples, so the
result depends neither on the batch nor on the number of processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.core.errors import UserError
from vaedist.nets.bodies_config import Activation, Conv, GridBody, Mlp, Resnet, Upsample

_LEAK = 0.2  # slope of the leaky one below 0
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


def _hidden(body: Mlp, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), _activation(body.activation))


def grid(body: Mlp | Conv | Resnet, spec: Spec, where: str = "model.encoder") -> tuple[int, int]:
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


def matching_grid(
    down: Mlp | Conv | Resnet, up: Mlp | Conv | Resnet, spec: Spec, where: str = "model"
) -> tuple[int, int]:
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
    body: Mlp | Conv | Resnet,
    spec: Spec,
    out: int,
    *,
    vector: bool,
    extra: int = 0,
    where: str = "model.encoder",
) -> nn.Sequential:
    """A network from (B, C, H, W) to (B, out) if `vector`, else to (B, out, h, w) with (h, w) = `grid(...)`.

    Its children are the blocks that a layer table shows. With `extra` it takes as many further inputs beside the
    image (`nets.conditioning`): further channels, or for an mlp further values (B, C * H * W + extra).
    """
    h, w = grid(body, spec, where)
    net = nn.Sequential()
    if isinstance(body, Mlp):
        _no_grid(body, vector, where)
        net.add_module("flatten", nn.Flatten() if body.black else _BlackIsZero(spec.pixels))
        for layer, (a, b) in enumerate(_pairs(spec.pixels + extra, body)):
            net.add_module(f"hidden{layer}", _hidden(body, a, b))
        net.add_module("head", nn.Linear(body.width, out * h * w))
        if not vector:
            net.add_module("map", nn.Unflatten(1, (out, h, w)))
        return net
    _no_dense(body, vector, where)
    widths = body.widths
    stem: list[nn.Module] = [nn.PixelUnshuffle(body.patch)] if body.patch > 1 else []
    net.add_module(
        "stem", nn.Sequential(*stem, *_conv(body, (spec.channels + extra) * body.patch**2, widths[0]))
    )
    for level, width in enumerate(widths):
        if level:
            down = _unit(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1), _gain(body))
            net.add_module(f"down{level}", nn.Sequential(down, *_after(body, width)))
        net.add_module(f"blocks{level}", nn.Sequential(*_blocks(body, width)))
    head: list[nn.Module] = [*_before(body, widths[-1])]
    if vector:
        head += [nn.Flatten(), *_linear(body, widths[-1] * h * w, out)]
    else:
        head += [_unit(nn.Conv2d(widths[-1], out, 1), _GAINS[body.activation])]
    net.add_module("head", nn.Sequential(*head))
    return net


def decoder(
    body: Mlp | Conv | Resnet,
    spec: Spec,
    latent: int,
    *,
    vector: bool,
    extra: int = 0,
    channels: int | None = None,
    where: str = "model.decoder",
) -> nn.Sequential:
    """A network from (B, latent) if `vector`, else from (B, latent, h, w), to an image (B, `channels`, H, W).

    `channels` is what the likelihood asks for (`ObservationModel.outputs`), by default one per channel of the image.
    Nothing bounds the output: [-1, 1] is what the likelihood reads as black to white. `extra` is as for `encoder`.
    """
    h, w = grid(body, spec, where)
    channels = channels or spec.channels
    net = nn.Sequential()
    if isinstance(body, Mlp):
        _no_grid(body, vector, where)
        if not vector:
            net.add_module("flatten", nn.Flatten())
        for layer, (a, b) in enumerate(_pairs(latent * h * w + extra, body)):
            net.add_module(f"hidden{layer}", _hidden(body, a, b))
        net.add_module("head", nn.Linear(body.width, channels * math.prod(spec.shape)))
        net.add_module("image", nn.Unflatten(1, (channels, *spec.shape)))
        return net
    _no_dense(body, vector, where)
    widths = body.widths[::-1]
    if vector:
        first: list[nn.Module] = [
            *_linear(body, latent + extra, widths[0] * h * w),
            nn.Unflatten(1, (widths[0], h, w)),
        ]
        net.add_module("stem", nn.Sequential(*first, *_after(body, widths[0])))
    else:
        net.add_module("stem", nn.Sequential(*_conv(body, latent + extra, widths[0])))
    for level, width in enumerate(widths):
        if level:
            up = _up(body.upsample, widths[level - 1], width, _gain(body))
            net.add_module(f"up{level}", nn.Sequential(*up, *_after(body, width)))
        net.add_module(f"blocks{level}", nn.Sequential(*_blocks(body, width)))
    image = [_equal_subpixels(widths[-1], channels, body.patch), nn.PixelShuffle(body.patch)]
    net.add_module("head", nn.Sequential(*_before(body, widths[-1]), *image))
    return net


def _no_grid(body: Mlp, vector: bool, where: str) -> None:
    if vector and body.grid != 1:
        raise UserError(f"{where}.grid is {body.grid}, but this model's latent is a vector: leave it at 1")


def _no_dense(body: GridBody, vector: bool, where: str) -> None:
    if body.dense is not None and not vector:
        raise UserError(f"{where}.dense is {body.dense}, but this model's latent is a map: leave it out")


def _linear(body: GridBody, inputs: int, outputs: int) -> Iterator[nn.Module]:
    """From the coarsest grid to a latent vector, or back."""
    if body.dense is None:
        yield nn.Linear(inputs, outputs)
    else:
        yield from (
            nn.Linear(inputs, body.dense),
            _activation(body.activation),
            nn.Linear(body.dense, outputs),
        )


def _pairs(inputs: int, body: Mlp) -> list[tuple[int, int]]:
    sizes = [inputs] + [body.width] * body.depth
    return list(itertools.pairwise(sizes))


def _norm(body: GridBody, width: int) -> Iterator[nn.Module]:
    if body.norm == "group":
        yield nn.GroupNorm(math.gcd(8, width), width)


def _after(body: GridBody, width: int) -> Iterator[nn.Module]:
    """What follows a convolution between blocks: plain bodies normalise and activate there, residual ones do not."""
    if isinstance(body, Conv):
        yield from _norm(body, width)
        yield _activation(body.activation)


def _before(body: GridBody, width: int) -> Iterator[nn.Module]:
    """What precedes the last convolution: the activation that residual blocks leave open."""
    if isinstance(body, Resnet):
        yield from _norm(body, width)
        yield _activation(body.activation)


def _conv(body: GridBody, inputs: int, width: int, gain: float = 1.0) -> Iterator[nn.Module]:
    yield _unit(nn.Conv2d(inputs, width, 3, padding=1), gain)
    yield from _after(body, width)


def _blocks(body: GridBody, width: int) -> Iterator[nn.Module]:
    for _ in range(body.depth):
        if isinstance(body, Resnet):
            yield Residual(body, width)
        else:
            yield from _conv(body, width, width, _GAINS[body.activation])


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def _gain(body: GridBody) -> float:
    """Plain bodies change the grid after an activation, residual ones before it."""
    return _GAINS[body.activation] if isinstance(body, Conv) else 1.0


def _unit(layer: _Layer, gain: float = 1.0) -> _Layer:
    """The layer, started so that inputs of variance 1 / gain^2 give outputs of variance 1.

    torch's own start divides the variance by 3 at every layer, and without normalisation that leaves a latent
    too small to tell codes apart.
    """
    with torch.no_grad():
        fan = layer.weight[0].numel()
        if isinstance(layer, nn.ConvTranspose2d):
            fan = layer.weight[:, 0].numel() // math.prod(layer.stride)
        layer.weight *= gain / math.sqrt(fan) / layer.weight.std()
        assert layer.bias is not None
        layer.bias.zero_()
    return layer


class _BlackIsZero(nn.Module):
    """From [-1, 1] to [0, 1], flattened; what stands behind the pixels stays."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([(x[:, : self.pixels] + 1) / 2, x[:, self.pixels :]], dim=1)


class Residual(nn.Module):
    """x + f(x), where f starts at 0 so that a deep stack starts as the identity."""

    def __init__(self, body: GridBody, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        first = _unit(nn.Conv2d(width, width, 3, padding=1), _GAINS[body.activation])
        layers = [*_norm(body, width), _activation(body.activation), first]
        self.f = nn.Sequential(*layers, *_norm(body, width), _activation(body.activation), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def _equal_subpixels(inputs: int, outputs: int, factor: int) -> nn.Conv2d:
    """3x3 convolution before a depth-to-space by `factor`; the sub-pixels of a channel start equal."""
    conv = nn.Conv2d(inputs, outputs * factor**2, 3, padding=1)
    with torch.no_grad():
        assert conv.bias is not None
        conv.weight.copy_(conv.weight[:outputs].repeat_interleave(factor**2, dim=0))
        conv.bias.copy_(conv.bias[:outputs].repeat_interleave(factor**2, dim=0))
    return conv


def _up(how: Upsample, inputs: int, outputs: int, gain: float) -> list[nn.Module]:
    if how == "transpose":
        return [_unit(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), gain)]
    if how == "resize":
        return [
            nn.Upsample(scale_factor=2, mode="nearest"),
            _unit(nn.Conv2d(inputs, outputs, 3, padding=1), gain),
        ]
    return [_unit(_equal_subpixels(inputs, outputs, 2), gain), nn.PixelShuffle(2)]
