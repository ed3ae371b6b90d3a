"""Noise belongs to lanes and samples: it does not know how many processes there are."""

from __future__ import annotations

import pytest
import torch

from vaedist.core.context import LaneContext, SampleContext
from vaedist.data.loading.order import slice_bounds


def lanes(*rows: int, **changes: object) -> LaneContext:
    settings: dict[str, object] = {"seed": 3, "step": 7, "batch_size": 12, "lanes": 4, **changes}
    return LaneContext(rows=rows or None, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 12])
def test_every_world_size_draws_the_same_training_noise(world: int) -> None:
    whole = lanes().noise("z", (12, 3))
    parts = []
    for rank in range(world):
        start, stop = slice_bounds(12, rank, world)
        parts.append(lanes(start, stop).noise("z", (stop - start, 3)))
    assert torch.equal(torch.cat(parts), whole)


def test_micro_batches_draw_the_noise_of_their_rows() -> None:
    ctx = lanes(2, 9)
    whole = ctx.noise("z", (7, 2))
    assert torch.equal(ctx.micro_batch(3, 7).noise("z", (4, 2)), whole[3:7])


def test_noise_depends_on_seed_step_name_phase_and_chunk_and_on_nothing_else() -> None:
    base = lanes().noise("z", (12, 3))
    assert torch.equal(base, lanes().noise("z", (12, 3)))
    others = [
        lanes(seed=4).noise("z", (12, 3)),
        lanes(step=8).noise("z", (12, 3)),
        lanes(phase="critic").noise("z", (12, 3)),
        lanes().noise("w", (12, 3)),
        lanes().noise("z", (12, 3), chunk=1),
    ]
    for other in others:
        assert not torch.equal(base, other)


def test_noise_is_standard_normal_and_uniform_is_uniform() -> None:
    ctx = LaneContext(seed=0, step=0, batch_size=16, lanes=16)
    normal, uniform = ctx.noise("z", (16, 4096)), ctx.uniform("u", (16, 4096))
    # 65,536 draws: the standard error of the mean is 0.0039, of the variance 0.0055.
    assert abs(normal.mean().item()) < 0.02 and abs(normal.var().item() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.005 and abs(uniform.var().item() - 1 / 12) < 0.002
    # Lanes are independent: no row is like another.
    correlation = torch.corrcoef(normal) - torch.eye(16)
    assert correlation.abs().max() < 0.08


def test_evaluation_noise_belongs_to_the_sample() -> None:
    together = SampleContext(seed=1, samples=[4, 9, 2]).noise("z", (3, 5))
    alone = SampleContext(seed=1, samples=[9], step=99).noise("z", (1, 5))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(alone, SampleContext(seed=1, samples=[9]).noise("z", (1, 5), chunk=1))


def test_statistics_add_up_over_micro_batches_and_die_with_the_step() -> None:
    ctx = lanes()
    for start, stop in [(0, 5), (5, 12)]:
        part = ctx.micro_batch(start, stop)
        part.accumulate("count", torch.tensor(float(stop - start)))
        part.collect("rows", torch.arange(start, stop))
    assert ctx.total("count") == 12
    assert torch.equal(ctx.collected("rows"), torch.arange(12))
    with pytest.raises(KeyError):
        lanes().total("count")


def test_no_global_generator_is_touched() -> None:
    before = torch.get_rng_state()
    lanes().noise("z", (12, 3))
    SampleContext(seed=1, samples=[0]).uniform("u", (1, 2))
    assert torch.equal(before, torch.get_rng_state())
