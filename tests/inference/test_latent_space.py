"""Paths through a latent space: interpolation, traversal, manifold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import to_uint8
from vaedist.inference.latent_space import interpolation, manifold, traversal
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (8, 8), classes=3)
BODY = {"kind": "mlp", "width": 16, "depth": 1}


def small(**settings: object) -> Variant:
    section = {"kind": "vae", "encoder": BODY, "latent": 2, **settings}
    return build(model_config(section), SPEC, seed=1).eval().requires_grad_(False)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> tuple[Variant, list[tuple[Tensor, Tensor | None]]]:
    """A model that notes what it is asked to decode."""
    model = small()
    calls: list[tuple[Tensor, Tensor | None]] = []
    decode = model.decode

    def noting(z: Tensor, label: Tensor | None = None) -> object:
        calls.append((z, label))
        return decode(z, label)

    monkeypatch.setattr(model, "decode", noting)
    return model, calls


def test_between_two_latents_direction_and_distance_change_evenly(
    decoded: tuple[Variant, list[tuple[Tensor, Tensor | None]]],
) -> None:
    model, calls = decoded
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    images = interpolation(model, a, b, 5)
    [(z, label)] = calls
    assert label is None and images.shape == (5, 1, 8, 8)
    assert torch.equal(z[0], a) and torch.equal(z[-1], b)
    assert z.norm(dim=1) == pytest.approx(np.linspace(2, 1, 5), abs=1e-5)
    angles = torch.atan2(z[:, 1], z[:, 0])
    assert angles == pytest.approx(np.linspace(0, np.pi / 2, 5), abs=1e-5)


@pytest.mark.parametrize("b", [[3.0, 0.0], [-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
def test_where_there_is_no_turn_the_way_is_straight(
    b: list[float], decoded: tuple[Variant, list[tuple[Tensor, Tensor | None]]]
) -> None:
    model, calls = decoded
    interpolation(model, torch.tensor([1.0, 0.0]), torch.tensor(b), 4)
    expected = torch.linspace(0, 1, 4)[:, None] * (torch.tensor(b) - torch.tensor([1.0, 0.0]))
    assert torch.allclose(calls[0][0], expected + torch.tensor([1.0, 0.0]), atol=1e-6)


def test_a_traversal_moves_one_number(decoded: tuple[Variant, list[tuple[Tensor, Tensor | None]]]) -> None:
    model, calls = decoded
    images = traversal(model, [1, 0], 5, reach=2)
    z = torch.cat([z for z, _ in calls])
    assert len(images) == 10
    assert torch.equal(z[:5, 1], torch.linspace(-2, 2, 5)) and not z[:5, 0].any()
    assert torch.equal(z[5:, 0], torch.linspace(-2, 2, 5)) and not z[5:, 1].any()
    for wrong in (2, -1):
        with pytest.raises(UserError, match=f"no latent dimension {wrong}: the model has 0 to 1"):
            traversal(model, [wrong], 3)


def test_a_traversal_of_a_map_moves_a_channel() -> None:
    model = small(
        encoder={"kind": "conv", "width": 8, "depth": 0, "downsample": 4},
        latent={"kind": "map", "channels": 3},
    )
    images = traversal(model, [2], 3)
    z = torch.zeros(1, 3, 2, 2)
    z[:, 2] = 3.0
    assert (images[2:] == to_uint8(model.decode(z).mean)).all()
    with pytest.raises(UserError, match="no latent channel 3"):
        traversal(model, [3], 3)


def test_the_manifold_is_the_prior_by_quantiles(
    decoded: tuple[Variant, list[tuple[Tensor, Tensor | None]]],
) -> None:
    model, calls = decoded
    assert len(manifold(model, 10)) == 100
    z = torch.cat([z for z, _ in calls]).view(10, 10, 2)
    assert (z[0, :, 0].diff() > 0).all() and (z[:, 0, 1].diff() < 0).all()  # to the right, and upwards
    share = torch.distributions.Normal(0, 1).cdf(z[3, :, 0].double())
    assert share.tolist() == pytest.approx([(i + 0.5) / 10 for i in range(10)], abs=1e-6)
    with pytest.raises(NotDefined, match="two latent numbers and this model has 5"):
        manifold(small(latent=5), 3)
