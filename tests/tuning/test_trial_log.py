"""The record: what is written is read again, a torn line has not happened, a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.spaces import small_space
from vaedist.core.errors import UserError
from vaedist.tuning.trial_log import NAME, Record, Trial

SETTINGS = {"model.beta.end": 0.123456789012345, "model.latent": 4}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record.create(tmp_path, small_space(), "identity")
    made.propose(SETTINGS)
    made.propose({"model.beta.end": 2.0, "model.latent": 2})
    made.propose({"model.beta.end": 3.0, "model.latent": 2})
    made.rung(made.trials[1], 8, 0.5, True)
    made.end(made.trials[0], "finished", step=12, seconds=1.5, measures={"rate": 0.1 + 0.2})
    made.end(made.trials[2], "failed", reason="it diverged")
    return made


def read(folder: Path) -> Record:
    found = Record.read(folder)
    assert found is not None
    return found


def test_what_is_written_is_read_again(record: Record) -> None:
    found = read(record.folder)
    assert found.trials == record.trials
    assert (found.space, found.data) == (small_space(), "identity")
    assert found.trials[0] == Trial(0, SETTINGS, "finished", {"rate": 0.1 + 0.2}, 12, 1.5)
    assert (found.trials[1].rungs, found.trials[1].halted, found.trials[1].ended) == ({8: 0.5}, 8, False)
    assert found.trials[2].reason == "it diverged"


def test_nothing_begun_is_no_record(tmp_path: Path) -> None:
    assert Record.read(tmp_path) is None


def test_killed_at_any_byte_the_record_is_what_was_whole(record: Record) -> None:
    """Every prefix of the file is a record, and what is appended after it is read too."""
    path = record.folder / NAME
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for length in range(first, len(content), 7):
        path.write_bytes(content[:length])
        found = read(record.folder)
        assert found.trials == record.trials[: len(found.trials)] or any(
            not trial.ended for trial in found.trials
        )
        found.truncate_torn_line()
        found.propose(SETTINGS)
        again = read(record.folder)
        assert again.trials[-1] == Trial(len(found.trials) - 1, SETTINGS)
        assert len(path.read_bytes().splitlines()) == content[:length].count(b"\n") + 1


def test_a_torn_first_line_is_no_search(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"event": "search", "for')
    assert Record.read(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\x00\x00",
        b'{"event": "end", "trial": 9, "status": "finished"}',
        b'{"event": "trial", "trial": 7, "settings": {}}',
        b'{"event": "nothing", "trial": 0}',
        b'["end"]',
    ],
)
def test_a_damaged_line_is_refused_by_number(record: Record, line: bytes) -> None:
    path = record.folder / NAME
    lines = path.read_bytes().splitlines()
    lines[4] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=r"trials\.jsonl is damaged in line 5: mend that line"):
        Record.read(record.folder)


def test_each_event_is_one_line_of_json(record: Record) -> None:
    lines = (record.folder / NAME).read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["search", "trial", "trial", "trial", "rung", "end", "end"]
