"""The discretised logistic: it sums to 1, equals the textbook formula, samples what it says, and fits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.core.context import generator
from vaedist.nets.discretized_logistic import DiscretizedLogistic
from vaedist.nets.likelihoods import ObservationModel
from vaedist.nets.likelihoods_config import LogisticLikelihood


def normal(*shape: int, name: object = 0) -> Tensor:
    return torch.randn(shape, generator=generator("logistic", name, shape), dtype=torch.float64)


def uniform(*shape: int, name: object = 0) -> Tensor:
    return torch.rand(shape, generator=generator("logistic uniform", name, shape), dtype=torch.float64)


def levels(n: int = 256) -> Tensor:
    """(256, 1, 1, n): every level, n times."""
    return torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 1, n)


def one(mean: Tensor, log_scale: Tensor) -> DiscretizedLogistic:
    """One logistic for each of n pixels in a row, the same for each of 256 rows of the batch."""
    shape = (256, 1, 1, 1, len(mean))
    none = mean.new_zeros(256, 1, 0, 1, len(mean))
    return DiscretizedLogistic(
        mean.new_zeros(256, 1, 1, len(mean)), mean.expand(shape), log_scale.expand(shape), none
    )


def mixture(
    batch: int, components: int, channels: int, side: int = 2, scale: float = -2.0
) -> DiscretizedLogistic:
    grid = (side, side)
    return DiscretizedLogistic(
        normal(batch, components, *grid, name="weights"),
        0.5 * normal(batch, components, channels, *grid, name="means"),
        scale + 0.3 * normal(batch, components, channels, *grid, name="scales"),
        normal(batch, components, math.comb(channels, 2), *grid, name="couplings"),
    )


MEANS = [-1e6, -50.0, -1.0, -0.9961, -0.3, 0.0, 1 / 255, 0.2, 0.998, 1.0, 3.0, 1e6]
LOG_SCALES = [-60.0, -30.0, -12.0, -7.0, -4.0, -1.0, 0.0, 3.0, 12.0, 30.0]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_the_256_levels_sum_to_one_also_at_extreme_means_and_scales(
    dtype: torch.dtype, within: float
) -> None:
    cases = torch.tensor(list(itertools.product(MEANS, LOG_SCALES)), dtype=dtype)
    x = levels(len(cases)).to(dtype) / 255
    log_p = one(cases[:, 0], cases[:, 1]).log_prob_values(x)
    assert log_p.shape == (256, 1, 1, len(cases))
    assert not log_p.isnan().any() and float(log_p.max()) <= 1e-6
    total = log_p.double().logsumexp(0).exp().flatten()
    worst = int((total - 1).abs().argmax())
    assert abs(float(total[worst]) - 1) < within, cases[worst]


def test_it_is_the_difference_of_sigmoids() -> None:
    mean, log_scale = 0.7 * normal(50, name="m"), -2 + normal(50, name="s")
    log_p = one(mean, log_scale).log_prob_values(levels(50).double() / 255)[:, 0, 0]
    k = torch.arange(256, dtype=torch.float64)[:, None]
    upper = torch.sigmoid(((2 * k + 1) / 255 - 1 - mean) / log_scale.exp())
    lower = torch.sigmoid(((2 * k - 1) / 255 - 1 - mean) / log_scale.exp())
    upper[255], lower[0] = 1.0, 0.0
    torch.testing.assert_close(log_p.exp(), upper - lower, rtol=1e-9, atol=1e-13)


def test_far_tails_keep_finite_values_and_gradients() -> None:
    """Where the difference of sigmoids is 0 in fp32, the logarithm is still right and still pulls."""
    mean = torch.tensor([5.0, -5.0], requires_grad=True)
    log_scale = torch.tensor([-7.0, -7.0], requires_grad=True)
    log_p = one(mean, log_scale).log_prob_values(levels(2).float() / 255)[:, 0, 0]
    assert log_p.isfinite().all()
    assert float(log_p[10, 0].detach()) == pytest.approx(-(5 - 21 / 255 + 1) * math.e**7, rel=1e-3)
    to_mean, to_scale = torch.autograd.grad(log_p.sum(), [mean, log_scale])
    assert to_mean.isfinite().all() and to_scale.isfinite().all()
    assert to_mean[0] < 0 < to_mean[1]


def test_a_mixture_over_two_coupled_channels_sums_to_one() -> None:
    """65,536 pairs of levels at one pixel."""
    pairs = torch.tensor(list(itertools.product(range(256), repeat=2)))
    x = pairs.double().view(-1, 2, 1, 1) / 255

    def same(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, *shape).expand(len(x), *shape)

    decoded = DiscretizedLogistic(
        same([0.4, -1.0, 0.1], 3, 1, 1),
        same([-0.9, 0.3, 0.2, 0.8, 1.5, -2.0], 3, 2, 1, 1),
        same([-5.0, -2.0, -1.0, -6.0, -3.0, 2.0], 3, 2, 1, 1),
        same([0.7, -1.3, 3.0], 3, 1, 1, 1),
    )
    assert float(decoded.log_prob_values(x).logsumexp(0).exp()) == pytest.approx(1, abs=1e-9)


def test_the_mean_of_a_channel_depends_on_earlier_channels_as_written() -> None:
    decoded = mixture(2, 3, 3)
    x = torch.randint(0, 256, (2, 3, 2, 2), generator=generator("rgb"), dtype=torch.uint8)
    v = 2 * x.double() / 255 - 1
    t = torch.tanh(decoded.couplings)
    weights = decoded.weights.log_softmax(1)
    parts = []
    for i in range(3):
        m = decoded.means[:, i]
        shifted = torch.stack(
            [
                m[:, 0],
                m[:, 1] + t[:, i, 0] * v[:, 0],
                m[:, 2] + t[:, i, 1] * v[:, 0] + t[:, i, 2] * v[:, 1],
            ],
            1,
        )
        flat = DiscretizedLogistic(
            torch.zeros(6, 1, 2, 2).double(),
            shifted.reshape(6, 1, 1, 2, 2),
            decoded.log_scales[:, i].reshape(6, 1, 1, 2, 2),
            torch.zeros(6, 1, 0, 2, 2).double(),
        )
        each = flat.log_prob_values(x.double().view(6, 1, 2, 2) / 255).view(2, 3, 2, 2)
        parts.append(weights[:, i] + each.sum(1))
    expected = torch.logsumexp(torch.stack(parts), 0).sum((1, 2))
    torch.testing.assert_close(decoded.log_prob(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_follow_the_probabilities(channels: int) -> None:
    n = 20_000
    drawn_from = mixture(1, 3, channels, side=1, scale=-2.5)
    many = DiscretizedLogistic(
        drawn_from.weights.expand(n, -1, -1, -1),
        drawn_from.means.expand(n, -1, -1, -1, -1),
        drawn_from.log_scales.expand(n, -1, -1, -1, -1),
        drawn_from.couplings.expand(n, -1, -1, -1, -1),
    )
    draws = many.sample(uniform(n, channels, 1, 1))
    grey = (255 * draws).round()
    torch.testing.assert_close(grey, 255 * draws, rtol=0, atol=1e-6)
    if channels == 1:
        p = drawn_from.log_prob_values(levels(1).double() / 255).exp().flatten()
        seen = torch.bincount(grey.flatten().long(), minlength=256) / n
        # Every cumulative share within five standard errors.
        below = p.cumsum(0).clamp(0, 1)
        assert ((seen.cumsum(0) - below).abs() < 5 * (below * (1 - below) / n).sqrt() + 5e-4).all()
    # The mean negative log-probability of its own samples is smaller than of samples with the channels shuffled.
    own = many.log_prob(grey.to(torch.uint8)).mean()
    if channels == 3:
        mixed = torch.stack([grey[:, c].roll(c * 7, 0) for c in range(3)], 1).to(torch.uint8)
        assert float(own) > float(many.log_prob(mixed).mean()) + 0.3
    torch.testing.assert_close(draws.mean(0), many.mean[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_samples_from_the_ends_of_uniform_noise_are_levels(edge: float) -> None:
    for dtype in (torch.float32, torch.float64):
        decoded = mixture(2, 3, 3)
        decoded = DiscretizedLogistic(
            *(t.to(dtype) for t in (decoded.weights, decoded.means, decoded.log_scales, decoded.couplings))
        )
        draws = decoded.sample(torch.full((2, 3, 2, 2), edge))
        assert draws.isfinite().all() and float(draws.min()) >= 0 and float(draws.max()) <= 1


@pytest.mark.parametrize("log_scale", [-9.0, -5.0, -2.0, 0.5])
def test_the_mean_is_that_of_the_levels_within_half_a_level(log_scale: float) -> None:
    mean = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)
    decoded = one(mean, torch.full_like(mean, log_scale))
    x = levels(41).double() / 255
    exact = (x * decoded.log_prob_values(x).exp()).sum(0).flatten()
    got = decoded.mean[0].flatten()
    torch.testing.assert_close(got, exact, rtol=0, atol=0.5 / 255 + 1e-9)
    assert float(got.min()) >= 0 and float(got.max()) <= 1
    if log_scale > -4:
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("components", "scale", "channels", "outputs"),
    [
        (1, "predicted", 1, 2),
        (1, "learned", 1, 1),
        (1, "learned", 3, 6),
        (5, "predicted", 1, 15),
        (10, "predicted", 3, 100),
        (4, "learned", 3, 28),
    ],
)
def test_channels_of_the_decoder(components: int, scale: str, channels: int, outputs: int) -> None:
    config = LogisticLikelihood.model_validate({"components": components, "scale": scale})
    observation = ObservationModel(config, Spec(channels, (4, 4))).double()
    assert observation.outputs == config.outputs(channels) == outputs
    assert len(list(observation.parameters())) == (scale == "learned")
    output = normal(2, outputs, 4, 4).requires_grad_()
    decoded = observation(output)
    image = torch.randint(0, 256, (2, channels, 4, 4), generator=generator("image"), dtype=torch.uint8)
    assert decoded.log_prob(image).shape == (2,) and decoded.evidence == "discrete"
    assert decoded.mean.shape == image.shape
    decoded.log_prob(image).sum().backward()
    assert output.grad is not None and (output.grad != 0).all(), "every output has a say"
    assert all(p.grad is not None and (p.grad != 0).all() for p in observation.parameters())


@pytest.mark.parametrize("components", [1, 3])
def test_gradients(components: int) -> None:
    observation = ObservationModel(LogisticLikelihood(components=components), Spec(2, (2, 2))).double()
    image = torch.tensor([0, 255, 3, 128, 254, 1, 77, 200], dtype=torch.uint8).view(1, 2, 2, 2)
    output = normal(1, observation.outputs, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: observation(a).log_prob(image), (output,))
    assert torch.autograd.gradcheck(lambda a: observation(a).mean, (output,), atol=1e-6)


def test_it_leaves_autocast_and_half_precision() -> None:
    observation = ObservationModel(LogisticLikelihood(components=3), Spec(1, (8, 8)))
    output = normal(2, 9, 8, 8).float()
    image = torch.randint(0, 256, (2, 1, 8, 8), generator=generator("image"), dtype=torch.uint8)
    exact = observation(output).log_prob(image)
    with torch.autocast("cpu", torch.bfloat16):
        inside = observation(output)
        torch.testing.assert_close(inside.log_prob(image), exact, rtol=0, atol=0)
        assert inside.mean.dtype == torch.float32
    assert observation(output.bfloat16()).log_prob(image).dtype == torch.float32
    assert observation(output.double()).log_prob(image).dtype == torch.float64


@pytest.mark.parametrize("components", [1, 4])
def test_four_components_fit_two_peaks_and_one_does_not(components: int) -> None:
    """Four come within a tenth of a nat of the entropy of the counted levels."""
    draw = generator("peaks")
    pick = torch.rand(2000, 1, 1, 1, generator=draw) < 0.4
    spread = torch.randn(2000, 1, 1, 1, generator=draw)
    image = torch.where(pick, 60 + 6 * spread, 190 + 10 * spread).round().clamp(0, 255).to(torch.uint8)
    counts = torch.bincount(image.flatten().long(), minlength=256).double()
    entropy = float(torch.special.entr(counts / counts.sum()).sum())
    observation = ObservationModel(LogisticLikelihood(components=components), Spec(1, (1, 1)))
    output = torch.zeros(1, observation.outputs, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([output], 0.1)
    for _ in range(250):
        loss = -observation(output.expand(2000, -1, -1, -1)).log_prob(image).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    excess = float(loss.detach()) - entropy
    assert (-0.02 < excess < 0.1) if components == 4 else excess > 0.3
