"""Splits, subjects and order: what is decided before anything is packed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vaedist.core.errors import UserError
from vaedist.data.packing.packing_plan import (
    SHARD_BYTES,
    choose_splits,
    make_plan,
    samples_per_shard,
    usable_items,
)
from vaedist.data.packing.rejections import Rejections
from vaedist.data.sources import Item, Problem


def items_of(count: int, per_subject: int = 0, split: str | None = None, labels: int = 0) -> list[Item]:
    return [
        Item(
            f"k{i:05d}",
            split,
            f"c{i * labels // count}" if labels else None,
            f"s{i // per_subject}" if per_subject else "",
            f"k{i:05d}.png",
        )
        for i in range(count)
    ]


def counts(items: list[Item]) -> dict[str | None, int]:
    return dict(Counter(item.split for item in items))


# Splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_subjects_never_cross_chosen_splits(seed: int) -> None:
    items = choose_splits(items_of(300, per_subject=7), 0.2, 0.1, seed)
    splits: dict[str, set[str | None]] = {}
    for item in items:
        splits.setdefault(item.subject, set()).add(item.split)
    assert all(len(where) == 1 for where in splits.values())
    got = counts(items)
    assert 60 <= got["validate"] < 67
    assert 30 <= got["test"] < 37


def test_images_without_subjects_are_drawn_one_by_one() -> None:
    assert counts(choose_splits(items_of(1000), 0.25, None, 0)) == {"train": 750, "validate": 250}
    assert counts(choose_splits(items_of(1000), None, None, 0)) == {"train": 900, "validate": 100}
    assert counts(choose_splits(items_of(1000), 0.0, None, 0)) == {"train": 1000}


def test_the_draw_depends_on_the_seed_and_not_on_the_listing_order() -> None:
    items = items_of(100)
    chosen = {item.key: item.split for item in choose_splits(items, 0.2, None, 3)}
    assert chosen == {item.key: item.split for item in choose_splits(items[::-1], 0.2, None, 3)}
    assert chosen != {item.key: item.split for item in choose_splits(items, 0.2, None, 4)}


def test_a_sources_own_splits_are_kept() -> None:
    own = [
        *items_of(50, split="train"),
        Item("v", "validate", None, "", "v"),
        Item("t", "test", None, "", "t"),
    ]
    assert choose_splits(own, None, None, 0) == own
    with pytest.raises(UserError, match="--validation-fraction has no meaning"):
        choose_splits(own, 0.1, None, 0)


def test_the_validation_share_comes_out_of_train_only() -> None:
    items = [*items_of(100, split="train"), Item("t", "test", None, "", "t")]
    assert counts(choose_splits(items, None, None, 0)) == {"train": 90, "validate": 10, "test": 1}


def test_too_few_subjects_for_a_share() -> None:
    with pytest.raises(UserError, match="there are 1 subjects"):
        choose_splits(items_of(10, per_subject=10), 0.2, None, 0)
    assert counts(choose_splits(items_of(10, per_subject=10), None, None, 0)) == {"train": 10}


# Keys, order, shards -----------------------------------------------------------------------------------------


def test_duplicate_keys() -> None:
    listing = [
        Item("a", None, None, "", "a.png"),
        Item("a", None, None, "", "a.jpg"),
        Problem("x", "is broken"),
    ]
    with pytest.raises(UserError, match=r"a.jpg has the same key as a.png \(a\)"):
        usable_items(listing, Rejections(skip_bad=False))
    rejections = Rejections(skip_bad=True)
    assert [item.origin for item in usable_items(listing, rejections)] == ["a.png"]
    assert [problem.origin for problem in rejections.problems] == ["a.jpg", "x"]


def test_random_order_mixes_a_class_sorted_folder() -> None:
    # 10 classes in 2,000 images, sorted: in batches of 100, no class should be far from 10 images.
    items = items_of(2000, split="train", labels=10)
    plan = make_plan(items, per_shard=400, order="random", seed=0, settings={})
    order = [item.label for shard in plan.shards for item in shard.items]
    batches = np.array([[order[i : i + 100].count(f"c{c}") for c in range(10)] for i in range(0, 2000, 100)])
    assert batches.max() <= 22, "expected 10, standard deviation 3"
    assert batches.min() >= 1
    assert len({item.key for shard in plan.shards for item in shard.items}) == 2000
    # The same bound is broken by the source's own order, so it says something.
    plan = make_plan(items, per_shard=400, order="source", seed=0, settings={})
    assert [item.label for item in plan.shards[0].items[:100]] == ["c0"] * 100
    assert [item.key for shard in plan.shards for item in shard.items] == [item.key for item in items]


def test_every_shard_mixes_the_classes() -> None:
    plan = make_plan(items_of(2000, labels=10), per_shard=400, order="random", seed=1, settings={})
    for shard in plan.shards:
        shares = Counter(item.label for item in shard.items)
        assert min(shares.values()) >= 20, "expected 40 of each class"


def test_plans_differ_by_seed_settings_and_input() -> None:
    items = items_of(50)

    def digest(**changes: object) -> str:
        settings = {"per_shard": 10, "order": "random", "seed": 0, "settings": {"size": 8}} | changes
        return make_plan(items, **settings).digest  # type: ignore[arg-type]

    assert digest() == digest()
    assert digest() != digest(settings={"size": 16})
    assert (
        digest() != make_plan(items[:-1], per_shard=10, order="random", seed=0, settings={"size": 8}).digest
    )


def test_shard_names_and_split_order() -> None:
    items = [
        Item(f"{split}{i}", split, None, "", "") for split in ("test", "extra", "train") for i in range(3)
    ]
    plan = make_plan(items, per_shard=2, order="random", seed=0, settings={})
    assert [shard.name for shard in plan.shards] == [
        *("train-000000", "train-000001", "test-000000", "test-000001", "extra-000000", "extra-000001")
    ]


def test_shards_stay_within_64_mib() -> None:
    for pixels in (28 * 28, 64 * 64, 256 * 256 * 3, 512 * 512, 2**27):
        count = samples_per_shard(pixels)
        worst = count * (
            pixels * 65 // 64 + 4096
        )  # what does not compress, with headers and the small members
        assert worst <= SHARD_BYTES or count == 1
