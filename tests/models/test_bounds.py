"""Bounds of models whose likelihood is known: a linear VAE is probabilistic PCA; importance samples close the gap.

Tipping and Bishop, "Probabilistic principal component analysis": with x = W z + m + sigma e the data are
N(m, W W^T + sigma^2 I), and the best W of D columns is U (L - sigma^2)^(1/2), with the D largest eigenvalues L of the
data's covariance, their vectors U, and sigma^2 the mean of the others. The true posterior then has a diagonal
covariance sigma^2 L^-1, so a VAE with linear networks can reach it (Lucas et al., "Don't blame the ELBO!").
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.models.contract import Variant, build

SPEC, D = Spec(1, (2, 3)), 2
P = SPEC.pixels
ROWS = 40


def data() -> Tensor:
    """(ROWS, 1, 2, 3) uint8 of correlated values."""
    draw = generator("ppca")
    mixing = torch.randn(P, P, generator=draw, dtype=torch.float64)
    x = 0.5 + 0.07 * torch.randn(ROWS, P, generator=draw, dtype=torch.float64) @ mixing
    return (255 * x).round().clamp(0, 255).to(torch.uint8).view(ROWS, *SPEC.image_shape)


class PPCA:
    """The closed-form optimum on `data()`."""

    def __init__(self) -> None:
        x = data().double().flatten(1) / 255
        self.x, self.mean = x, x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / ROWS)
        values, vectors = values.flip(0), vectors.flip(1)
        self.sigma = float(values[D:].mean().sqrt().float())  # as the model's own number of 32 bits
        self.variance = torch.tensor(self.sigma, dtype=torch.float64) ** 2
        self.top = values[:D]
        self.weight = vectors[:, :D] * (self.top - self.variance).sqrt()
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(P, dtype=torch.float64)
        self.log_likelihood = distributions.MultivariateNormal(self.mean, covariance).log_prob(x)


class Corners(LaneContext):
    """Noise at the corners (+-1, ...): the mean over them of a quadratic in z is its mean over N(0, 1), exactly."""

    def noise(self, name: str, shape: Any, *, chunk: int = 0) -> Tensor:
        corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=torch.float64)
        assert name == "z" and shape[0] == ROWS * len(corners)
        return corners.repeat(ROWS, 1).view(shape)


def linear_vae(sigma: float, **section: Any) -> Variant:
    body = {"kind": "mlp", "width": 1, "depth": 1}
    likelihood = {"kind": "gaussian", "sigma": sigma}
    config = model_config({"kind": "vae", "encoder": body, "latent": D, "likelihood": likelihood, **section})
    model = build(config, SPEC, 0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(P, 2 * D))
        model.decoder = nn.Sequential(nn.Linear(D, P), nn.Unflatten(1, SPEC.image_shape))
    return model.double()


def at_the_optimum(ppca: PPCA) -> Variant:
    model = linear_vae(ppca.sigma)
    posterior_mean = (ppca.weight / ppca.top).T  # (W^T W + sigma^2)^-1 W^T
    encode, decode = model.encoder[1], model.decoder[0]
    with torch.no_grad():
        # Networks see and emit 2 x - 1.
        encode.weight.copy_(torch.cat([posterior_mean / 2, torch.zeros(D, P)]))
        encode.bias[:D] = posterior_mean @ (0.5 - ppca.mean)
        encode.bias[D:] = (ppca.variance / ppca.top).log()
        decode.weight.copy_(2 * ppca.weight)
        decode.bias.copy_(2 * ppca.mean - 1)
    return model


def exact_loss(model: Variant) -> Tensor:
    """(ROWS,) the loss with its mean over z taken exactly."""
    image = data().repeat_interleave(2**D, 0)
    ctx = Corners(seed=0, step=0, batch_size=len(image), lanes=1)
    return model({"image": image}, ctx)["loss"].view(ROWS, -1).mean(1)


def test_a_linear_vae_at_its_optimum_is_ppca() -> None:
    ppca = PPCA()
    model = at_the_optimum(ppca)
    loss = exact_loss(model)
    torch.testing.assert_close(-loss, ppca.log_likelihood, rtol=1e-9, atol=1e-9)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) < 1e-8, name


def test_training_a_linear_vae_reaches_ppca() -> None:
    ppca = PPCA()
    model = linear_vae(ppca.sigma)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=120, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = exact_loss(model).mean()
        loss.backward()
        return float(loss.detach())

    before = closure()
    optimizer.step(closure)
    reached = -float(exact_loss(model).detach().mean())
    best = float(ppca.log_likelihood.mean())
    assert -before < best - 1
    assert best - 1e-4 < reached < best + 1e-9


def test_importance_samples_raise_the_bound_to_the_exact_likelihood() -> None:
    """With the decoder of PPCA and a posterior that is shifted and too wide, log p(x) is known and the bound loose."""
    ppca = PPCA()
    rows = 4000
    image = data()[:1].expand(rows, -1, -1, -1)
    exact = float(ppca.log_likelihood[0])
    optimum = at_the_optimum(ppca)
    bounds = []
    for k in (1, 2, 4, 8, 256):
        model = linear_vae(ppca.sigma, num_importance=k)
        model.load_state_dict(optimum.state_dict())
        with torch.no_grad():
            model.encoder[1].bias += torch.tensor([0.4, -0.3, 0.8, 0.8])
            n = max(400, rows // k)
            terms = model({"image": image[:n]}, SampleContext(seed=1, samples=range(n)))
        bounds.append(-float(terms["loss"].mean()))
        # Both parts of the ordinary bound stay visible.
        assert terms["rate"].shape == terms["distortion"].shape == (n,)
        assert -float((terms["distortion"] + terms["rate"]).mean()) == pytest.approx(bounds[0], abs=0.2)
    assert bounds == sorted(bounds)
    assert bounds[0] < exact - 0.3
    assert bounds[-1] == pytest.approx(exact, abs=0.01)


def test_one_importance_sample_is_the_ordinary_bound_on_average() -> None:
    """-log w of one sample is an estimate of distortion + rate; beta weighs the same part of both."""
    ppca = PPCA()
    n, k = 300, 40
    image = data()[1:2].expand(n, -1, -1, -1)
    model = linear_vae(0.2, num_importance=k, beta=0.5)
    with torch.no_grad():
        ctx = SampleContext(seed=2, samples=range(n))
        terms = model({"image": image}, ctx)
        q = model.encode(image)
        z = q.mean[:, None] + q.std[:, None] * ctx.noise("z", (n, k, D)).double()
        location = (model.decoder(z.flatten(0, 1)) + 1) / 2
        log_p = (
            distributions.Normal(location, 0.2).log_prob(ppca.x[1].view(1, *SPEC.image_shape)).sum((1, 2, 3))
        )
        log_q = distributions.Normal(q.mean[:, None], q.std[:, None]).log_prob(z).sum(2)
        log_prior = distributions.Normal(torch.zeros(D).double(), 1.0).log_prob(z).sum(2)
        log_w = log_p.view(n, k) + 0.5 * (log_prior - log_q)
    torch.testing.assert_close(terms["loss"], -(log_w.exp().mean(1).log()))
    torch.testing.assert_close(terms["distortion"], -log_p.view(n, k).mean(1))
