"""Quantisers: search, k-means, running means, expiry, what forward may not do, and fixed grids."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from vaedist.config.settings import parse
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.nets import kmeans as clusters
from vaedist.nets.kmeans import kmeans, nearest_vectors, ordered_index_add, sample_initial_vectors
from vaedist.nets.quantizers import (
    EmaQuantizer,
    FsqQuantizer,
    GradientQuantizer,
    Quantizer,
    ResidualQuantizer,
    quantizer,
)
from vaedist.nets.quantizers_config import EmaCodebook, Fsq, GradientCodebook


def normal(*shape: int, name: object = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator("test", name, shape), dtype=dtype)


def context(step: int = 0, batch: int = 4, start: int = 0, stop: int | None = None) -> LaneContext:
    rows = (start, batch if stop is None else stop)
    return LaneContext(seed=0, step=step, batch_size=batch, lanes=2, rows=rows)


def ema(codes: int = 8, dim: int = 3, **settings: float) -> EmaQuantizer:
    with torch.random.fork_rng(devices=[]):
        module = EmaQuantizer(EmaCodebook(codes=codes, dim=dim, **settings))
    module.double()
    module.initialize_codebook(normal(50 * codes, dim), seed=0, per_step=16)
    return module


# Search and k-means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 70, 1 << 22])
def test_nearest_is_the_smallest_distance(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_CHUNK", chunk)
    rows, embedding = normal(40, 5), normal(7, 5, name=1)
    index, distance = nearest_vectors(rows, embedding)
    expected = torch.cdist(rows, embedding).square().min(1)
    assert index.tolist() == expected.indices.tolist()
    torch.testing.assert_close(distance, expected.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk", [9, 1 << 22])
def test_rows_are_added_to_their_codes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_CHUNK", chunk)
    rows, index = normal(30, 4), torch.arange(30) % 3
    got = ordered_index_add(torch.zeros(5, 4, dtype=torch.float64), index, rows)
    expected = torch.zeros(5, 4, dtype=torch.float64).index_add_(0, index, rows)
    torch.testing.assert_close(got, expected)


def test_kmeans_finds_separated_clusters() -> None:
    centres = 20 * normal(6, 3, name="centres")
    vectors = (centres[:, None] + 0.1 * normal(6, 25, 3)).flatten(0, 1)
    means, counts = kmeans(vectors, 6, seed=3)
    assert counts.tolist() == [25] * 6
    order = torch.cdist(centres, means).argmin(1)
    assert sorted(order.tolist()) == list(range(6))
    torch.testing.assert_close(means[order], vectors.view(6, 25, 3).mean(1), rtol=1e-12, atol=1e-12)


def test_kmeans_is_a_function_of_its_arguments() -> None:
    vectors = normal(400, 4)
    first, again, other = (
        kmeans(vectors, 10, seed=1),
        kmeans(vectors, 10, seed=1),
        kmeans(vectors, 10, seed=2),
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_kmeans_is_better_than_its_vectors_taken_at_random() -> None:
    vectors = normal(2000, 4)
    clustered = nearest_vectors(vectors, kmeans(vectors, 30, seed=0)[0])[1].mean()
    assert float(clustered) < 0.75 * float(nearest_vectors(vectors, vectors[:30])[1].mean())


@pytest.mark.parametrize("distinct", [1, 3])
def test_kmeans_with_fewer_distinct_vectors_than_codes(distinct: int) -> None:
    vectors = normal(distinct, 4).repeat(5, 1)
    means, counts = kmeans(vectors, 8, seed=0)
    assert means.isfinite().all() and float(counts.min()) >= 1
    assert float(nearest_vectors(vectors, means)[1].max()) < 1e-13


def test_initial_vectors_are_positions_of_every_sample() -> None:
    maps = [normal(4, 3, 5, 5, name=i) for i in range(2)]
    vectors, seed, per_step = sample_initial_vectors(maps, context(), count=40)
    assert per_step == 4 * 25
    assert vectors.shape == (40, 3)
    everything = torch.cat([z.permute(0, 2, 3, 1).reshape(-1, 3) for z in maps])
    index, distance = nearest_vectors(vectors, everything)
    assert float(distance.max()) < 1e-13 and len(index.unique()) == 40
    assert (index // 25).bincount().tolist() == [5] * 8
    again, same, _ = sample_initial_vectors(maps, context(), count=40)
    assert torch.equal(vectors, again) and seed == same
    assert len(sample_initial_vectors(maps, context(), count=10**9)[0]) == 200


# Running means ------------------------------------------------------------------------------------------------


def test_one_step_is_the_formula() -> None:
    module = ema(decay=0.9, expire=0)
    before = copy.deepcopy(module.state_dict())
    z, ctx = normal(4, 3, 2, 2), context()
    codes = module(z, ctx).codes.flatten()
    module.after_step(ctx)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    for k in range(8):
        mine = rows[codes == k]
        count = 0.9 * before["count_average"][k] + 0.1 * len(mine)
        total = 0.9 * before["sum_average"][k] + 0.1 * mine.sum(0)
        torch.testing.assert_close(module.count_average[k], count)
        torch.testing.assert_close(module.sum_average[k], total)
        expected = total / count if len(mine) else before["embedding"][k]
        torch.testing.assert_close(module.embedding[k], expected)


def test_kmeans_start_is_consistent() -> None:
    module = ema()
    torch.testing.assert_close(module.sum_average, module.embedding * module.count_average[:, None])
    assert float(module.count_average.sum()) == pytest.approx((1 - 0.99) * 16)


@pytest.mark.parametrize(
    "config",
    [
        EmaCodebook(codes=8, dim=3),
        EmaCodebook(codes=8, dim=3, residual_levels=2),
        EmaCodebook(codes=8, dim=3, cosine=True, estimator="rotation"),
        GradientCodebook(codes=8, dim=3),
        Fsq(levels=(4, 3, 3)),
    ],
)
def test_forward_and_evaluation_write_no_state(config: EmaCodebook | GradientCodebook | Fsq) -> None:
    with torch.random.fork_rng(devices=[]):
        module = quantizer(config)
    before = copy.deepcopy(module.state_dict())
    z = normal(4, 3, 2, 2, dtype=torch.float32)
    ctx = context()
    module(z, ctx)  # a step that is then refused: after_step never comes
    evaluation = SampleContext(seed=0, samples=range(4))
    module(z, evaluation)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    ctx.total("codes")
    with pytest.raises(KeyError):
        evaluation.total("codes")


class Joined(LaneContext):
    """One of several processes inside this one: sums and gathers what the others hold under the same name."""

    def __init__(self, *, start: int, stop: int, batch: int, step: int = 0) -> None:
        super().__init__(seed=0, step=step, batch_size=batch, lanes=2, rows=(start, stop))
        self.peers: list[Joined] = [self]

    def total(self, name: str) -> Tensor:
        return torch.stack([super(Joined, peer).total(name) for peer in self.peers]).sum(0)

    def collected(self, name: str) -> Tensor:
        return torch.cat([super(Joined, peer).collected(name) for peer in self.peers])


def test_any_cut_of_the_batch_leaves_the_same_codebook() -> None:
    whole = ema(codes=16, expire=0.3, decay=0.5)
    cuts = {
        "ranks of 3 and 3": [[(0, 3)], [(3, 6)]],
        "ranks of 1, 3 and 2": [[(0, 1)], [(1, 4)], [(4, 6)]],
        "accumulated": [[(0, 2), (2, 4), (4, 6)]],
        "two ranks, accumulated": [[(0, 1), (1, 3)], [(3, 5), (5, 6)]],
    }
    others = {name: [copy.deepcopy(whole) for _ in ranks] for name, ranks in cuts.items()}
    moved = 0
    for step in range(4):
        # Narrower than the start's vectors, so that some codes go unused and are moved.
        z = 0.3 * normal(6, 3, 3, 3, name=step)
        ctx = context(step, batch=6)
        whole(z, ctx)
        used = whole.after_step(ctx)
        for name, ranks in cuts.items():
            contexts = [Joined(start=r[0][0], stop=r[-1][1], batch=6, step=step) for r in ranks]
            for module, rank, own in zip(others[name], ranks, contexts, strict=True):
                own.peers = contexts
                for start, stop in rank:
                    module(z[start:stop], own.micro_batch(start - own.start, stop - own.start))
            for module, own in zip(others[name], contexts, strict=True):
                shown = module.after_step(own)
                torch.testing.assert_close(shown, used)
                torch.testing.assert_close(module.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-12)
        moved += int(
            (whole.embedding[:, None] == z.permute(0, 2, 3, 1).reshape(1, -1, 3)).all(2).any(1).sum()
        )
    assert moved > 0, "the test should see codes expire"


def test_dead_codes_move_onto_vectors_of_the_batch_with_count_and_sum() -> None:
    module = ema(codes=8, expire=0.1, decay=0.5)
    with torch.no_grad():
        module.embedding[2:] = 1e3
        module.sum_average[2:] = 1e3 * module.count_average[2:, None]
    z = normal(4, 3, 4, 4)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    for step in range(12):
        ctx = context(step)
        used = module(z, ctx).codes.unique()
        shown = module.after_step(ctx)
        assert int(shown["codes_used"]) == len(used)
    assert len(used) == 8
    torch.testing.assert_close(module.sum_average, module.embedding * module.count_average[:, None])
    assert float(module.embedding.abs().max()) <= float(rows.abs().max())


def test_expiry_can_be_turned_off() -> None:
    module = ema(codes=4, expire=0, decay=0.5)
    with torch.no_grad():
        module.embedding[3] = 1e3
    for step in range(3000):  # long enough for the unused count to fade to exactly 0
        ctx = context(step)
        module(normal(4, 3, 1, 1, name=step % 5), ctx)
        module.after_step(ctx)
    assert module.embedding[3].tolist() == [1e3] * 3 and float(module.count_average[3]) == 0
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_candidates_are_far_vectors() -> None:
    """One sample holds 63 vectors on a code and one far from all: the far one is drawn."""
    module = ema(codes=4, dim=2)
    with torch.no_grad():
        module.embedding.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]))
    z = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    z[:, :, 5, 6] = 30.0
    ctx = LaneContext(seed=0, step=0, batch_size=2, lanes=2)
    module(z, ctx)
    assert (ctx.collected("candidates")[..., 1:] == 30).all()


@pytest.mark.parametrize("kind", ["residual", "cosine"])
def test_any_cut_of_the_batch_leaves_the_same_codebooks_of_other_kinds(kind: str) -> None:
    whole = book(kind, expire=0.3, decay=0.5)
    halves = [copy.deepcopy(whole) for _ in range(2)]
    for step in range(3):
        z = 0.3 * normal(6, 3, 3, 3, name=step)
        ctx = context(step, batch=6)
        codes = whole(z, ctx).codes
        shown = whole.after_step(ctx)
        contexts = [Joined(start=a, stop=b, batch=6, step=step) for a, b in ((0, 2), (2, 6))]
        for module, own in zip(halves, contexts, strict=True):
            own.peers = contexts
            assert torch.equal(module(z[own.start : own.stop], own).codes, codes[own.start : own.stop])
        for module, own in zip(halves, contexts, strict=True):
            torch.testing.assert_close(module.after_step(own), shown)
            torch.testing.assert_close(module.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-12)


def test_a_toy_of_clusters_keeps_its_codes_alive() -> None:
    """1024 clusters, K = 512, D = 64, 4096 vectors per step, fixed encoder, ten times smaller than a N(0, 1) start.

    A start with counts at 0 and sums at the embedding leaves 1 to 3 codes; k-means and expiry at least 90 %.
    """
    centres = normal(1024, 64, name="clusters", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        module = EmaQuantizer(EmaCodebook(codes=512, dim=64, decay=0.99))

    def batch(step: int) -> Tensor:
        pick = torch.randint(1024, (4096,), generator=generator("pick", step))
        rows = centres[pick] + 0.5 * normal(4096, 64, name=step, dtype=torch.float32)
        return 0.1 * rows.view(16, 16, 16, 64).permute(0, 3, 1, 2)

    maps = [batch(-1 - i) for i in range(4)]
    module.initialize_codebook(
        *sample_initial_vectors(maps, LaneContext(seed=0, step=0, batch_size=16, lanes=16), count=8192)
    )
    for step in range(150):
        ctx = LaneContext(seed=0, step=step, batch_size=16, lanes=16)
        z = batch(step)
        q = module(z, ctx)
        shown = module.after_step(ctx)
    assert int(shown["codes_used"]) >= 0.9 * 512
    assert float(shown["perplexity"]) > 250
    error = (z - q.values).square().mean() / z.square().mean()
    assert float(error) < 0.6


# What every codebook shares -----------------------------------------------------------------------------------


def module_of(kind: str) -> Quantizer:
    if kind == "ema":
        return ema()
    with torch.random.fork_rng(devices=[]):
        module = GradientQuantizer(GradientCodebook(codes=8, dim=3)).double()
    module.initialize_codebook(normal(400, 3), seed=0, per_step=16)
    return module


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_straight_through_and_commitment(kind: str) -> None:
    module, z = module_of(kind), normal(4, 3, 2, 2).requires_grad_()
    out = module(z, context())
    assert torch.equal(out.codes, module.encode(z))
    torch.testing.assert_close(out.values, module.embed(out.codes), rtol=1e-12, atol=1e-12)
    weight = normal(4, 3, 2, 2, name="weight")
    (gradient,) = torch.autograd.grad((out.values * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weight)
    assert out.commitment is not None and out.commitment.shape == (4,)
    error = z - module.embed(out.codes)
    torch.testing.assert_close(out.commitment, error.square().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(out.commitment.sum(), z)
    torch.testing.assert_close(gradient, 2 * error / 12)


def test_a_gradient_codebook_is_pulled_to_its_vectors_and_does_not_pull_them() -> None:
    module, z = module_of("gradient"), normal(4, 3, 2, 2).requires_grad_()
    out = module(z, context())
    assert out.codebook is not None
    to_z, to_codes = torch.autograd.grad(out.codebook.sum(), [z, module.embedding], allow_unused=True)
    assert to_z is None
    rows, codes = z.detach().permute(0, 2, 3, 1).reshape(-1, 3), out.codes.flatten()
    expected = torch.zeros_like(module.embedding)
    expected.index_add_(0, codes, 2 * (module.embedding.detach()[codes] - rows) / 12)
    torch.testing.assert_close(to_codes, expected)


def test_search_is_in_full_precision_inside_autocast() -> None:
    with torch.random.fork_rng(devices=[]):
        module = EmaQuantizer(EmaCodebook(codes=256, dim=16))
    module.initialize_codebook(normal(4096, 16, dtype=torch.float32), seed=0, per_step=1024)
    z = normal(4, 16, 16, 16, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = module(z, context())
        codes = module.encode(z)
    assert inside.values.dtype == torch.float32 and inside.commitment is not None
    assert inside.commitment.dtype == torch.float32
    assert torch.equal(inside.codes, module.encode(z.float())) and torch.equal(codes, inside.codes)
    exact = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 16).double(), module.embedding.double()).argmin(1)
    assert (exact == codes.flatten()).double().mean() > 0.999


def test_perplexity_and_codes_used() -> None:
    module = FsqQuantizer(Fsq(levels=(4, 2)))
    for codes, perplexity, used in [
        (range(8), 8.0, 8),
        ([3] * 8, 1.0, 1),
        ([0, 0, 0, 0, 5, 5, 5, 5], 2.0, 2),
    ]:
        ctx = context()
        module.count_codes(torch.tensor(list(codes)), ctx)
        shown = module.after_step(ctx)
        assert float(shown["perplexity"]) == pytest.approx(perplexity)
        assert int(shown["codes_used"]) == used


# Codes on a sphere, and residual levels -------------------------------------------------------------------------


def book(kind: str, codes: int = 8, dim: int = 3, **settings: float) -> Quantizer:
    """`cosine` and `residual` (three levels) codebooks of running means, `trained` for the residual one by gradient."""
    more = {"cosine": True} if kind == "cosine" else {"residual_levels": 3}
    cls = GradientCodebook if kind == "trained" else EmaCodebook
    with torch.random.fork_rng(devices=[]):
        module = quantizer(cls.model_validate({"codes": codes, "dim": dim, **more, **settings})).double()
    module.initialize_codebook(normal(50 * codes, dim), seed=0, per_step=16)
    return module


def test_cosine_codes_are_nearest_by_angle_whatever_the_length() -> None:
    module = book("cosine")
    assert isinstance(module, EmaQuantizer)
    z = normal(4, 3, 5, 5)
    codes = module.encode(z)
    similarity = torch.nn.functional.normalize(z, dim=1).permute(0, 2, 3, 1) @ module.vectors.T
    assert torch.equal(codes, similarity.argmax(3))
    length = 0.01 + 10 * torch.rand((4, 1, 5, 5), generator=generator("length"), dtype=torch.float64)
    assert torch.equal(module.encode(z * length), codes)
    torch.testing.assert_close(module.embed(codes).square().mean(1), torch.ones(4, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_nothing_pulls_at_the_length_of_a_cosine_vector(estimator: str) -> None:
    module, z = book("cosine", estimator=estimator), normal(4, 3, 2, 2).requires_grad_()  # type: ignore[arg-type]
    out = module(z, context())
    assert out.commitment is not None
    loss = (out.values * normal(4, 3, 2, 2, name="weight")).sum() + out.commitment.sum()
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(gradient.abs().max()) > 0.1
    assert float((gradient * z.detach()).sum(1).abs().max()) < 1e-12


def test_cosine_codes_follow_the_mean_direction() -> None:
    module = book("cosine", codes=2, dim=2, decay=0.0, expire=0)
    assert isinstance(module, EmaQuantizer)
    angle = torch.tensor([0.1, 0.3, 3.0, 3.2], dtype=torch.float64)
    z = torch.stack([angle.cos(), angle.sin()], 1).mul(torch.tensor([[1.0], [5], [2], [9]])).view(4, 2, 1, 1)
    for step in range(3):
        ctx = context(step)
        module(z, ctx)
        module.after_step(ctx)
    found = torch.atan2(module.vectors[:, 1], module.vectors[:, 0]).sort().values
    torch.testing.assert_close(found, torch.tensor([0.2, 3.1], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["residual", "trained"])
def test_residual_levels_add_up_and_each_takes_what_is_left(kind: str) -> None:
    module, z = book(kind), normal(4, 3, 5, 2)
    out = module(z, context())
    assert (module.num_codes, module.depth) == (8, 3)
    assert out.codes.shape == (4, 15, 2) and int(out.codes.max()) < 8
    assert torch.equal(out.codes, module.encode(z))
    torch.testing.assert_close(out.values, module.embed(out.codes))
    assert isinstance(module, ResidualQuantizer)
    rest, left = z, []
    for level, one in enumerate(module.books):
        rows = out.codes[:, level::3]  # each row of positions: its coarse codes, then the finer ones below
        assert torch.equal(one.encode(rest), rows)  # type: ignore[operator]
        rest = rest - one.embed(rows)  # type: ignore[operator]
        left.append(rest.square().flatten(1).mean(1))
    torch.testing.assert_close(out.values, z - rest)
    assert out.commitment is not None
    torch.testing.assert_close(out.commitment, torch.stack(left).mean(0))
    first, second, third = (float(one.detach().mean()) for one in left)
    assert third < 0.6 * second < 0.36 * first


def test_gradients_of_residual_levels() -> None:
    """Straight through to the map; each trained codebook is pulled by its own level alone."""
    module, z = book("trained"), normal(4, 3, 2, 2).requires_grad_()
    out, weight = module(z, context()), normal(4, 3, 2, 2, name="weight")
    (gradient,) = torch.autograd.grad((out.values * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)
    assert out.codebook is not None and isinstance(module, ResidualQuantizer)
    embeddings = [one.embedding for one in module.books]
    *pulls, to_z = torch.autograd.grad(out.codebook.sum(), [*embeddings, z], allow_unused=True)
    assert to_z is None
    rest = z.detach()
    for level, (embedding, pull) in enumerate(zip(embeddings, pulls, strict=True)):
        assert isinstance(embedding, Tensor)
        rows, codes = rest.permute(0, 2, 3, 1).reshape(-1, 3), out.codes[:, level::3].flatten()
        expected = torch.zeros_like(embedding)
        expected.index_add_(0, codes, 2 * (embedding.detach()[codes] - rows) / 12)
        torch.testing.assert_close(pull, expected)
        rest = rest - module.books[level].embed(out.codes[:, level::3]).detach()  # type: ignore[operator]


def test_residual_levels_report_their_use_each_by_its_name() -> None:
    module, ctx = book("residual"), context()
    codes = module(normal(4, 3, 5, 5), ctx).codes
    shown = module.after_step(ctx)
    for level, tag in enumerate(("", "/level2", "/level3")):
        assert int(shown[f"codes_used{tag}"]) == len(codes[:, level::3].unique())
        assert 1 <= float(shown[f"perplexity{tag}"]) <= 8


def test_two_levels_of_16_reach_further_than_one_of_32() -> None:
    """The same number of vectors, 256 sums instead of 32 codes: less is left over after training on the same data."""
    left = {}
    for levels, codes in ((1, 32), (2, 16)):
        with torch.random.fork_rng(devices=[]):
            module = quantizer(EmaCodebook(codes=codes, dim=4, residual_levels=levels, decay=0.9))
        module.initialize_codebook(normal(2000, 4, dtype=torch.float32), seed=0, per_step=1024)
        for step in range(40):
            ctx = context(step)
            out = module(normal(4, 4, 16, 16, name=step, dtype=torch.float32), ctx)
            shown = module.after_step(ctx)
        z = normal(8, 4, 16, 16, name="held out", dtype=torch.float32)
        left[levels] = float((z - module.embed(module.encode(z))).square().mean())
        assert all(int(shown[name]) >= 0.9 * codes for name in shown if name.startswith("codes_used"))
        assert out.values.dtype == torch.float32
    assert left[2] < 0.7 * left[1]


def test_cosine_codes_have_no_residual_levels() -> None:
    with pytest.raises(UserError, match="cosine codes have no residual levels"):
        parse(EmaCodebook, {"cosine": True, "residual_levels": 2}, "job")


# Fixed grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5, 5), (4, 4, 4)])
def test_fsq_codes_and_vectors_are_one_to_one(levels: tuple[int, ...]) -> None:
    module = FsqQuantizer(Fsq(levels=levels))
    codes = torch.arange(module.num_codes)[:, None, None]
    vectors = module.embed(codes)
    assert vectors.shape == (module.num_codes, len(levels), 1, 1)
    assert len(vectors.flatten(1).unique(dim=0)) == module.num_codes
    grid = itertools.product(*(torch.linspace(-1, 1, n).tolist() for n in levels))
    torch.testing.assert_close(vectors.flatten(1).unique(dim=0), torch.tensor(sorted(grid)))
    # The map whose bounded value is that vector comes back to its code.
    assert torch.equal(module.encode(torch.atanh(vectors * (1 - 1e-6) / (1 + 1e-3))), codes)


def test_fsq_reaches_its_outermost_levels_and_no_further() -> None:
    module = FsqQuantizer(Fsq(levels=(5, 8)))
    far = torch.tensor([[40.0, -40.0], [-40.0, 40.0], [3.0, 3.0]]).view(3, 2, 1, 1)
    out = module(far, LaneContext(seed=0, step=0, batch_size=3, lanes=1))
    assert out.values.flatten(1).tolist() == [[1, -1], [-1, 1], [1, 1]]


def test_fsq_gradient_passes_the_rounding() -> None:
    module = FsqQuantizer(Fsq(levels=(7, 4)))
    z = normal(2, 2, 3, 3).requires_grad_()
    out = module(z, context(batch=2))
    assert out.commitment is None and out.codebook is None
    (gradient,) = torch.autograd.grad(out.values.sum(), z)
    torch.testing.assert_close(gradient, 1.001 * (1 - torch.tanh(z) ** 2))
    torch.testing.assert_close(out.values.float(), module.embed(out.codes))
