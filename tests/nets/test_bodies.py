"""Bodies: shapes for every kind, grid and channel count, their start, independence of samples, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.settings import Strict, parse
from vaedist.core.context import generator
from vaedist.core.errors import UserError
from vaedist.nets.bodies import decoder, encoder, grid
from vaedist.nets.bodies_config import Body, Conv, Mlp, Resnet


def body(**settings: Any) -> Mlp | Conv | Resnet:
    adapter: TypeAdapter[Mlp | Conv | Resnet] = TypeAdapter(Body)
    return adapter.validate_python(settings)


def nets(one: Mlp | Conv | Resnet, spec: Spec, latent: int, vector: bool) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            encoder(one, spec, latent, vector=vector),
            decoder(one, spec, latent, vector=vector),
        )


def images(spec: Spec, rows: int = 3) -> Tensor:
    shape = (rows, *spec.image_shape)
    return torch.rand(shape, generator=generator("images", shape)) * 2 - 1


BODIES = [
    {"kind": "mlp", "width": 24, "depth": 1},
    {"kind": "conv", "width": 24, "depth": 0, "downsample": 8},
    {"kind": "conv", "width": 16, "depth": 1, "downsample": 4, "upsample": "resize", "norm": "none"},
    {"kind": "conv", "width": 16, "depth": 1, "downsample": 4, "upsample": "shuffle", "patch": 2},
    {"kind": "resnet", "width": 40, "depth": 1, "downsample": 4},
    {"kind": "resnet", "width": 16, "depth": 2, "downsample": 8, "upsample": "resize", "patch": 4},
    {"kind": "resnet", "width": 12, "depth": 0, "downsample": 2, "upsample": "shuffle", "norm": "none"},
    {"kind": "resnet", "width": 16, "depth": 1, "downsample": 4, "patch": 4},
    {"kind": "resnet", "width": 16, "depth": 1, "downsample": 1},
    {"kind": "conv", "width": [24, 8, 12], "depth": 0, "downsample": 8, "patch": 2, "activation": "relu"},
    {
        "kind": "resnet",
        "width": [8, 16],
        "depth": 1,
        "downsample": 2,
        "activation": "leaky_relu",
        "norm": "none",
    },
]


@pytest.mark.parametrize("settings", BODIES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("spec", [Spec(1, (16, 16)), Spec(3, (24, 24)), Spec(5, (8, 16))], ids=str)
def test_shapes_of_vectors_and_maps(settings: dict[str, Any], spec: Spec) -> None:
    one, x = body(**settings), images(spec)
    h, w = grid(one, spec)
    for vector, shape in [(True, (3, 7)), (False, (3, 7, h, w))]:
        down, up = nets(one, spec, 7, vector)
        z = down(x)
        assert z.shape == shape
        out = up(z)
        assert out.shape == x.shape
        assert out.isfinite().all()
        out.square().sum().backward()
        for name, p in (*down.named_parameters(), *up.named_parameters()):
            assert p.grad is not None, f"{name} does not take part"


def test_grids() -> None:
    assert grid(body(kind="conv", downsample=4), Spec(1, (28, 28))) == (7, 7)
    assert grid(body(kind="resnet", downsample=8, patch=4), Spec(1, (256, 128))) == (32, 16)
    assert grid(body(kind="mlp", grid=4), Spec(1, (28, 28))) == (4, 4)
    down, up = nets(body(kind="mlp", width=8, grid=4), Spec(1, (28, 28)), 3, False)
    z = down(images(Spec(1, (28, 28))))
    assert z.shape == (3, 3, 4, 4) and up(z).shape == (3, 1, 28, 28)


def test_widths_halve_towards_the_image() -> None:
    def widths(**settings: Any) -> tuple[int, ...]:
        return Resnet(**settings).widths

    assert widths(width=64, downsample=4) == (16, 32, 64)
    assert widths(width=64, downsample=8, patch=4) == (32, 64)
    assert widths(width=64, downsample=4, patch=4) == (64,)
    assert widths(width=32, downsample=8) == (16, 16, 16, 32)
    assert widths(width=8, downsample=4) == (8, 8, 8)


def test_a_list_names_the_width_of_every_grid() -> None:
    one = body(kind="conv", width=[5, 3, 7], depth=0, downsample=8, patch=2)
    assert isinstance(one, Conv) and one.widths == (5, 3, 7)
    down, up = nets(one, Spec(1, (16, 16)), 2, True)

    def channels(net: nn.Module) -> list[tuple[int, int]]:
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        return [(layer.in_channels, layer.out_channels) for layer in layers]

    assert channels(down) == [(4, 5), (5, 3), (3, 7)]
    assert channels(up) == [(7, 3), (3, 5), (5, 4)]


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("silu", nn.SiLU), ("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)],
)
@pytest.mark.parametrize(
    "settings", [{"kind": "conv"}, {"kind": "resnet"}, {"kind": "mlp", "depth": 1}], ids=str
)
def test_one_activation_everywhere(settings: dict[str, Any], activation: str, kind: type[nn.Module]) -> None:
    grids = {} if settings["kind"] == "mlp" else {"dense": 6, "depth": 1}
    one = body(**settings, **grids, width=8, activation=activation)
    for net in nets(one, Spec(1, (8, 8)), 2, True):
        names = {type(m) for m in net.modules()} & {nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.Tanh}
        assert names == {kind}


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh"])
def test_every_activation_keeps_the_scale(activation: str) -> None:
    """Of four convolutions without normalisation, each of which the gain of the activation before must make up for."""
    one = body(kind="conv", norm="none", width=64, depth=1, downsample=4, activation=activation)
    down, _ = nets(one, Spec(1, (32, 32)), 16, False)
    z = down(torch.randn((4, 1, 32, 32), generator=generator("unit")))
    assert 0.6 < float(z.detach().square().mean().sqrt()) < 1.6


def test_black_moves_no_weight_where_it_is_zero() -> None:
    spec = Spec(1, (4, 4))
    with torch.random.fork_rng(devices=[]):
        net = encoder(Mlp(width=8, depth=1, black=0), spec, 2, vector=True, extra=3)
        signed = encoder(Mlp(width=8, depth=1), spec, 2, vector=True, extra=3)
    hidden = net.hidden0[0]  # type: ignore[index, union-attr]
    x = torch.cat([torch.tensor([-1.0, 1.0] * 8), torch.tensor([-1.0, 0.5, 2.0])]).expand(5, -1)
    net(x).square().sum().backward()
    moved = hidden.weight.grad.abs().sum(0)  # type: ignore[union-attr]
    assert (moved[0:16:2] == 0).all() and (moved[1:16:2] > 0).all()
    assert (moved[16:] > 0).all(), "what stands beside the image is not its black"
    with torch.no_grad():
        pixels = net.state_dict() | {"hidden0.0.weight": hidden.weight * torch.tensor([0.5] * 16 + [1.0] * 3)}
        pixels["hidden0.0.bias"] = hidden.bias + hidden.weight[:, :16].sum(1) / 2  # type: ignore[index, union-attr]
        signed.load_state_dict(pixels)
        torch.testing.assert_close(signed(x), net(x), msg="the same functions, otherwise parametrised")


def test_a_dense_layer_lies_between_grid_and_vector() -> None:
    one = body(kind="conv", width=8, depth=0, downsample=4, dense=6, activation="relu")
    down, up = nets(one, Spec(1, (16, 16)), 3, True)

    def sizes(net: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]

    assert sizes(down) == [(8 * 16, 6), (6, 3)]
    assert sizes(up) == [(3, 6), (6, 8 * 16)]
    assert up(down(images(Spec(1, (16, 16))))).shape == (3, 1, 16, 16)
    for net in (encoder, decoder):
        with pytest.raises(UserError, match=r"dense is 6, but this model's latent is a map: leave it out"):
            net(one, Spec(1, (16, 16)), 3, vector=False)


@pytest.mark.parametrize("settings", BODIES, ids=lambda s: "-".join(map(str, s.values())))
def test_no_sample_sees_another(settings: dict[str, Any]) -> None:
    spec = Spec(2, (16, 16))
    x = images(spec, rows=4)
    down, up = nets(body(**settings), spec, 5, False)
    together = up(down(x))
    apart = torch.cat([up(down(row[None])) for row in x])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    names = {type(module).__name__ for module in (*down.modules(), *up.modules())}
    assert not any(name.startswith("BatchNorm") for name in names)


@pytest.mark.parametrize("kind", ["conv", "resnet"])
@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("upsample", ["transpose", "resize", "shuffle"])
def test_latents_start_at_unit_scale(kind: str, norm: str, upsample: str) -> None:
    """Neither vanishing nor exploding; a plain stack without normalisation is only kept so while it is short."""
    spec = Spec(1, (32, 32))
    depth = 1 if (kind, norm) == ("conv", "none") else 4
    one = body(kind=kind, norm=norm, upsample=upsample, width=64, depth=depth, downsample=4)
    down, up = nets(one, spec, 16, False)
    x = torch.randn((4, 1, 32, 32), generator=generator("unit"))
    z = down(x)
    assert 0.3 < float(z.detach().std()) < 3
    noise = torch.randn(z.shape, generator=generator("latent"))
    assert 0.1 < float(up(noise).detach().std()) < 3


def test_shuffled_subpixels_start_equal() -> None:
    spec = Spec(2, (16, 16))
    _, up = nets(body(kind="resnet", patch=4, downsample=4, width=8, depth=1), spec, 3, False)
    out = up(torch.randn((1, 3, 4, 4), generator=generator("sub")))
    blocks = out.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    torch.testing.assert_close(blocks, blocks[..., :1].expand_as(blocks))


@pytest.mark.parametrize("settings", BODIES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_decoder_emits_as_many_channels_as_the_likelihood_asks_for(settings: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        up = decoder(body(**settings), Spec(3, (16, 24)), 5, vector=True, channels=7)
    assert up(torch.zeros(2, 5)).shape == (2, 7, 16, 24)


def test_downsampling_must_divide_the_image() -> None:
    with pytest.raises(
        UserError, match=r"model\.encoder\.downsample is 8, .* 28x28: use 1 or 2 or 4, .*--size 32"
    ):
        encoder(Conv(downsample=8), Spec(1, (28, 28)), 4, vector=True)


class Holder(Strict):
    encoder: Body


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "conv", "downsample": 6}, "power of two"),
        ({"kind": "conv", "downsample": 2, "patch": 4}, "patch .4. is a part of downsample .2."),
        ({"kind": "resnet", "widht": 3}, "did you mean 'width'"),
        ({"kind": "mlp", "upsample": "resize"}, "unknown key"),
        ({"kind": "conv", "upsample": "bilinear"}, "upsample"),
        ({"kind": "conv", "width": [8, 16], "downsample": 8}, "width lists 2 grid sizes, .* = 8 makes 4"),
        ({"kind": "conv", "width": 0}, r"job.yaml: encoder.width: input should be greater .*\(it is 0\)$"),
        (
            {"kind": "conv", "width": [8, 0]},
            r"job.yaml: encoder.width.1: input should be greater .*\(it is 0\)$",
        ),
    ],
)
def test_mistakes_in_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Holder, {"encoder": settings}, "job.yaml")


def test_a_vector_has_no_grid() -> None:
    with pytest.raises(UserError, match="latent is a vector"):
        encoder(Mlp(grid=2), Spec(1, (8, 8)), 4, vector=True)
