"""Every metric against a closed form, or against the plainest possible loop in fp64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from vaedist.core.errors import UserError
from vaedist.evaluation.metrics import precision_recall as precision_recall_module
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.frechet_distance import frechet, frechet_extrapolated
from vaedist.evaluation.metrics.kid import kid
from vaedist.evaluation.metrics.precision_recall import precision_recall
from vaedist.evaluation.metrics.sample_metrics import (
    PIXELS,
    SAMPLE_METRICS,
    Reference,
    base_name,
    inception_score,
    is_sample_metric,
    monitored_value,
    sample_metrics,
    undefined_metrics,
)
from vaedist.evaluation.metrics.sliced_wasserstein import sliced_wasserstein


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


# KID ------------------------------------------------------------------------------------------------------------


def slow_kid(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (math.fsum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def own(z: np.ndarray) -> float:
        return math.fsum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1))

    return own(x) + own(y) - 2 * math.fsum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (23, 47), (60, 41)])
def test_kid_is_the_unbiased_estimate_over_all_pairs(n: int, m: int) -> None:
    x, y = normal(1, n, 5) + 0.3, 2 * normal(2, m, 5)
    assert kid(x, y, seed=0)[0] == pytest.approx(slow_kid(x, y), rel=1e-10)
    assert kid(x, y, seed=7)[0] == pytest.approx(slow_kid(x, y), rel=1e-10)


def test_kid_of_equal_laws_is_zero_on_average_and_its_error_is_cautious() -> None:
    found = np.array([kid(normal(3 * i, 60, 6), normal(3 * i + 1, 80, 6), seed=i) for i in range(200)])
    values, errors = found.T
    spread = values.std(ddof=1)
    assert abs(values.mean()) < 3 * spread / math.sqrt(len(values))
    assert 0.3 < (values < 0).mean() < 0.8  # a biased estimate is never below 0
    assert errors.mean() == pytest.approx(math.sqrt(2) * spread, rel=0.15)


def test_kid_error_covers_the_distance_of_other_laws() -> None:
    found = np.array(
        [kid(normal(5 * i, 100, 4), normal(5 * i + 1, 100, 4) + 0.5, seed=i) for i in range(150)]
    )
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(ddof=1), rel=0.25)


# Frechet --------------------------------------------------------------------------------------------------------


def with_moments(seed: int, n: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """A sample whose own mean and unbiased covariance are exactly `mean` and root^T root."""
    x = normal(seed, n, len(mean))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + x @ root


def test_frechet_of_gaussians_in_closed_form() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2, in any rotation of the axes."""
    turn, _ = np.linalg.qr(normal(0, 6, 6))
    a, b = np.array([3, 2, 1, 1, 0.5, 0.1]), np.array([1, 2, 4, 0.2, 0.5, 0.0])
    shift = np.arange(6) / 4
    x = with_moments(1, 50, np.zeros(6), np.diag(a) @ turn)
    y = with_moments(2, 35, shift, np.diag(b) @ turn)
    assert frechet(x, y) == pytest.approx((shift**2).sum() + ((a - b) ** 2).sum(), rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    p, q = normal(3, 4, 4), normal(4, 4, 4)
    x, y = with_moments(5, 30, np.zeros(4), p), with_moments(6, 30, np.ones(4), q)
    s, t = p.T @ p, q.T @ q
    shared = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).sum().real
    assert frechet(x, y) == pytest.approx(4 + np.trace(s + t) - 2 * shared, rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_with_fewer_images_than_features() -> None:
    x, y = normal(1, 5, 20), normal(2, 9, 20)
    assert math.isfinite(frechet(x, y)) and frechet(x, y) > 0
    assert frechet(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_of_few_images_is_too_large_and_the_line_mends_it() -> None:
    """Equal laws: the bias falls as 1/n; extrapolated, less than a tenth of it is left."""
    size, means = 24, {}
    for n in (200, 400, 800):
        pairs = [(normal(2 * i, n, size), normal(2 * i + 1, n, size)) for i in range(12)]
        means[n] = np.mean([frechet(*pair) for pair in pairs])
        mended = np.mean([frechet_extrapolated(*pair, seed=0) for pair in pairs])
        assert abs(mended) < 0.15 * means[n]
    assert means[200] / means[400] == pytest.approx(2, rel=0.1)
    assert means[400] / means[800] == pytest.approx(2, rel=0.1)


def test_the_bias_can_turn_a_ranking_and_the_line_turns_it_back() -> None:
    """A narrow generator has less bias: with few images it looks better than the true law, on average over draws."""
    size, n = 40, 200
    found = []
    for i in range(12):
        real, right = normal(2 * i, n, size), normal(2 * i + 1, n, size)
        pairs = [(real, 0.96 * right), (real, right)]
        found.append([f(*pair) for f in (frechet, mended) for pair in pairs])
    narrow, right, narrow_mended, right_mended = np.mean(found, axis=0)
    assert narrow < right
    assert narrow_mended > right_mended


def mended(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_extrapolated(x, y, seed=0)


# Neighbourhoods ---------------------------------------------------------------------------------------------------


def slow_precision_recall(x: np.ndarray, y: np.ndarray, k: int) -> dict[str, float]:
    def radius(z: np.ndarray, i: int) -> float:
        return sorted(math.dist(z[i], z[j]) for j in range(len(z)) if j != i)[k - 1]

    real, made = [radius(x, i) for i in range(len(x))], [radius(y, j) for j in range(len(y))]
    d = [[math.dist(a, b) for b in y] for a in x]
    rows, columns = range(len(x)), range(len(y))
    return {
        "precision": sum(any(d[i][j] <= real[i] for i in rows) for j in columns) / len(y),
        "recall": sum(any(d[i][j] <= made[j] for j in columns) for i in rows) / len(x),
        "density": sum(d[i][j] <= real[i] for i in rows for j in columns) / (k * len(y)),
        "coverage": sum(any(d[i][j] <= real[i] for j in columns) for i in rows) / len(x),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_the_brute_force_ones(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall_module, "_CHUNK", 7)
    x, y = normal(1, 31, 3), 0.7 * normal(2, 24, 3) + 0.4
    assert precision_recall(x, y, k) == pytest.approx(slow_precision_recall(x, y, k), abs=1e-12)


def test_precision_and_recall_of_equal_laws() -> None:
    """Density is 1 on average; coverage is 1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k)), Naeem et al."""
    n, m, k = 60, 40, 5
    found = [precision_recall(normal(2 * i, n, 4), normal(2 * i + 1, m, 4), k) for i in range(150)]
    missed = math.prod((n - j) / (m + n - j) for j in range(1, k + 1))
    assert np.mean([one["density"] for one in found]) == pytest.approx(1, rel=0.05)
    assert np.mean([one["coverage"] for one in found]) == pytest.approx(1 - missed, abs=0.01)


def test_a_dropped_mode_costs_recall_and_coverage_and_an_invented_one_precision_and_density() -> None:
    two = np.concatenate([normal(1, 100, 3), normal(2, 100, 3) + 20])
    other = np.concatenate([normal(3, 100, 3), normal(4, 100, 3) + 20])
    dropped, invented = precision_recall(two, other[:100]), precision_recall(two[:100], other)
    assert dropped["precision"] > 0.9 and dropped["density"] > 0.8
    assert dropped["recall"] < 0.55 and dropped["coverage"] < 0.55
    assert invented["recall"] > 0.9 and invented["coverage"] > 0.85
    assert invented["precision"] < 0.55 and invented["density"] < 0.55


# Sliced Wasserstein, Inception Score --------------------------------------------------------------------------------


def test_sliced_wasserstein_in_one_dimension_is_the_exact_one() -> None:
    """Sorted samples of equal count are matched in order; unequal counts as if each were repeated to one length."""
    x, y = normal(1, 12, 1), 1.5 * normal(2, 12, 1) + 1
    expected = math.sqrt(((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2).mean())
    assert sliced_wasserstein(x, y, seed=0) == pytest.approx(expected, rel=1e-6)
    z = normal(3, 8, 1)
    long = [np.sort(np.repeat(one[:, 0], count)) for one, count in ((x, 2), (z, 3))]
    assert sliced_wasserstein(x, z, seed=0) == pytest.approx(
        math.sqrt(((long[0] - long[1]) ** 2).mean()), rel=1e-6
    )


def test_sliced_wasserstein_of_gaussians_tends_to_the_closed_form() -> None:
    """W_2 of N(0, 1) and N(m, s^2) is sqrt(m^2 + (1 - s)^2)."""
    u = (np.arange(4_000) + 0.5) / 4_000
    x = (math.sqrt(2) * torch.erfinv(torch.from_numpy(2 * u - 1))).numpy()[:, None]
    assert sliced_wasserstein(x, 0.4 * x + 2, seed=0) == pytest.approx(math.hypot(2, 0.6), rel=1e-3)


def test_a_shift_gives_its_root_mean_square() -> None:
    x, v = normal(1, 30, 400), normal(2, 400)
    found = sliced_wasserstein(x, x + v, seed=0)
    assert found == pytest.approx(np.linalg.norm(v) / math.sqrt(400), rel=0.1)


def test_inception_score_is_between_one_and_the_number_of_classes() -> None:
    sure = 100 * np.eye(7, dtype=np.float32)[np.arange(70) % 7]
    assert inception_score(sure) == pytest.approx(7)
    assert inception_score(sure[:1].repeat(50, 0)) == pytest.approx(1)
    assert inception_score(np.zeros((20, 7), np.float32)) == pytest.approx(1)
    logits = normal(1, 40, 3).astype(np.float32)
    p = np.exp(logits.astype(float))
    p /= p.sum(1, keepdims=True)
    expected = math.exp(np.mean((p * np.log(p / p.mean(0))).sum(1)))
    assert inception_score(logits) == pytest.approx(expected, rel=1e-6)


# Names ------------------------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Four features: the mean of each quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float().mean(1) / 255, 2).flatten(1)


class MeansAndClasses(Means):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        features = super().forward(images)
        return features, 5 * features


def extractor(network: nn.Module | None = None) -> Extractor:
    return Extractor("means", "0123456789abcdef" * 4, network or MeansAndClasses())


def images(seed: int, count: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


def test_every_name_carries_the_extractor() -> None:
    found = sample_metrics(images(1, 40), images(2, 50), extractor(), seed=0)
    plain = [*SAMPLE_METRICS, "kid_error"]
    assert set(found) == {f"{name}[means-01234567]" for name in plain} | {PIXELS}
    assert all(math.isfinite(value) for value in found.values())
    features = [extractor()(one).values.astype(float) for one in (images(1, 40), images(2, 50))]
    assert found["kid[means-01234567]"] == pytest.approx(slow_kid(*features), rel=1e-9)


def test_a_reference_changes_nothing_and_only_makes_less() -> None:
    real, made = images(1, 40), images(2, 50)
    whole = sample_metrics(real, made, extractor(), seed=3)
    again = sample_metrics(Reference(real, extractor()), made, extractor(), seed=3)
    assert whole == again
    found = sample_metrics(real, made, extractor(), seed=3, only=["kid"])
    assert found == {name: whole[name] for name in ("kid[means-01234567]", "kid_error[means-01234567]")}


def test_a_monitor_may_say_the_plain_name() -> None:
    found = sample_metrics(images(1, 40), images(2, 50), extractor(), seed=0)
    for name in SAMPLE_METRICS:
        assert is_sample_metric(name) and is_sample_metric(f"{name}[means-01234567]")
        assert (
            monitored_value(found, name)
            == monitored_value(found, f"{name}[means-01234567]")
            == found[f"{name}[means-01234567]"]
        )
    assert monitored_value(found, PIXELS) == found[PIXELS]
    assert not is_sample_metric("loss") and not is_sample_metric("kid_error")
    with pytest.raises(UserError, match="no sample metric 'kid\\[other-00000000\\]'"):
        monitored_value(found, "kid[other-00000000]")
    with pytest.raises(UserError, match="did you mean 'kid'"):
        sample_metrics(images(1, 9), images(2, 9), extractor(), seed=0, only=["kidd"])


def test_what_is_not_defined_is_left_out_and_explained() -> None:
    found = sample_metrics(images(1, 5), images(2, 31), extractor(Means()), seed=0)
    reasons = undefined_metrics(5, 31, 4, classes=False)
    assert {base_name(name) for name in found} - {"kid_error"} == SAMPLE_METRICS.keys() - reasons.keys()
    neighbours = {"precision", "recall", "density", "coverage"}
    assert reasons.keys() == neighbours | {"frechet_extrapolated", "inception_score"}
    assert all(f"{name} is not defined, because " in why for name, why in reasons.items())
    with pytest.raises(UserError, match="coverage is not defined, because it needs at least 6 real and 6"):
        sample_metrics(images(1, 5), images(2, 31), extractor(), seed=0, only=["coverage"])
