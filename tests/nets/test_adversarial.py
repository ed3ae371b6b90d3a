"""The discriminator's side: losses against torch's, R1 and its gradients in closed form, spectral norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from vaedist.config.job import Spec
from vaedist.config.settings import parse
from vaedist.core.context import LaneContext, generator
from vaedist.core.errors import UserError
from vaedist.nets.adversarial import Discriminator, SpectralNorm
from vaedist.nets.adversarial_config import Adversary

SPEC = Spec(2, (8, 8))
SMALL = {"kind": "resnet", "width": 8, "depth": 1, "downsample": 2, "norm": "none"}
SCORES = torch.tensor([-3.0, -0.5, 0.4, 2.0], dtype=torch.float64)
REAL, FAKE = SCORES, SCORES.flip(0) / 2


def settings(**given: Any) -> Adversary:
    return parse(Adversary, {"discriminator": SMALL, **given}, "test", prefix="model")


def discriminator(spec: Spec = SPEC, **given: Any) -> Discriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminator(settings(**given), spec).double()


def images(rows: int = 3, spec: Spec = SPEC) -> Tensor:
    shape = (rows, *spec.image_shape)
    return torch.rand(shape, generator=generator("adversarial"), dtype=torch.float64) * 2 - 1


def turn(number: int) -> LaneContext:
    return LaneContext(seed=0, step=7 * number, turn=number, batch_size=3, lanes=1, phase="discriminator")


# Losses -------------------------------------------------------------------------------------------------------


def cross_entropy(scores: Tensor, label: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(
        scores, torch.full_like(scores, label), reduction="none"
    )


def test_non_saturating_losses_are_cross_entropies() -> None:
    play = discriminator()
    torch.testing.assert_close(play.loss(REAL, FAKE), cross_entropy(REAL, 1) + cross_entropy(FAKE, 0))
    torch.testing.assert_close(play.generator_loss(None, FAKE), cross_entropy(FAKE, 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_smoothed_labels(smoothing: float) -> None:
    play = discriminator(gan_loss="bce", label_smoothing=smoothing)
    expected = (cross_entropy(REAL, 1 - smoothing) + cross_entropy(FAKE, 0)) / 2
    torch.testing.assert_close(play.loss(REAL, FAKE), expected)
    torch.testing.assert_close(play.generator_loss(None, FAKE), cross_entropy(FAKE, 1))


def test_relativistic_losses_know_differences_only() -> None:
    play = discriminator(gan_loss="relativistic")
    torch.testing.assert_close(play.loss(REAL, FAKE), cross_entropy(REAL - FAKE, 1))
    torch.testing.assert_close(play.generator_loss(REAL, FAKE), cross_entropy(FAKE - REAL, 1))
    torch.testing.assert_close(play.loss(REAL + 5, FAKE + 5), play.loss(REAL, FAKE))


def test_wasserstein_clips_every_weight_after_a_step() -> None:
    play = discriminator(gan_loss="wgan_clip", r1=0, weight_clip=0.02)
    torch.testing.assert_close(play.loss(REAL, FAKE), FAKE - REAL)
    torch.testing.assert_close(play.generator_loss(None, FAKE), -FAKE)
    assert max(float(p.detach().abs().max()) for p in play.parameters()) > 0.02
    play.after_step()
    assert max(float(p.detach().abs().max()) for p in play.parameters()) == 0.02


def test_accuracies() -> None:
    statistics = discriminator().score_statistics(REAL, FAKE)
    assert statistics["real_accuracy"].tolist() == [0, 0, 1, 1]
    assert FAKE.tolist() == [1.0, 0.2, -0.25, -1.5] and statistics["fake_accuracy"].tolist() == [0, 0, 1, 1]
    pairs = discriminator(gan_loss="relativistic").score_statistics(REAL, FAKE)
    assert pairs["pair_accuracy"].tolist() == [0, 0, 1, 1] and "real_accuracy" not in pairs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gan_loss": "wgan_clip"}, r"set model\.r1=0"),
        ({"gan_loss": "wgan_clip", "r1": 0, "spectral_norm": True}, r"set model\.spectral_norm=false"),
        ({"label_smoothing": 0.1}, "label_smoothing belongs to gan_loss bce"),
        ({"gan_loss": "hinge"}, "gan_loss"),
        ({"diffaugment": ["colour"]}, "diffaugment"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**given)


# R1 -----------------------------------------------------------------------------------------------------------


def linear(play: Discriminator) -> Tensor:
    """Make the discriminator w.x; returns w."""
    weight = torch.randn(SPEC.pixels, generator=generator("w"), dtype=torch.float64)
    layer = nn.utils.skip_init(nn.Linear, SPEC.pixels, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    play.body = nn.Sequential(nn.Flatten(), layer)
    return weight


def test_r1_of_a_linear_discriminator_and_its_gradient() -> None:
    """|grad_x w.x|^2 = |w|^2 for every x, and the gradient of gamma/2 |w|^2 is gamma w."""
    play = discriminator(r1=3.0, r1_every=4)
    weight, x = linear(play), images()
    scores, penalty = play.real_scores(x, turn(8))
    torch.testing.assert_close(scores, x.flatten(1) @ weight)
    assert penalty is not None
    torch.testing.assert_close(penalty, 4 * 1.5 * weight.square().sum().expand(3))
    penalty.mean().backward()
    (trained,) = play.parameters()
    torch.testing.assert_close(trained.grad, 4 * 3.0 * weight[None])


def test_squared_gradient_and_its_own_gradient_agree_with_finite_differences() -> None:
    play, x = discriminator(spectral_norm=True), images(2)
    _, squared_gradient = play.scores_and_squared_gradient(x)
    h, direction = 1e-6, torch.randn(x.shape, generator=generator("direction"), dtype=torch.float64)
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(play(y).sum(), y)
    measured = (play(x + h * direction) - play(x - h * direction)) / (2 * h)
    torch.testing.assert_close(measured, (slope * direction).flatten(1).sum(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(squared_gradient, slope.square().flatten(1).sum(1))

    squared_gradient.sum().backward()
    weight = next(play.parameters())
    assert weight.grad is not None
    place = (0,) * weight.ndim
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * h
            values.append(float(play.scores_and_squared_gradient(x)[1].sum()))
            weight[place] -= sign * h
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(weight.grad[place]), rel=1e-4, abs=1e-6)


def test_r1_is_lazy_by_turns_and_its_mean_counts() -> None:
    play, x = discriminator(r1=1.0, r1_every=4), images()
    found = [play.real_scores(x, turn(number))[1] for number in range(8)]
    due = [number for number, penalty in enumerate(found) if penalty is not None and penalty.any()]
    assert due == [0, 4]
    every = discriminator(r1=1.0, r1_every=1).real_scores(x, turn(3))[1]
    assert every is not None
    torch.testing.assert_close(torch.stack([p for p in found if p is not None]).mean(0), every)
    assert discriminator(r1=0).real_scores(x, turn(0))[1] is None


def test_r1_is_in_fp32_under_autocast() -> None:
    play, x = discriminator().float(), images().float()
    expected = play.scores_and_squared_gradient(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = play.scores_and_squared_gradient(x)
        rough = play(x)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert rough.dtype == torch.float32 and not torch.equal(rough, expected[0])


def test_features_lead_to_the_same_scores() -> None:
    play, x = discriminator(), images()
    scores, features = play.features(x)
    torch.testing.assert_close(scores, play(x))
    assert features.shape == (3, 8 * 4 * 4)


# Spectral normalisation -----------------------------------------------------------------------------------------


def test_weights_have_norm_one_and_the_vectors_catch_up_with_them() -> None:
    """One power iteration a step lags behind weights that move; on weights that rest it arrives."""
    play = discriminator(spectral_norm=True, r1_every=2)
    layers = [layer for layer in play.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert layers and all(parametrize.is_parametrized(layer, "weight") for layer in layers)

    def furthest() -> float:
        norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) for layer in layers]
        return max(abs(float(norm) - 1) for norm in norms)

    assert furthest() < 0.01
    optimizer = torch.optim.Adam(play.parameters(), 1e-3)
    lag = []
    for number in range(30):
        scores, penalty = play.real_scores(images(), turn(number))
        assert penalty is not None
        optimizer.zero_grad()
        (play.loss(scores, play(-images())) + penalty).mean().backward()
        optimizer.step()
        play.after_step()
        lag.append(furthest())
    assert max(lag) < 0.3
    for _ in range(300):
        play.after_step()
    assert furthest() < 1e-3


def test_the_normalized_weight_has_the_gradient_of_the_quotient() -> None:
    weight = torch.randn((3, 4), generator=generator("weight"), dtype=torch.float64).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = SpectralNorm(weight).double()
    for _ in range(200):
        norm.power_iteration(weight.detach())
    assert torch.autograd.gradcheck(norm, weight)
    exact = weight / torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(norm(weight), exact)
    probe = torch.randn((3, 4), generator=generator("probe"), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((out * probe).sum(), weight)[0] for out in (norm(weight), exact))
    torch.testing.assert_close(mine, theirs)
