"""The order as a pure function: no byte is read here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaedist.data.loading.order import TrainingOrder, default_lanes, epoch_order, slice_bounds


@st.composite
def plans(draw):
    """(counts, batch size, lanes) with at least one global batch."""
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    batch_size = draw(st.integers(1, min(sum(counts), 48)))
    lanes = draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))
    return counts, batch_size, lanes


seeds = st.integers(0, 2**63 - 1)


@given(plan=plans(), seed=seeds, epoch=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_batches_are_the_documented_ones(plan, seed, epoch):
    counts, batch_size, lanes = plan
    order = epoch_order(counts, seed=seed, epoch=epoch)
    total = sum(counts)
    assert sorted(order) == list(range(total))
    # Shards come whole, one after another.
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    assert (np.diff(shard_of) != 0).sum() == len(counts) - 1
    cut = order[: total - total % lanes].reshape(lanes, -1)
    width = batch_size // lanes
    asked = TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes)
    assert asked.steps_per_epoch == total // batch_size
    for t in range(asked.steps_per_epoch):
        wanted = cut[:, t * width : (t + 1) * width].reshape(-1)
        assert np.array_equal(asked.rows(epoch * asked.steps_per_epoch + t), wanted)


@given(plan=plans(), seed=seeds, epoch=st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_each_sample_comes_once_per_epoch(plan, seed, epoch):
    counts, batch_size, lanes = plan
    order = TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes)
    first = epoch * order.steps_per_epoch
    seen = np.concatenate([order.rows(first + t) for t in range(order.steps_per_epoch)])
    assert len(set(seen.tolist())) == len(seen) == sum(counts) - sum(counts) % batch_size


@given(plan=plans(), seed=seeds, world=st.sampled_from([1, 2, 3, 5, 7, 48]), step=st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_ranks_make_up_the_same_global_batch(plan, seed, world, step):
    counts, batch_size, lanes = plan
    world = min(world, batch_size)
    whole = TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes).rows(step)
    parts = []
    for rank in range(world):
        start, stop = slice_bounds(batch_size, rank, world)
        parts.append(
            TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes).rows(step, start, stop)
        )
    assert np.array_equal(np.concatenate(parts), whole)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@given(plan=plans(), seed=seeds, steps=st.lists(st.integers(0, 300), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_step_can_be_asked_for_at_any_time(plan, seed, steps):
    counts, batch_size, lanes = plan
    used = TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes)
    for step in steps:
        fresh = TrainingOrder(counts, seed=seed, batch_size=batch_size, lanes=lanes)
        assert np.array_equal(used.rows(step), fresh.rows(step))


def test_epochs_and_seeds_differ_and_leave_out_other_samples():
    orders = [epoch_order([30, 30], seed=seed, epoch=epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    order = TrainingOrder([5, 5], seed=0, batch_size=8, lanes=4)
    left_out = {tuple(sorted(set(range(10)) - set(order.rows(epoch).tolist()))) for epoch in range(20)}
    assert len(left_out) > 5


def test_the_order_is_part_of_a_run_and_never_changes():
    assert epoch_order([4, 3, 5], seed=7, epoch=2).tolist() == [11, 9, 10, 8, 7, 0, 3, 2, 1, 5, 6, 4]


def test_batches_of_a_class_sorted_set_are_mixed():
    # 10 shards, each of one class: 16 lanes in different shards mix what the packer did not.
    order = TrainingOrder([160] * 10, seed=0, batch_size=32, lanes=16)
    for t in range(order.steps_per_epoch):
        assert len(set((order.rows(t) // 160).tolist())) >= 5


def test_a_far_step_of_a_large_set_costs_no_more_than_the_first():
    # 100 million samples: only the shards of the lanes asked for are permuted.
    order = TrainingOrder([10_000] * 10_000, seed=0, batch_size=256, lanes=16)
    rows = order.rows(10**9, 0, 16)
    assert rows.shape == (16,) and len(set(rows.tolist())) == 16
    assert order._of_epoch(10**9 // order.steps_per_epoch)._inside.cache_info().misses <= 2


@pytest.mark.parametrize(
    ("batch_size", "lanes"), [(1, 1), (7, 7), (16, 16), (32, 16), (34, 2), (60, 15), (97, 1)]
)
def test_default_lanes(batch_size, lanes):
    assert default_lanes(batch_size) == lanes
