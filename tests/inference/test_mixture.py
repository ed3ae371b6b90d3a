"""The ex-post density: it finds a known mixture, draws from it by number, and comes back from disk as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vaedist.core.errors import NotDefined, UserError
from vaedist.evaluation.metrics.latents import Latents
from vaedist.inference.mixture import Mixture, MixtureParameters, fit_mixture

WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[4.0, 0.0], [-4.0, 1.0], [0.0, -5.0]])
FACTORS = np.array([[[1.0, 0.0], [0.5, 0.3]], [[0.2, 0.0], [0.0, 0.8]], [[0.5, 0.0], [-0.4, 0.5]]])
KNOWN = Mixture((MixtureParameters(WEIGHTS, MEANS, FACTORS),), (2,), 1000)
STAMP = {"weights": "ab", "components": 3}


def latents_of(rows: torch.Tensor, labels: torch.Tensor | None = None) -> Latents:
    count, dimensions = rows.shape
    return Latents(
        mean=rows,
        log_variance=None,
        samples=rows,
        prior_mean=torch.zeros_like(rows),
        prior_log_variance=torch.zeros_like(rows),
        labels=torch.zeros(count, dtype=torch.int64) if labels is None else labels,
        keys=[str(i) for i in range(count)],
        shape=(dimensions,),
    )


def test_draws_have_the_moments_of_the_mixture() -> None:
    z = KNOWN.sample(20_000, seed=3).double().numpy()
    mean = WEIGHTS @ MEANS
    within = np.einsum("k,kij,klj->il", WEIGHTS, FACTORS, FACTORS)
    between = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS - mean, MEANS - mean)
    assert np.abs(z.mean(0) - mean).max() < 0.1
    assert np.abs(np.cov(z.T) - within - between).max() < 0.3


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    z = KNOWN.sample(12, seed=3)
    assert torch.equal(KNOWN.sample(5, seed=3, first=4), z[4:9])
    assert not torch.isclose(KNOWN.sample(12, seed=4), z).any()


def test_temperature_is_the_spread_around_each_mean() -> None:
    places = KNOWN.sample(300, seed=1, temperature=0).double().numpy()
    nearest = np.abs(places[:, None] - MEANS).sum(2)
    assert nearest.min(1).max() < 1e-6
    assert np.bincount(nearest.argmin(1), minlength=3) == pytest.approx(300 * WEIGHTS, abs=30)
    half = KNOWN.sample(300, seed=1, temperature=0.5).double().numpy()
    one = KNOWN.sample(300, seed=1).double().numpy()
    assert half - places == pytest.approx((one - places) / 2, abs=1e-5)


def test_the_fit_finds_the_mixture_it_was_drawn_from() -> None:
    found = fit_mixture(latents_of(KNOWN.sample(4000, seed=5)), components=3)
    [part] = found.parts
    order = [int(np.abs(part.means - mean).sum(1).argmin()) for mean in MEANS]
    assert sorted(order) == [0, 1, 2]
    assert part.weights[order] == pytest.approx(WEIGHTS, abs=0.03)
    assert part.means[order] == pytest.approx(MEANS, abs=0.1)
    covariance = part.factors @ part.factors.transpose(0, 2, 1)
    assert covariance[order] == pytest.approx(FACTORS @ FACTORS.transpose(0, 2, 1), abs=0.1)
    assert (
        str(found) == "Gaussian mixture of 3 components (full covariances), fitted to 4,000 training latents"
    )


def test_the_fit_is_the_same_every_time() -> None:
    latents = latents_of(KNOWN.sample(300, seed=5))
    one, other = (fit_mixture(latents, components=4, seed=2).to_bytes(STAMP) for _ in range(2))
    assert one == other


def test_each_class_has_its_own() -> None:
    rows = torch.cat([KNOWN.sample(200, seed=1), 100 + KNOWN.sample(200, seed=2)])
    labels = torch.arange(2).repeat_interleave(200)
    found = fit_mixture(latents_of(rows, labels), classes=2)
    z = found.sample(4, seed=0, label=[0, 1, 1, 0])
    assert (z[[0, 3]].abs() < 20).all() and ((z[[1, 2]] - 100).abs() < 20).all()
    assert torch.equal(found.sample(1, seed=0, first=2, label=[1]), z[2:3])
    assert "for each of 2 classes" in str(found)
    for label in (None, [-1]):
        with pytest.raises(NotDefined, match="name a class"):
            found.sample(1, seed=0, label=label)
    with pytest.raises(UserError, match="class 2 of the training data has too few images"):
        fit_mixture(latents_of(rows, labels), classes=3)


@pytest.mark.parametrize(
    ("count", "dimensions", "components", "full"),
    [(100, 4, 10, True), (100, 20, 2, True), (30, 20, 3, False)],
)
def test_few_images_fit_few_parameters(count: int, dimensions: int, components: int, full: bool) -> None:
    rows = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0))
    [part] = fit_mixture(latents_of(rows)).parts
    assert len(part.weights) == components
    assert part.factors.ndim == (3 if full else 2)
    assert np.isfinite(part.factors).all()


def test_a_map_comes_back_as_a_map() -> None:
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    latents = latents_of(rows)
    assert fit_mixture(Latents(**{**latents.__dict__, "shape": (3, 2, 2)})).sample(5, seed=0).shape == (
        5,
        3,
        2,
        2,
    )


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="latents are not finite"):
        fit_mixture(latents_of(torch.full((9, 2), float("nan"))))


def test_it_comes_back_from_disk() -> None:
    found = Mixture.from_bytes(KNOWN.to_bytes(STAMP), STAMP, "FILE")
    assert (found.shape, found.images) == (KNOWN.shape, KNOWN.images)
    assert torch.equal(found.sample(20, seed=1), KNOWN.sample(20, seed=1))


def _cut(content: bytes) -> bytes:
    return content[:-9]


def _header(content: bytes) -> bytes:
    return content.replace(b'"images', b'"imagos').replace(b"images", b"imagos")


def _negative(content: bytes) -> bytes:
    bad = Mixture((MixtureParameters(WEIGHTS * [-1, 1, 1], MEANS, FACTORS),), (2,), 9)
    return bad.to_bytes(STAMP)


def _shape(content: bytes) -> bytes:
    return Mixture(KNOWN.parts, (3,), 9).to_bytes(STAMP)


def _empty(content: bytes) -> bytes:
    return b""


def _pickle(content: bytes) -> bytes:
    return b"\x80\x04N."


@pytest.mark.parametrize("damage", [_cut, _header, _negative, _shape, _empty, _pickle])
def test_damage_is_one_sentence(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UserError, match=r"^FILE is damaged: remove it"):
        Mixture.from_bytes(damage(KNOWN.to_bytes(STAMP)), STAMP, "FILE")


def test_what_was_fitted_to_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="other weights or data"):
        Mixture.from_bytes(KNOWN.to_bytes(STAMP), {**STAMP, "weights": "cd"}, "FILE")
