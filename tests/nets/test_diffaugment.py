"""Differentiable augmentation: each law against a plain computation, its noise, its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vaedist.core.context import LaneContext, generator
from vaedist.nets.adversarial_config import Augmentation
from vaedist.nets.diffaugment import augment

ALL: tuple[Augmentation, ...] = ("color", "translation", "cutout")
ROWS = 64


def ctx(start: int = 0, stop: int = ROWS, step: int = 0) -> LaneContext:
    return LaneContext(seed=1, step=step, batch_size=ROWS, lanes=16, rows=(start, stop))


def images(channels: int = 3, height: int = 16, width: int = 24) -> Tensor:
    draw = generator("diffaugment", channels)
    return torch.rand((ROWS, channels, height, width), generator=draw, dtype=torch.float64) * 2 - 1


def test_nothing_asked_for_is_nothing_done() -> None:
    image = images()
    assert augment(image, (), ctx(), "real") is image


def test_color_changes_brightness_saturation_and_contrast_by_its_law() -> None:
    image = images()
    u = ctx().uniform("real.color", (ROWS, 3, 1, 1, 1)).double()
    expected = image + u[:, 0] - 0.5
    grey = expected.mean(1, keepdim=True)
    expected = 2 * u[:, 1] * expected + (1 - 2 * u[:, 1]) * grey
    level = expected.mean((1, 2, 3), keepdim=True)
    expected = (u[:, 2] + 0.5) * expected + (0.5 - u[:, 2]) * level
    out = augment(image, ["color"], ctx(), "real")
    torch.testing.assert_close(out, expected)
    # The image's mean moves by the brightness alone, which is even around 0.
    moved = (out - image).mean((1, 2, 3))
    torch.testing.assert_close(moved, u[:, 0].flatten() - 0.5)
    assert abs(float(moved.mean())) < 0.1 and float(moved.abs().max()) <= 0.5


def test_translation_moves_whole_pixels_up_to_an_eighth_and_fills_with_zero() -> None:
    image = images() + 3  # no pixel is 0
    out = augment(image, ["translation"], ctx(), "real")
    shifts = set()
    for before, after in zip(image, out, strict=True):
        found = []
        for down in range(-2, 3):
            for right in range(-3, 4):
                moved = torch.zeros_like(before)
                moved[:, max(0, down) : 16 + min(0, down), max(0, right) : 24 + min(0, right)] = before[
                    :, max(0, -down) : 16 + min(0, -down), max(0, -right) : 24 + min(0, -right)
                ]
                if torch.equal(moved, after):
                    found.append((down, right))
        assert len(found) == 1
        shifts.add(found[0])
    assert {down for down, _ in shifts} == set(range(-2, 3)), "up to 16 / 8 rows"
    assert {right for _, right in shifts} == set(range(-3, 4)), "up to 24 / 8 columns"


def test_cutout_is_a_rectangle_of_half_of_each_side_around_any_place() -> None:
    image = images() + 3
    out = augment(image, ["cutout"], ctx(), "real")
    hole = out == 0
    assert torch.equal(torch.where(hole, 0.0, image), out)
    assert torch.equal(hole, hole[:, :1].expand_as(hole)), "all channels together"
    rows, columns = hole[:, 0].any(2).sum(1), hole[:, 0].any(1).sum(1)
    assert torch.equal(hole[:, 0].sum((1, 2)), rows * columns), "a rectangle"
    assert int(rows.max()) == 8 and int(columns.max()) == 12
    assert int(rows.min()) < 8 and int(columns.min()) < 12, "those at the edge stand over it"
    assert len(torch.unique(hole[:, 0].flatten(1), dim=0)) > ROWS // 2


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_belongs_to_the_sample_and_to_the_name(channels: int) -> None:
    image = images(channels)
    whole = augment(image, ALL, ctx(), "real")
    parts = [augment(image[a:b], ALL, ctx(a, b), "real") for a, b in [(0, 10), (10, 37), (37, ROWS)]]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(augment(image, ALL, ctx(), "real"), whole)
    assert not torch.equal(augment(image, ALL, ctx(), "fake"), whole)
    assert not torch.equal(augment(image, ALL, ctx(step=1), "real"), whole)


def test_gradients_reach_the_image_twice() -> None:
    image = images()[:2, :, :5, :6].requires_grad_()

    def seen(x: Tensor) -> Tensor:
        return (
            augment(x, ALL, LaneContext(seed=1, step=0, batch_size=2, lanes=1), "real")
            .square()
            .sum((1, 2, 3))
        )

    with torch.random.fork_rng(devices=[]):  # the checks draw their own directions
        assert torch.autograd.gradcheck(seen, image)
        assert torch.autograd.gradgradcheck(seen, image)
