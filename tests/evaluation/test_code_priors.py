"""Count models against counts done by hand, and against the entropies of made-up codes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vaedist.evaluation.metrics.code_priors import NAMES, Conditional, TokenBaselines


def test_hand_counted_bigrams() -> None:
    """Two 2x2 maps of K = 4 codes; every number below is counted on paper."""
    training = np.array([[[0, 1], [1, 1]], [[0, 2], [0, 1]]])
    fitted = TokenBaselines(training, 4)

    # Unigram: of 8 codes, 0 three times, 1 four times, 2 once; 3 distinct, so the back-off 1/4 weighs 3.
    unigram = {0: (3 + 3 / 4) / 11, 1: (4 + 3 / 4) / 11, 2: (1 + 3 / 4) / 11, 3: (0 + 3 / 4) / 11}
    assert sum(unigram.values()) == pytest.approx(1)
    wanted = np.array([[[0, 1], [3, 2]]])
    found = fitted.nats(wanted)
    assert found["uniform"] == pytest.approx([4 * math.log(4)])
    assert found["unigram"] == pytest.approx([-sum(math.log(unigram[c]) for c in (0, 1, 3, 2))])

    # Per position: (0,0) saw 0, 0; (0,1) saw 1, 2; (1,0) saw 1, 0; (1,1) saw 1, 1.
    position = [
        (2 + 1 * unigram[0]) / 3,
        (1 + 2 * unigram[1]) / 4,
        (0 + 2 * unigram[3]) / 4,
        (0 + 1 * unigram[2]) / 3,
    ]
    assert found["per-position unigram"] == pytest.approx([-sum(map(math.log, position))])

    # Left pairs: 0>1, 1>1, 0>2, 0>1. Upper pairs: 0>1, 1>1, 0>0, 2>1.
    corner = unigram[0]
    right = (2 + 2 * unigram[1]) / 5  # after 0 on the left: 1, 2, 1
    below = (0 + 2 * unigram[3]) / 4  # under 0: 1, 0
    last = (unigram[2] + (0 + 1 * unigram[2]) / 2) / 2  # left 3 is unseen; under 1: one 1
    expected = -sum(map(math.log, (corner, right, below, last)))
    assert found["neighbour bigram"] == pytest.approx([expected])


@pytest.mark.parametrize("name", NAMES)
def test_each_sums_to_one_over_all_maps(name: str) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    fitted = TokenBaselines(generator.integers(0, 2, (5, 2, 2)), 3)  # the code 2 is never seen
    every = np.array([*itertools.product(range(3), repeat=4)]).reshape(-1, 2, 2)
    assert np.exp(-fitted.nats(every)[name]).sum() == pytest.approx(1, abs=1e-12)


def markov(count: int, side: int, codes: int, stay: float, seed: int) -> np.ndarray:
    """Maps whose code repeats the left one with probability `stay`, else any code; rows are independent."""
    generator = np.random.Generator(np.random.PCG64(seed))
    maps = generator.integers(0, codes, (count, side, side))
    keep = generator.random(maps.shape) < stay
    for column in range(1, side):
        maps[:, :, column] = np.where(keep[:, :, column], maps[:, :, column - 1], maps[:, :, column])
    return maps


def test_the_bigram_finds_what_the_others_cannot() -> None:
    codes, side = 8, 12
    fitted = TokenBaselines(markov(400, side, codes, 0.9, seed=0), codes)
    found = {
        name: nats.mean() / side**2
        for name, nats in fitted.nats(markov(100, side, codes, 0.9, seed=1)).items()
    }
    assert found["unigram"] == pytest.approx(math.log(codes), abs=0.01)
    assert found["per-position unigram"] == pytest.approx(math.log(codes), abs=0.02)
    assert found["uniform"] == pytest.approx(math.log(codes))
    same, other = 0.9 + 0.1 / codes, 0.1 / codes
    entropy = -same * math.log(same) - (codes - 1) * other * math.log(other)
    # Half of its mass is the upper neighbour's, which knows nothing here.
    assert entropy < found["neighbour bigram"] < math.log(codes) - 0.5


def test_positions_are_learnt_where_they_matter() -> None:
    side, codes = 6, 36
    training = np.tile(np.arange(36).reshape(1, side, side), (200, 1, 1))
    found = TokenBaselines(training, codes).nats(training[:3])
    assert found["unigram"] / 36 == pytest.approx([math.log(36)] * 3, rel=1e-3)
    assert (found["per-position unigram"] / 36 < 0.01).all()


def test_held_out_codes_cost_more_than_training_ones() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    training, held_out = generator.integers(0, 64, (2, 20, 4, 4))
    fitted = TokenBaselines(training, 64)
    for name in ("per-position unigram", "neighbour bigram"):
        assert fitted.nats(training)[name].mean() < fitted.nats(held_out)[name].mean()


def test_draws_follow_the_smoothed_per_position_unigram() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    training = generator.integers(0, 3, (6, 1, 2))
    fitted = TokenBaselines(training, 4)
    drawn = fitted.draw(5000, seed=2)
    every = np.array([*itertools.product(range(4), repeat=2)]).reshape(-1, 1, 2)
    expected = np.exp(-fitted.nats(every)["per-position unigram"])
    found = np.bincount(drawn[:, 0, 0] * 4 + drawn[:, 0, 1], minlength=16) / len(drawn)
    assert np.abs(found - expected).max() < 0.025
    assert (fitted.draw(3, seed=2, first=40) == drawn[40:43]).all()
    assert (fitted.draw(3, seed=3) != drawn[:3]).any()


def test_a_large_codebook_takes_no_table_of_pairs() -> None:
    """Sixty thousand codes squared would be gigabytes."""
    codes = np.arange(60_000).reshape(6, 100, 100)
    found = TokenBaselines(codes, 65_536).nats(codes[:1])
    assert all(np.isfinite(nats).all() for nats in found.values())


def test_an_unseen_context_is_its_back_off() -> None:
    table = Conditional(np.array([3, 3]), np.array([1, 2]), 5)
    assert table.probability(np.array([0]), np.array([1]), 0.125).tolist() == [0.125]
    assert table.share(np.array([0, 3])).tolist() == [0.0, 0.5]
