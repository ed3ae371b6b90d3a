"""Variants that exist only for tests, where a test asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest

import vaedist.models

VARIANTS = Path(__file__).parents[1] / "models" / "variants"


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the kinds of tests/models/variants known in this process; their folder, for other processes."""
    monkeypatch.setattr(vaedist.models, "__path__", [*vaedist.models.__path__, str(VARIANTS)])
    return VARIANTS
