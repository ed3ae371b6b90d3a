"""The VAE's mathematics: its loss is the negative evidence lower bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, distributions

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (12, 12))
MLP = {"kind": "mlp", "width": 16, "depth": 1}


def make(**section: object) -> Variant:
    return build(model_config({"kind": "vae", "encoder": MLP, "latent": 3, **section}), SPEC, 0).double()


def images(rows: int = 4, seed: int = 0) -> Tensor:
    shape = (rows, *SPEC.image_shape)
    return torch.randint(0, 256, shape, generator=generator("vae", seed), dtype=torch.uint8)


@pytest.mark.parametrize("likelihood", [{"kind": "bernoulli"}, {"kind": "gaussian", "sigma": 0.3}])
def test_loss_is_distortion_plus_rate(likelihood: dict[str, object]) -> None:
    model, image = make(likelihood=likelihood, beta=3.0), images()
    ctx = SampleContext(seed=0, samples=range(4))
    with torch.no_grad():
        terms = model(batch := {"image": image}, ctx)
        q = model.encode(batch["image"])
        z = q.sample(ctx.noise("z", (4, 3)))
        out = model.decoder(z)
        x = image.double() / 255
        if likelihood["kind"] == "bernoulli":
            log_p = x * torch.sigmoid(out).log() + (1 - x) * torch.sigmoid(-out).log()
        else:
            log_p = distributions.Normal((out + 1) / 2, 0.3).log_prob(x)
        prior = distributions.Normal(torch.zeros(4, 3).double(), 1.0)
        rate = distributions.kl_divergence(distributions.Normal(q.mean, q.std), prior).sum(1)
    torch.testing.assert_close(terms["distortion"], -log_p.sum((1, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["rate"], rate)
    torch.testing.assert_close(terms["loss"], terms["distortion"] + 3 * terms["rate"])


def test_the_bound_is_below_the_likelihood_of_a_model_that_can_be_integrated() -> None:
    """A linear decoder with Gaussian noise has a Gaussian marginal: -loss <= log p(x), equal at the true posterior."""
    sigma, spec = 0.4, Spec(1, (2, 2))
    section = {"kind": "vae", "encoder": MLP, "latent": 2, "likelihood": {"kind": "gaussian", "sigma": sigma}}
    model = build(model_config(section), spec, 0).double()
    weight = torch.randn((4, 2), generator=generator("weight"), dtype=torch.float64)
    image = torch.tensor([[10, 200, 90, 255]], dtype=torch.uint8).view(1, 1, 2, 2)
    x = image.double().flatten() / 255
    half = weight / 2  # the network's scale is twice the image's

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(weight)  # a model takes its type from a parameter

        def forward(self, z: Tensor) -> Tensor:
            return (z @ weight.T).view(-1, 1, 2, 2)

    covariance = half @ half.T + sigma**2 * torch.eye(4, dtype=torch.float64)
    marginal = distributions.MultivariateNormal(torch.full((4,), 0.5, dtype=torch.float64), covariance)
    precision = torch.eye(2, dtype=torch.float64) + half.T @ half / sigma**2
    mean = torch.linalg.solve(precision, half.T @ (x - 0.5)) / sigma**2

    def bound(mean: Tensor, log_variance: Tensor) -> float:
        class Fixed(torch.nn.Module):
            def forward(self, features: Tensor) -> Tensor:
                return torch.cat([mean, log_variance])[None].expand(features.shape[0], -1)

        model.encoder, model.decoder = Fixed(), Linear()
        n = 20_000
        with torch.no_grad():
            terms = model({"image": image.expand(n, -1, -1, -1)}, SampleContext(seed=0, samples=range(n)))
        return -float(terms["loss"].mean())

    truth = float(marginal.log_prob(x))
    best = bound(mean, -precision.diagonal().log())
    correlated = -0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    assert best == pytest.approx(truth + correlated, abs=0.03)
    assert bound(mean + 0.5, -precision.diagonal().log()) < best < truth + 1e-9


def test_beta_ramp_is_for_training_only() -> None:
    model, image = make(beta={"start": 0.5, "end": 4.0, "steps": 10}), images()
    assert model.schedule_end == 10
    for step, beta in [(0, 0.5), (5, 2.25), (10, 4.0), (99, 4.0)]:
        terms = model({"image": image}, LaneContext(seed=0, step=step, batch_size=4, lanes=2))
        torch.testing.assert_close(terms["loss"], terms["distortion"] + beta * terms["rate"])
    shown = model({"image": image}, SampleContext(seed=0, samples=range(4)))
    torch.testing.assert_close(shown["loss"], shown["distortion"] + 4.0 * shown["rate"])
    assert make().schedule_end == 0


def test_dssim_is_its_own_term() -> None:
    model, image = make(dssim=2.0), images()
    terms = model({"image": image}, SampleContext(seed=0, samples=range(4)))
    torch.testing.assert_close(terms["loss"], terms["distortion"] + terms["rate"] + 2 * terms["dssim"])
    assert "dssim" not in make()({"image": image}, SampleContext(seed=0, samples=range(4)))


def test_samples_spread_with_temperature() -> None:
    model = make()
    with torch.no_grad():
        cold = model.sample(8, temperature=0.0)
        torch.testing.assert_close(cold, cold[:1].expand_as(cold))
        narrow, wide = model.sample(8, temperature=0.5), model.sample(8, temperature=2.0)
    assert float(narrow.std(0).mean()) < float(wide.std(0).mean())


def test_reconstruction_is_the_decoded_mean() -> None:
    model, image = make(), images()
    with torch.no_grad():
        out = model.reconstruct(image)
        torch.testing.assert_close(out, torch.sigmoid(model.decoder(model.encode(image).mean)))


def test_training_improves_the_bound_and_uses_the_latent() -> None:
    """Two kinds of picture, a bar here or there: the bound must beat what no latent could reach."""
    model = make(likelihood={"kind": "bernoulli"}, latent=2).float()
    pictures = torch.zeros(2, 1, 12, 12, dtype=torch.uint8)
    pictures[0, :, 2:5], pictures[1, :, 7:10] = 255, 255
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        image = pictures[torch.arange(16) % 2]
        terms = model({"image": image}, LaneContext(seed=0, step=step, batch_size=16, lanes=4))
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    # Without a latent, 72 pixels of the two bars are coin flips.
    assert float(terms["loss"].detach().mean()) < 0.2 * 72 * math.log(2)
    # One bit tells the pictures apart.
    assert float(terms["rate"].detach().mean()) > 0.5
    with torch.no_grad():
        error = (model.reconstruct(pictures) - pictures / 255).abs().mean()
    assert float(error) < 0.05
