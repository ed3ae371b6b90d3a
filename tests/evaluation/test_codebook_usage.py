from __future__ import annotations

import numpy as np
import pytest
import torch

from vaedist.evaluation.metrics.codebook_usage import CodeCounter


def test_equal_use_gives_the_number_of_codes() -> None:
    counter = CodeCounter(8)
    counter.add(torch.arange(8).reshape(2, 2, 2))
    assert counter.result() == {
        "codes": 8, "used": 8, "used_share": 1.0, "perplexity": pytest.approx(8), "vectors": 8
    }  # fmt: skip


def test_a_collapsed_codebook_has_perplexity_one() -> None:
    counter = CodeCounter(128)
    counter.add(np.full((3, 4, 4), 77))
    result = counter.result()
    assert (result["used"], result["vectors"]) == (1, 48)
    assert result["perplexity"] == pytest.approx(1)


def test_the_split_is_counted_not_averaged_over_batches() -> None:
    """Two batches that use one code each: every batch has perplexity 1, the split has 2."""
    counter = CodeCounter(4)
    counter.add(np.zeros((5, 2, 2), np.int64))
    counter.add(np.ones((5, 2, 2), np.int64))
    assert counter.result()["perplexity"] == pytest.approx(2)
    assert counter.result()["used"] == 2


def test_a_code_outside_the_codebook_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="outside"):
        CodeCounter(4).add(np.array([4]))
