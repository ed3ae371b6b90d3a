"""What the tests of run folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.small_job import empty_index
from vaedist.data.format.index import Index


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return empty_index(tmp_path / "shards")
