"""How much of a codebook a whole split uses.

Codes are counted over every image of the split, not averaged over batches: a batch sees few vectors, so both the
number of codes used and the perplexity of a batch are smaller than those of the data and depend on the batch size.
Beside them stands how many vectors were counted: 16 vectors cannot use 128 codes.

The perplexity is exp(H) of the empirical code distribution p, H = -sum p ln p: the number of equally likely codes
that would carry as much. It is K when all codes are used equally and 1 when the codebook has collapsed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vaedist.core.imaging import as_numpy


class CodeCounter:
    """Counts of K codes over a split.

    Args:
        num_codes: K, the size of the codebook.
    """

    def __init__(self, num_codes: int) -> None:
        assert num_codes >= 1
        self.counts = np.zeros(num_codes, np.int64)

    def add(self, codes: Any) -> None:
        """Count integer codes of any shape, each in [0, K)."""
        flat = as_numpy(codes).ravel()
        if flat.size:
            assert flat.min() >= 0 and flat.max() < len(self.counts), "a code outside the codebook"
        self.counts += np.bincount(flat, minlength=len(self.counts))

    def result(self) -> dict[str, float | int]:
        """`codes` (K), `used`, `used_share`, `perplexity`, `vectors` (how many were counted)."""
        vectors = int(self.counts.sum())
        used = int(np.count_nonzero(self.counts))
        share = self.counts[self.counts > 0] / max(vectors, 1)
        return {
            "codes": len(self.counts),
            "used": used,
            "used_share": used / len(self.counts),
            "perplexity": float(np.exp(-np.sum(share * np.log(share)))) if vectors else 0.0,
            "vectors": vectors,
        }
