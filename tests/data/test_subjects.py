"""Subject maps, and no subject in two splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from vaedist.core.errors import UserError
from vaedist.data.packing.rejections import Rejections
from vaedist.data.packing.subjects import keep_subjects_in_one_split, map_subjects, read_subject_map
from vaedist.data.sources import Item


def test_a_subject_in_two_splits() -> None:
    items = [
        *(Item(f"a{i}", "train", None, "p1", f"a{i}") for i in range(3)),
        Item("b", "test", None, "p1", "b"),
        Item("c", "test", None, "p2", "c"),
    ]
    message = r"b belongs to subject p1, who occurs in test \(1 images\) and train \(3 images\)"
    with pytest.raises(UserError, match=message):
        keep_subjects_in_one_split(items, Rejections(skip_bad=False))
    rejections = Rejections(skip_bad=True)
    assert [item.key for item in keep_subjects_in_one_split(items, rejections)] == ["a0", "a1", "a2", "c"]
    assert [problem.origin for problem in rejections.problems] == ["b"]


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
    ("text", "message"),
    [
        ("", "is empty"),
        ("a b c\n", "two columns"),
        ("a P1\na P2\n", "two subjects, P1 and P2"),
        ("case patient\na\n", "no subject"),
    ],
)
def test_subject_maps_that_do_not_tell(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_subject_map(path)


def test_a_prefix_ends_at_a_word() -> None:
    item = Item("case_0010_slice_1", None, None, "", "case_0010_slice_1.png")
    with pytest.raises(UserError, match=r"map has no subject for case_0010_slice_1.png"):
        map_subjects([item], {"case_001": "P1"}, Path("map"))
    longest = {"case": "A", "case_0010": "B"}
    assert map_subjects([item], longest, Path("map"))[0].subject == "B"
