"""Likelihoods against torch.distributions, their sums, scales, precision and samples."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import distributions

from tests.ranks import run_ranks
from vaedist.config.job import Spec
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.nets.likelihoods import ROUNDING, Bernoulli, Gaussian, Laplace, ObservationModel, check_dssim
from vaedist.nets.likelihoods_config import BernoulliLikelihood, GaussianLikelihood, LaplaceLikelihood
from vaedist.nets.ssim import ssim

SHAPE = (3, 2, 5, 4)
GRAY = Spec(1, (8, 8))


def images(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator("image", seed), dtype=torch.uint8)


def outputs(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=generator("output"), dtype=torch.float64)


def uniform(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=generator("uniform"), dtype=torch.float64)


def test_bernoulli_log_prob() -> None:
    a, image = outputs(), images()
    x = image.double() / 255
    expected = x * torch.sigmoid(a).log() + (1 - x) * torch.sigmoid(-a).log()
    got = Bernoulli(a).log_prob(image)
    torch.testing.assert_close(got, expected.sum((1, 2, 3)), rtol=1e-12, atol=0)
    black_and_white = (image > 127).to(torch.uint8) * 255
    true = distributions.Bernoulli(logits=a).log_prob(black_and_white.double() / 255).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli(a).log_prob(black_and_white), true, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.03, 1.0])
def test_gaussian_and_laplace_log_prob(scale: float) -> None:
    a, image = outputs(), images()
    x, b = image.double() / 255, torch.tensor(scale)
    for ours, theirs in [(Gaussian, distributions.Normal), (Laplace, distributions.Laplace)]:
        expected = theirs((a + 1) / 2, b.double()).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(ours(a, b).log_prob(image), expected, rtol=1e-12, atol=1e-9)


def test_the_network_scale_runs_from_black_to_white() -> None:
    white, black = (
        torch.full((1, 1, 2, 2), 255, dtype=torch.uint8),
        torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
    )
    for ours in (Gaussian, Laplace):
        up, down = (
            ours(torch.ones(1, 1, 2, 2), torch.tensor(0.1)),
            ours(-torch.ones(1, 1, 2, 2), torch.tensor(0.1)),
        )
        assert up.mse(white).item() == 0 and down.mse(black).item() == 0
        assert up.log_prob(white) > up.log_prob(black)
        beyond = ours(torch.full((1, 1, 2, 2), 3.0), torch.tensor(0.1))
        assert float(beyond.mean.max()) == 1 and float(beyond.location.max()) == 2


def test_log_prob_leaves_autocast_and_half_precision() -> None:
    a, image = outputs((2, 1, 64, 64)).float(), images((2, 1, 64, 64))
    exact = Gaussian(a, torch.tensor(0.1)).log_prob(image)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Gaussian(a, torch.tensor(0.1)).log_prob(image)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, exact, rtol=0, atol=0)
    assert Bernoulli(a.bfloat16()).log_prob(image).dtype == torch.float32
    assert Bernoulli(a.double()).log_prob(image).dtype == torch.float64


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian, Laplace])
def test_samples_follow_the_distribution(kind: type) -> None:
    a = torch.tensor([-0.6, 0.0, 0.4], dtype=torch.float64).view(1, 3, 1, 1)
    scale = [] if kind is Bernoulli else [torch.tensor(0.01)]
    n = 40_000
    decoded = kind(a.expand(n, -1, -1, -1), *scale)
    draws = decoded.sample(uniform((n, 3, 1, 1)))
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1
    torch.testing.assert_close(draws.mean(0), kind(a, *scale).mean[0], rtol=0, atol=0.01)
    spread = {Bernoulli: None, Gaussian: 0.01, Laplace: 0.01 * math.sqrt(2)}[kind]
    if spread is not None:
        torch.testing.assert_close(draws.std(0), torch.full_like(draws[0], spread), rtol=0.03, atol=0)
    else:
        assert set(draws.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_samples_from_the_ends_of_uniform_noise_are_finite(kind: type, edge: float) -> None:
    decoded = kind(torch.zeros(1, 1, 1, 1), torch.tensor(0.1))
    assert decoded.sample(torch.full((1, 1, 1, 1), edge)).isfinite().all()


@pytest.mark.parametrize("kind", [Bernoulli, Gaussian, Laplace])
def test_gradients(kind: type) -> None:
    a, image = outputs((2, 1, 12, 12)).requires_grad_(), images((2, 1, 12, 12))
    scale = [] if kind is Bernoulli else [torch.tensor(0.2)]
    assert torch.autograd.gradcheck(lambda x: kind(x, *scale).log_prob(image), (a,))
    inside = a.detach().clamp(-0.99, 0.99).requires_grad_()  # away from the cut
    assert torch.autograd.gradcheck(lambda x: kind(x, *scale).dssim(image), (inside,), atol=1e-6)


def test_mse_and_dssim_of_one_image() -> None:
    a, image = outputs((2, 1, 16, 16)).clamp(-1, 1), images((2, 1, 16, 16))
    decoded = Gaussian(a, torch.tensor(0.1))
    x = image.double() / 255
    torch.testing.assert_close(decoded.mse(image), ((a + 1) / 2 - x).square().mean((1, 2, 3)))
    torch.testing.assert_close(decoded.dssim(image), 256 * (1 - ssim((a + 1) / 2, x)) / 2)


def test_sigma_from_data_is_the_standard_deviation_of_all_values() -> None:
    observation = ObservationModel(GaussianLikelihood(sigma="data"), GRAY)
    batches = [{"image": images((4, 1, 8, 8), seed)} for seed in range(3)]
    observation.prepare(batches, LaneContext(seed=0, step=0, batch_size=4, lanes=2))
    values = torch.cat([b["image"] for b in batches]).double() / 255
    assert float(observation.scale) == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    # The loss is then the normalised squared error of the VQ-VAE paper, halved, and a constant.
    a, image = outputs((4, 1, 8, 8)), batches[0]["image"]
    decoded = observation(a)
    error = ((a + 1) / 2 - image.double() / 255).square().sum((1, 2, 3))
    variance = float(observation.scale) ** 2
    expected = error / variance / 2 + 32 * math.log(2 * math.pi * variance)
    torch.testing.assert_close(-decoded.log_prob(image), expected, rtol=1e-6, atol=0)


def test_sigma_of_constant_images_is_one_grey_level() -> None:
    observation = ObservationModel(GaussianLikelihood(), GRAY)
    observation.prepare(
        [{"image": torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)}],
        LaneContext(seed=0, step=0, batch_size=2, lanes=1),
    )
    assert float(observation.scale) == pytest.approx(1 / 255)


def test_only_measured_scales_are_saved_with_the_weights() -> None:
    assert set(ObservationModel(GaussianLikelihood(sigma="data"), GRAY).state_dict()) == {"scale"}
    assert set(ObservationModel(GaussianLikelihood(sigma="optimal"), GRAY).state_dict()) == {"scale", "steps"}
    assert set(ObservationModel(GaussianLikelihood(sigma="learned"), GRAY).state_dict()) == {"raw_sigma"}
    for config in (
        GaussianLikelihood(sigma=0.5),
        GaussianLikelihood(sigma="predicted"),
        LaplaceLikelihood(scale=0.5),
        BernoulliLikelihood(),
    ):
        assert not ObservationModel(config, GRAY).state_dict()


def test_evidence_of_each_likelihood() -> None:
    output = torch.zeros(1, 1, 8, 8)
    for config, evidence in [
        (BernoulliLikelihood(), "binary"),
        (GaussianLikelihood(sigma=0.1), "density"),
        (LaplaceLikelihood(), "density"),
    ]:
        assert ObservationModel(config, GRAY)(output).evidence == evidence


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_dequantized_densities_bound_the_mass_of_each_level(kind: type) -> None:
    """Mean over the noise <= log of the mass around the level, and near it where the density is smooth."""
    for scale in (0.003, 0.05):
        image = torch.tensor([0, 120, 127, 128, 255], dtype=torch.uint8).view(5, 1, 1, 1)
        a, b = torch.zeros(5, 1, 1, 1, dtype=torch.float64), torch.tensor(scale).double()
        noise = (torch.arange(2000).double() + 0.5) / 2000
        each = torch.stack([kind(a, b).dequantized_log_prob(image, u.expand(5, 1, 1, 1)) for u in noise])
        law = {Gaussian: distributions.Normal, Laplace: distributions.Laplace}[kind](0.5, b)
        x = image.flatten().double()
        mass = (law.cdf((x + 0.5) / 255) - law.cdf((x - 0.5) / 255)).clamp_min(1e-300).log()
        near = mass > -30
        assert (each.mean(0)[near] <= mass[near] + 1e-6).all()
        if scale == 0.05:
            torch.testing.assert_close(each.mean(0)[near], mass[near], rtol=0, atol=0.01)


# Sigmas that are trained, predicted, or the best of the batch ---------------------------------------------------


def test_a_learned_sigma_finds_the_size_of_the_error() -> None:
    observation = ObservationModel(GaussianLikelihood(sigma="learned"), Spec(1, (16, 16)))
    assert observation.outputs == 1 and not observation.batch_statistics
    assert float(observation(torch.zeros(1, 1, 16, 16)).sigma.detach()) == pytest.approx(0.1, rel=0.02)
    image = torch.full((4, 1, 16, 16), 128, dtype=torch.uint8)
    output = 2 * 0.03 * outputs((4, 1, 16, 16)).float() + 1 / 255
    optimizer = torch.optim.Adam(observation.parameters(), 0.05)
    for _ in range(150):
        loss = -observation(output).log_prob(image).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = float(((output + 1) / 2 - 128 / 255).square().mean().sqrt())
    shown = observation.after_step(LaneContext(seed=0, step=0, batch_size=4, lanes=1))
    assert float(shown["sigma"].detach()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("sigma", ["learned", "predicted"])
def test_sigmas_stay_above_the_rounding_to_bytes(sigma: str) -> None:
    observation = ObservationModel(GaussianLikelihood.model_validate({"sigma": sigma}), GRAY)
    output = torch.full((1, observation.outputs, 8, 8), -200.0)
    if sigma == "learned":
        with torch.no_grad():
            observation.raw_sigma.fill_(-200.0)
    assert float(observation(output).sigma.min().detach()) == pytest.approx(ROUNDING, rel=1e-4)
    assert pytest.approx(float((uniform((200_000,)) / 255).std()), rel=0.01) == ROUNDING


def test_predicted_sigmas_come_from_the_second_half_of_the_channels() -> None:
    observation = ObservationModel(GaussianLikelihood(sigma="predicted"), Spec(2, (5, 4))).double()
    assert observation.outputs == 4
    output, image = outputs((3, 4, 5, 4)).requires_grad_(), images()
    decoded = observation(output)
    normal = distributions.Normal((output[:, :2] + 1) / 2, decoded.sigma)
    torch.testing.assert_close(decoded.log_prob(image), normal.log_prob(image / 255).sum((1, 2, 3)))
    assert decoded.mean.shape == decoded.sample(uniform((3, 2, 5, 4))).shape == (3, 2, 5, 4)
    assert torch.autograd.gradcheck(lambda a: observation(a).log_prob(image), (output,))


def optimal(output: torch.Tensor, image: torch.Tensor, ctx: LaneContext) -> torch.Tensor:
    observation = ObservationModel(GaussianLikelihood(sigma="optimal"), GRAY).double()
    likelihood: torch.Tensor = -observation(output, image, ctx).log_prob(image)
    return likelihood


def test_the_optimal_sigma_is_the_best_one_of_the_batch() -> None:
    a, image = outputs((6, 1, 8, 8)), images((6, 1, 8, 8))
    ctx = LaneContext(seed=0, step=0, batch_size=6, lanes=2)
    loss = optimal(a, image, ctx).mean()
    mse = float(((a + 1) / 2 - image / 255).square().mean())
    for factor in (0.98, 1.02):
        other = -Gaussian(a, torch.tensor(factor * math.sqrt(mse), dtype=torch.float64)).log_prob(image)
        assert float(loss) < float(other.mean())
    sigma = math.sqrt(mse + ROUNDING**2)
    assert float(loss) == pytest.approx(
        64 * (0.5 * mse / sigma**2 + math.log(sigma) + 0.5 * math.log(2 * math.pi)), rel=1e-6
    )
    assert torch.autograd.gradcheck(
        lambda x: optimal(x, image[:2], LaneContext(seed=0, step=0, batch_size=2, lanes=1)),
        (a[:2].requires_grad_(),),
    )


def test_the_optimal_sigma_reaches_its_floor_on_exact_pictures_with_a_gradient_of_zero() -> None:
    image = images((2, 1, 8, 8))
    a = (2 * image.double() / 255 - 1).requires_grad_()
    loss = optimal(a, image, LaneContext(seed=0, step=0, batch_size=2, lanes=1))
    loss.sum().backward()
    assert float(loss.mean().detach()) == pytest.approx(
        64 * math.log(ROUNDING * math.sqrt(2 * math.pi)), rel=1e-6
    )
    assert a.grad is not None and float(a.grad.abs().max()) < 1e-6


def test_evaluation_uses_the_stored_sigma_and_only_after_step_writes_it() -> None:
    observation = ObservationModel(GaussianLikelihood(sigma="optimal"), GRAY).double()
    assert observation.measured and observation.batch_statistics
    image = images((4, 1, 8, 8))
    observation.prepare([{"image": image}], LaneContext(seed=0, step=0, batch_size=4, lanes=2))
    start = float(observation.scale)
    assert start == pytest.approx(float((image.double() / 255).std(correction=0)), rel=1e-6)
    evaluation = SampleContext(seed=0, samples=range(4))
    for error in (0.3, 0.02):
        output = 2 * (image.double() / 255 + error) - 1
        before = float(observation.scale)
        ctx = LaneContext(seed=0, step=0, batch_size=4, lanes=2)
        assert float(observation(output, image, ctx).sigma) == pytest.approx(math.hypot(error, ROUNDING))
        assert float(observation(output, image, evaluation).sigma) == before
        assert float(observation(output).sigma) == before == float(observation.scale)
        shown = observation.after_step(ctx)
        assert float(shown["sigma"]) == float(observation.scale) != before
    for step in range(400):
        ctx = LaneContext(seed=0, step=step, batch_size=4, lanes=2)
        observation(output, image, ctx)
        observation.after_step(ctx)
    assert float(observation.scale) == pytest.approx(math.hypot(0.02, ROUNDING), rel=0.02)
    assert int(observation.steps) == 402


def test_a_denoiser_measures_its_target() -> None:
    observation = ObservationModel(GaussianLikelihood(sigma="data"), GRAY)
    ctx = LaneContext(seed=0, step=0, batch_size=4, lanes=2)
    noisy, clean = images((4, 1, 8, 8)), images((4, 1, 8, 8), 1) // 4
    observation.prepare([{"image": noisy, "target": clean}], ctx)
    assert float(observation.scale) == pytest.approx(
        float((clean.double() / 255).std(correction=0)), rel=1e-6
    )


RANK = """
import json
from tests.nets.test_likelihoods import optimal_step
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group

group = Group.join(device="cpu")
start, stop = [(0, 4), (4, 10)][group.rank]
ctx = DistributedLaneContext(group, seed=1, step=2, batch_size=10, lanes=5, rows=(start, stop))
loss, gradient, scale = optimal_step(ctx, start, stop, group.world)
print(json.dumps([group.total(loss).item(), (group.total(gradient) / group.world).tolist(), scale]))
group.close()
"""


def optimal_step(
    ctx: LaneContext, start: int, stop: int, world: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sum of these rows' losses, their gradient of the mean loss over ten rows, and sigma stored after the step."""
    observation = ObservationModel(GaussianLikelihood(sigma="optimal"), GRAY).double()
    weight = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    output = weight[0] * outputs((10, 1, 8, 8))[start:stop] + weight[1]
    image = images((10, 1, 8, 8))[start:stop]
    # A square makes the gradient through sigma count: for a sum of log-probabilities it vanishes at the optimum.
    loss = observation(output, image, ctx).log_prob(image).square()
    (gradient,) = torch.autograd.grad(loss.sum() * world / 10, weight)
    observation.after_step(ctx)
    return loss.detach().sum(), gradient, float(observation.scale)


def test_the_optimal_sigma_over_ranks_is_that_of_the_global_batch() -> None:
    """Loss, gradient (through sigma too) and stored value, with shares of 4 and 6 of ten rows."""
    alone = optimal_step(LaneContext(seed=1, step=2, batch_size=10, lanes=5), 0, 10, 1)
    for loss, gradient, scale in map(json.loads, run_ranks(RANK, 2)):
        assert loss == pytest.approx(float(alone[0]), rel=1e-12)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), alone[1], rtol=1e-10, atol=0)
        assert scale == pytest.approx(alone[2], rel=1e-12)


def test_dssim_needs_images_as_large_as_its_window() -> None:
    check_dssim(1.0, Spec(1, (11, 11)))
    check_dssim(0.0, Spec(1, (8, 8)))
    with pytest.raises(UserError, match="at least 11x11 and these are 8x12"):
        check_dssim(1.0, Spec(1, (8, 12)))
