from __future__ import annotations

from pathlib import Path

import pytest

from vaedist.core.errors import UserError
from vaedist.evaluation.groups import group_of, read_groups


@pytest.mark.parametrize(
    "text",
    [
        "# case  patient  contrast\ncase_1 p1 T1\ncase_2 p1 T2\n",
        "case,patient,contrast\ncase_1,p1,T1\n\n# a remark\ncase_2,p1,T2\n",
        "key\tpatient\tcontrast\r\ncase_1\tp1\tT1\r\ncase_2\tp1\tT2",
    ],
)
def test_columns_are_named_by_the_first_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "groups.txt"
    path.write_text(text)
    assert read_groups(path) == {
        "patient": {"case_1": "p1", "case_2": "p1"},
        "contrast": {"case_1": "T1", "case_2": "T2"},
    }


def test_columns_without_names(tmp_path: Path) -> None:
    path = tmp_path / "groups.txt"
    path.write_text("case_1 p1 T1\ncase_2 p2 T1\n")
    assert list(read_groups(path)) == ["column 2", "column 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# case patient\n", "is empty"),
        ("case_1 p1\ncase_2\n", "line 2: expected a case and 1 more"),
        ("case_1\n", "line 1: expected a case and 1 more"),
        ("case_1 p1\ncase_1 p2\n", "line 2: 'case_1' is given twice"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "groups.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_groups(path)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the groups file"):
        read_groups(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_groups(tmp_path / "binary")


def test_the_longest_listed_beginning_of_a_key_counts() -> None:
    groups = {"case_1": "a", "case_1_slice_2": "b", "p9": "c"}
    assert group_of(groups, "case_1_slice_2", "") == "b"
    assert group_of(groups, "case_1_slice_22", "") == "a"
    assert group_of(groups, "case_11_slice_2", "") is None
    assert group_of(groups, "x", "p9") == "c"
