"""Splits, subjects and order: what is decided before anything is packed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vaedist.core.errors import UserError
from vaedist.data.packing.packing_plan import (
    SHARD_BYTES,
    Bad,
    choose_splits,
    make_plan,
    map_subjects,
    part_subjects,
    read_subject_map,
    samples_per_shard,
    usable,
)
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


# Subjects ----------------------------------------------------------------------------------------------------


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


def test_a_subject_in_two_splits() -> None:
    items = [
        *(Item(f"a{i}", "train", None, "p1", f"a{i}") for i in range(3)),
        Item("b", "test", None, "p1", "b"),
        Item("c", "test", None, "p2", "c"),
    ]
    told = r"b belongs to subject p1, who occurs in test \(1 images\) and train \(3 images\)"
    with pytest.raises(UserError, match=told):
        part_subjects(items, Bad(skip=False))
    bad = Bad(skip=True)
    assert [item.key for item in part_subjects(items, bad)] == ["a0", "a1", "a2", "c"]
    assert [problem.origin for problem in bad.problems] == ["b"]


@pytest.mark.parametrize(
    "text",
    [
        "# case  scan  patient  split\ncase_001 x P1 train\ncase_002 y P2 test\n",
        "case,patient_id\ncase_001,P1\ncase_002,P2\n",
        "case;site;Subject\ncase_001;here;P1\ncase_002;there;P2\n",
        "case_001 P1\ncase_002 P2\n",
        "# a remark\ncase_001\tP1\n\ncase_002\tP2\n",
    ],
)
def test_subject_maps(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    table = read_subject_map(path)
    assert table == {"case_001": "P1", "case_002": "P2"}
    items = [Item(f"case_00{i}_slice_1", None, None, f"case_00{i}", "x") for i in (1, 2)]
    assert [item.subject for item in map_subjects(items, table, path)] == ["P1", "P2"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a b c\n", "two columns"),
        ("a P1\na P2\n", "two subjects, P1 and P2"),
        ("case patient\na\n", "no subject"),
    ],
)
def test_subject_maps_that_do_not_tell(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        read_subject_map(path)


def test_a_prefix_ends_at_a_word() -> None:
    item = Item("case_0010_slice_1", None, None, "", "case_0010_slice_1.png")
    with pytest.raises(UserError, match=r"map tells no subject for case_0010_slice_1.png"):
        map_subjects([item], {"case_001": "P1"}, Path("map"))
    longest = {"case": "A", "case_0010": "B"}
    assert map_subjects([item], longest, Path("map"))[0].subject == "B"


# Keys, order, shards -----------------------------------------------------------------------------------------


def test_duplicate_keys() -> None:
    listing = [
        Item("a", None, None, "", "a.png"),
        Item("a", None, None, "", "a.jpg"),
        Problem("x", "is broken"),
    ]
    with pytest.raises(UserError, match=r"a.jpg has the same key as a.png \(a\)"):
        usable(listing, Bad(skip=False))
    bad = Bad(skip=True)
    assert [item.origin for item in usable(listing, bad)] == ["a.png"]
    assert [problem.origin for problem in bad.problems] == ["a.jpg", "x"]


def test_random_order_mixes_a_class_sorted_folder() -> None:
    # 10 classes in 2,000 images, sorted: in batches of 100, no class should be far from 10 images.
    items = items_of(2000, split="train", labels=10)
    plan = make_plan(items, per_shard=400, order="random", seed=0, settings={})
    order = [item.label for part in plan.parts for item in part.items]
    batches = np.array([[order[i : i + 100].count(f"c{c}") for c in range(10)] for i in range(0, 2000, 100)])
    assert batches.max() <= 22, "expected 10, standard deviation 3"
    assert batches.min() >= 1
    assert len({item.key for part in plan.parts for item in part.items}) == 2000
    # The same bound is broken by the source's own order, so it says something.
    plan = make_plan(items, per_shard=400, order="source", seed=0, settings={})
    assert [item.label for item in plan.parts[0].items[:100]] == ["c0"] * 100
    assert [item.key for part in plan.parts for item in part.items] == [item.key for item in items]


def test_every_shard_mixes_the_classes() -> None:
    plan = make_plan(items_of(2000, labels=10), per_shard=400, order="random", seed=1, settings={})
    for part in plan.parts:
        shares = Counter(item.label for item in part.items)
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
    assert [part.name for part in plan.parts] == [
        *("train-000000", "train-000001", "test-000000", "test-000001", "extra-000000", "extra-000001")
    ]


def test_shards_stay_within_64_mib() -> None:
    for pixels in (28 * 28, 64 * 64, 256 * 256 * 3, 512 * 512, 2**27):
        count = samples_per_shard(pixels)
        worst = count * (
            pixels * 65 // 64 + 4096
        )  # what does not compress, with headers and the small members
        assert worst <= SHARD_BYTES or count == 1
