"""Closed forms against torch.distributions and Monte Carlo."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.ranks import run_ranks
from vaedist.config.settings import Strict, parse
from vaedist.core.context import LaneContext, generator
from vaedist.core.errors import UserError
from vaedist.nets.divergences import DiagonalGaussian, mmd
from vaedist.nets.divergences_config import Imq, KernelConfig, Legacy, Rbf


def posterior(shape: tuple[int, ...] = (5, 7)) -> DiagonalGaussian:
    draw = generator("posterior", shape)
    mean = torch.randn(shape, generator=draw, dtype=torch.float64)
    return DiagonalGaussian(mean, torch.randn(shape, generator=draw, dtype=torch.float64))


def test_kl_is_the_closed_form_per_dimension() -> None:
    for shape in [(5, 7), (2, 3, 4, 4)]:
        q = posterior(shape)
        expected = kl_divergence(Normal(q.mean, q.std), Normal(torch.zeros_like(q.mean), 1.0))
        assert q.kl().shape == shape
        torch.testing.assert_close(q.kl(), expected, rtol=1e-12, atol=1e-12)


def test_kl_of_the_prior_is_zero_and_its_gradient_too() -> None:
    mean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    log_variance = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    kl = DiagonalGaussian(mean, log_variance).kl()
    kl.sum().backward()
    assert float(kl.detach().abs().max()) == 0
    assert mean.grad is not None and float(mean.grad.abs().max()) == 0
    assert log_variance.grad is not None and float(log_variance.grad.abs().max()) == 0


def test_kl_is_the_mean_log_ratio_of_its_samples() -> None:
    q = DiagonalGaussian(torch.tensor([[0.7]]).double(), torch.tensor([[-1.2]]).double())
    noise = torch.randn(200_000, 1, generator=generator("kl"), dtype=torch.float64)
    z = q.sample(noise)
    ratio = Normal(q.mean, q.std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(ratio.mean(), q.kl().sum(), rtol=0.02, atol=0)


def test_samples_are_reparameterized() -> None:
    mean = torch.tensor([[0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, v: DiagonalGaussian(m, v).sample(noise), (mean, log_variance))
    expected = mean + (log_variance / 2).exp() * noise
    torch.testing.assert_close(DiagonalGaussian(mean, log_variance).sample(noise), expected)


def test_extreme_log_variances_stay_finite() -> None:
    q = DiagonalGaussian(torch.zeros(1, 2), torch.tensor([[-1e4, 1e4]]))
    assert q.kl().isfinite().all() and q.sample(torch.ones(1, 2)).isfinite().all()


def test_from_network_takes_the_first_half_as_mean_and_leaves_half_precision() -> None:
    q = DiagonalGaussian.from_network(torch.arange(8, dtype=torch.bfloat16).view(1, 8))
    assert q.mean.tolist() == [[0, 1, 2, 3]] and q.log_variance.tolist() == [[4, 5, 6, 7]]
    assert q.kl().dtype == torch.float32
    narrow = DiagonalGaussian.from_network(torch.zeros(1, 8), sigma=0.05)
    torch.testing.assert_close(narrow.std, torch.full((1, 4), 0.05))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 4)])
def test_log_prob_is_the_normal_density(shape: tuple[int, ...]) -> None:
    q = posterior(shape)
    z = q.sample(torch.randn(shape, generator=generator("z"), dtype=torch.float64))
    expected = Normal(q.mean, q.std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-12, atol=1e-12)


def test_kl_to_a_prior_for_each_class() -> None:
    """Rows of one class share a prior; the closed form is that of torch, and its gradient reaches the prior."""
    q, label = posterior(), torch.tensor([0, 2, 2, 1, 0])
    draw = generator("classes")
    means = torch.randn(3, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    logs = torch.randn(3, 7, generator=draw, dtype=torch.float64, requires_grad=True)

    def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
        prior = DiagonalGaussian(mean[label], log_variance[label])
        return DiagonalGaussian(q.mean, q.log_variance, prior).kl()

    expected = kl_divergence(Normal(q.mean, q.std), Normal(means[label], (logs[label] / 2).exp()))
    torch.testing.assert_close(kl(means, logs), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(kl, (means, logs))
    same = DiagonalGaussian(q.mean, q.log_variance, DiagonalGaussian(q.mean, q.log_variance))
    assert float(same.kl().abs().max()) == 0
    standard = DiagonalGaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    torch.testing.assert_close(DiagonalGaussian(q.mean, q.log_variance, standard).kl(), q.kl())


# Maximum mean discrepancy -------------------------------------------------------------------------------------

KERNELS = [Imq(), Rbf(), Legacy(), Imq(scales=(1.0,), bandwidth=0.5), Rbf(bandwidth=2.0)]


def normal(*shape: int, name: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator("mmd", name), dtype=dtype)


def by_hand(x: Tensor, y: Tensor, kernel: Imq | Rbf | Legacy) -> float:
    """The module's formulas, one pair at a time."""
    d = x.shape[1]

    def k(a: Tensor, b: Tensor) -> float:
        r2 = float((a - b).square().sum())
        if isinstance(kernel, Legacy):
            return math.exp(-r2 / d**2)
        width = 2 * d * kernel.bandwidth**2
        if isinstance(kernel, Rbf):
            return math.exp(-r2 / width)
        return sum(width * s / (width * s + r2) for s in kernel.scales)

    biased = isinstance(kernel, Legacy)

    def within(z: Tensor) -> float:
        pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if biased or i != j]
        return sum(k(z[i], z[j]) for i, j in pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_mmd_is_the_formula(kernel: Imq | Rbf | Legacy) -> None:
    x, y = 0.7 * normal(6, 3) + 0.2, normal(9, 3, name=1)
    assert float(mmd(x, y, kernel)) == pytest.approx(by_hand(x, y, kernel), abs=1e-12)


def test_mmd_in_blocks_is_the_mean_over_blocks() -> None:
    x, y = normal(11, 3), 2 * normal(11, 3, name=1)
    cut = [(0, 4), (4, 8), (8, 11)]  # 11 rows, blocks of 3: three of them, the first two a row longer
    expected = sum(by_hand(x[a:b], y[a:b], Imq()) for a, b in cut) / 3
    assert float(mmd(x, y, Imq(block=3))) == pytest.approx(expected, abs=1e-12)
    assert float(mmd(x, y, Imq(block=11))) == pytest.approx(float(mmd(x, y)), abs=1e-12)
    assert float(mmd(x, y, Imq(block=50))) == pytest.approx(float(mmd(x, y)), abs=1e-12)


@pytest.mark.parametrize("kernel", [Imq(), Rbf(), Imq(block=2), Imq(block=5), Rbf(block=7)], ids=repr)
def test_mmd_is_unbiased(kernel: Imq | Rbf) -> None:
    """On equal laws its mean is 0 within four standard errors; the biased kernel's is not."""
    draws = torch.stack(
        [mmd(normal(16, 4, name=(i, 0)), normal(16, 4, name=(i, 1)), kernel) for i in range(600)]
    )
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean())) < 4 * error
    assert float(draws.min()) < 0
    legacy = torch.stack(
        [mmd(normal(16, 4, name=(i, 0)), normal(16, 4, name=(i, 1)), Legacy()) for i in range(200)]
    )
    assert float(legacy.mean()) > 10 * float(legacy.std()) / math.sqrt(len(legacy))


@pytest.mark.parametrize(("d", "n"), [(32, 32), (200, 64)])
def test_a_posterior_that_is_too_narrow_is_worse_but_not_to_the_earlier_kernel(d: int, n: int) -> None:
    """(mean of a wrong batch - mean of a right one) / std of right ones, at the earlier systems' own sizes."""

    def sees(kernel: Imq | Rbf | Legacy, factor: float, shift: float = 0.0) -> float:
        right, wrong = [], []
        for i in range(100):
            y, x = normal(n, d, name=(d, i, 0)), normal(n, d, name=(d, i, 1))
            right.append(mmd(x, y, kernel))
            wrong.append(mmd(factor * x + shift, y, kernel))
        good, bad = torch.stack(right), torch.stack(wrong)
        return float((bad.mean() - good.mean()) / good.std())

    assert sees(Imq(), 0.5) > 15 and sees(Rbf(), 0.5) > 10 and sees(Imq(block=8), 0.5) > 8
    assert sees(Legacy(), 0.5) < (-0.4 if d == 32 else -2), "the earlier kernel rewards it"
    for kernel in (Imq(), Legacy()):
        assert sees(kernel, 2.0) > 10 and sees(kernel, 1.0, shift=0.5) > 8


def test_mmd_pulls_a_narrow_sample_apart() -> None:
    x = (0.5 * normal(64, 32)).requires_grad_()
    for kernel in (Imq(), Rbf(), Imq(block=8)):
        (gradient,) = torch.autograd.grad(mmd(x, normal(64, 32, name=1), kernel), x)
        assert float((-gradient * x.detach()).sum()) > 0, "descent moves it away from the middle"


@pytest.mark.parametrize("kernel", [*KERNELS, Imq(block=2)], ids=repr)
def test_gradient_of_mmd(kernel: Imq | Rbf | Legacy) -> None:
    x, y = normal(5, 3).requires_grad_(), normal(5, 3, name=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, kernel), (x, y))


@pytest.mark.parametrize("kernel", [Imq(), Rbf(), Legacy(), Imq(block=6)])
def test_mmd_and_its_gradient_do_not_depend_on_the_tiles(
    kernel: Imq | Rbf | Legacy, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = normal(13, 5, name=0).requires_grad_(), normal(13, 5, name=1).requires_grad_()
    whole = mmd(x, y, kernel)
    gradients = torch.autograd.grad(3 * whole, (x, y))
    monkeypatch.setattr("vaedist.nets.divergences._TILE", 29)
    parts = mmd(x, y, kernel)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(3 * parts, (x, y)), gradients)
    (alone,) = torch.autograd.grad(mmd(x, y.detach(), kernel), x)
    torch.testing.assert_close(3 * alone, gradients[0])
    with torch.no_grad():
        torch.testing.assert_close(mmd(x, y, kernel), whole.detach())


def test_mmd_keeps_its_digits_far_from_zero_and_in_half_precision() -> None:
    x, y = normal(64, 8), 1.3 * normal(64, 8, name=1)
    exact = float(mmd(x, y))
    far = mmd((x + 300).float(), (y + 300).float())
    assert float(far) == pytest.approx(exact, abs=2e-4)
    x16, y16 = x.bfloat16(), y.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = mmd(x16, y16)
    assert inside.dtype == torch.float32
    assert float(inside) == pytest.approx(float(mmd(x16.double(), y16.double())), abs=1e-5)
    assert mmd(x, y).dtype == torch.float64


def test_maps_count_as_vectors_and_sizes_may_differ() -> None:
    x, y = normal(6, 2, 3, 3), normal(4, 2, 3, 3, name=1)
    assert float(mmd(x, y)) == pytest.approx(float(mmd(x.flatten(1), y.flatten(1))), abs=1e-14)


def test_kernels_of_a_job_file() -> None:
    class Section(Strict):
        kernel: KernelConfig = Imq()

    assert parse(Section, {"kernel": {"kind": "imq", "block": 64}}, "job").kernel == Imq(block=64)
    assert parse(Section, {"kernel": {"kind": "legacy"}}, "job").kernel == Legacy()
    with pytest.raises(UserError, match=r"kernel\.block: .*greater than or equal to 2"):
        parse(Section, {"kernel": {"kind": "rbf", "block": 1}}, "job")
    with pytest.raises(UserError, match=r"kernel\.scales"):
        parse(Section, {"kernel": {"kind": "imq", "scales": []}}, "job")


RANK = """
import json, torch
from tests.nets.test_divergences import gathered_mmd
from vaedist.distributed.contexts import DistributedLaneContext
from vaedist.distributed.process_group import Group

group = Group.join(device="cpu")
start, stop = [(0, 4), (4, 10)][group.rank]
out = {}
for block in (None, 3):
    ctx = DistributedLaneContext(group, seed=1, step=2, batch_size=10, lanes=5, rows=(start, stop))
    value, gradient = gathered_mmd(ctx, stop - start, block)
    out[str(block)] = [value, (group.total(gradient) / group.world).tolist()]
print(json.dumps(out))
group.close()
"""


def gathered_mmd(ctx: LaneContext, rows: int, block: int | None, world: int = 2) -> tuple[float, Tensor]:
    """MMD of a gathered batch of 10, and what this process's rows give as gradient of the mean loss."""
    weight = torch.eye(3, dtype=torch.float64).mul(0.6).requires_grad_()
    z = ctx.noise("x", (rows, 3)).double() @ weight
    value = mmd(ctx.gather(z), ctx.gather(ctx.noise("prior", z.shape).double()), Imq(block=block))
    loss = z.square().sum(1) + value
    (gradient,) = torch.autograd.grad(loss.sum() * world / 10, weight)
    return value.item(), gradient


def test_mmd_over_ranks_is_that_of_the_global_batch() -> None:
    """Value and, after the average of gradients over ranks, its gradient: shares of 4 and 6 of ten rows."""
    alone = {}
    for block in (None, 3):
        ctx = LaneContext(seed=1, step=2, batch_size=10, lanes=5)
        alone[str(block)] = gathered_mmd(ctx, 10, block, world=1)
    for one in map(json.loads, run_ranks(RANK, 2)):
        for block, (value, gradient) in alone.items():
            assert one[block][0] == pytest.approx(value, rel=1e-12)
            torch.testing.assert_close(torch.tensor(one[block][1], dtype=torch.float64), gradient)
