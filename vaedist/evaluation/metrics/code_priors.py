"""What a prior over codes is worth: its nats per token beside models that need no training, and bits of the image.

Four distributions of a code map c (h, w) with K codes, fitted on the training codes:

| name | p(c at position i) |
|---|---|
| `uniform` | 1 / K |
| `unigram` | the frequency of c |
| `per-position unigram` | the frequency of c at i |
| `neighbour bigram` | the mean of p(c given the left code) and p(c given the upper one); at an edge the one there is |

Smoothing. A code that training has not shown must not have probability 0, and no number may be tuned. Each level
leaves to the next simpler one the mass that new events had while it was counted (Witten and Bell, "The zero-frequency
problem", 1991, method C):

    p(c | context) = (n(context, c) + T(context) q(c)) / (n(context) + T(context))

n counts, T(context) is the number of distinct codes seen after the context, q the back-off: the unigram for contexts,
1 / K for the unigram. An unseen context is its back-off. Each sums to 1 over c.

Images. A prior of codes with a frozen decoder bounds the likelihood of an image x with codes c:

    -log p(x) <= -log p(c) - log p(x | c)

in nats per image, and divided by P ln 2 in bits/dim, defined where the decoder's likelihood is one of images (see
`vaedist.evaluation.metrics.likelihood`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaedist.core.context import Batch, SampleContext
from vaedist.core.errors import NotDefined
from vaedist.core.imaging import as_numpy
from vaedist.evaluation.metrics.image_quality import summaries, summary
from vaedist.evaluation.metrics.likelihood import (
    MEANINGS,
    bits_per_dim,
    black_and_white,
    likelihood_name,
    log_likelihood,
)
from vaedist.evaluation.metrics.per_image import check_finite, images_of, with_codes, without_padding
from vaedist.models.contract import Variant

NAMES = ("uniform", "unigram", "per-position unigram", "neighbour bigram")

Codes = NDArray[np.int64]
_Floats = NDArray[np.float64]


class Conditional:
    """p(code given context), Witten-Bell smoothed. Only pairs that occur take memory, whatever K.

    Args:
        contexts: Context numbers, at least 0, any shape.
        codes: The code that followed each, in [0, K).
        num_codes: K.
    """

    def __init__(self, contexts: Codes, codes: Codes, num_codes: int) -> None:
        assert contexts.shape == codes.shape
        self.num_codes = num_codes
        self._pairs, self._counts = np.unique(
            contexts.ravel() * num_codes + codes.ravel(), return_counts=True
        )
        self._contexts, where = np.unique(self._pairs // num_codes, return_inverse=True)
        self._totals = np.bincount(where, weights=self._counts)
        self._types = np.bincount(where)

    def probability(self, contexts: Codes, codes: Codes, back_off: _Floats | float) -> _Floats:
        """Of each code given its context; `back_off` is the simpler model's probability of the same code."""
        counts = _look_up(self._pairs, self._counts, contexts * self.num_codes + codes)
        totals, types = (_look_up(self._contexts, held, contexts) for held in (self._totals, self._types))
        seen = totals > 0
        smoothed = (counts + types * back_off) / np.where(seen, totals + types, 1.0)
        return np.where(seen, smoothed, back_off)

    def share(self, contexts: Codes) -> _Floats:
        """The mass of each context that its own counts hold; the rest is the back-off's."""
        totals, types = (_look_up(self._contexts, held, contexts) for held in (self._totals, self._types))
        return totals / np.maximum(totals + types, 1)


def _look_up(keys: Codes, values: NDArray[Any], wanted: Codes) -> _Floats:
    """The value of each wanted key, 0 where there is none."""
    if len(keys) == 0:
        return np.zeros(wanted.shape)
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[rows] == wanted, values[rows], 0).astype(np.float64)


class TokenBaselines:
    """The module's four distributions.

    Args:
        training: (N, h, w) integer codes, N >= 1; kept for `draw`.
        num_codes: K.
    """

    def __init__(self, training: Any, num_codes: int) -> None:
        codes = np.asarray(training, np.int64)
        assert codes.ndim == 3 and len(codes) > 0
        assert codes.min() >= 0 and codes.max() < num_codes, "a code outside the codebook"
        self.shape, self.num_codes = codes.shape[1:], num_codes
        self._training = codes.astype(np.int32)
        self._unigram = Conditional(np.zeros_like(codes), codes, num_codes)
        self._position = Conditional(self._positions(codes), codes, num_codes)
        self._left = Conditional(codes[:, :, :-1], codes[:, :, 1:], num_codes)
        self._upper = Conditional(codes[:, :-1], codes[:, 1:], num_codes)

    def nats(self, codes: Any) -> dict[str, _Floats]:
        """Name to (B,) nats per image of (B, h, w) codes."""
        c = np.asarray(codes, np.int64)
        assert c.shape[1:] == self.shape, f"codes of {c.shape[1:]}, fitted on {self.shape}"
        uniform = np.full(c.shape, 1 / self.num_codes)
        unigram = self._unigram.probability(np.zeros_like(c), c, uniform)
        position = self._position.probability(self._positions(c), c, unigram)
        left = self._left.probability(c[:, :, :-1], c[:, :, 1:], unigram[:, :, 1:])
        upper = self._upper.probability(c[:, :-1], c[:, 1:], unigram[:, 1:])
        bigram = unigram.copy()
        bigram[:, 0, 1:] = left[:, 0]
        bigram[:, 1:, 0] = upper[:, :, 0]
        bigram[:, 1:, 1:] = (left[:, 1:] + upper[:, :, 1:]) / 2
        found = zip(NAMES, (uniform, unigram, position, bigram), strict=True)
        return {name: -np.log(probability).sum(axis=(1, 2)) for name, probability in found}

    def draw(self, n: int, *, seed: int = 0, first: int = 0) -> Codes:
        """(n, h, w) codes from the per-position unigram; map i depends on (seed, first + i) alone.

        The smoothed distribution is a mixture, so it is drawn as one: with the mass of its counts the code of a
        random training image at that position, else one of the unigram, else any code.
        """
        images, (h, w) = len(self._training), self.shape
        positions = self._positions(self._training[:1])[0]
        own = self._position.share(positions)
        common = float(self._unigram.share(np.zeros(1, np.int64))[0])
        flat = self._training.reshape(images, -1)
        maps = []
        for number in range(first, first + n):
            generator = np.random.Generator(np.random.PCG64([seed, number]))
            here = np.take_along_axis(flat, generator.integers(images, size=(1, h * w)), 0).reshape(h, w)
            anywhere = flat.ravel()[generator.integers(flat.size, size=(h, w))]
            anything = generator.integers(self.num_codes, size=(h, w))
            chance = generator.random((2, h, w))
            rest = np.where(chance[1] < common, anywhere, anything)
            maps.append(np.where(chance[0] < own, here, rest))
        return np.stack(maps).astype(np.int64)

    def _positions(self, codes: NDArray[Any]) -> Codes:
        h, w = self.shape
        return np.broadcast_to(np.arange(h * w).reshape(h, w), codes.shape).astype(np.int64)


# A prior over a split ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorLikelihood:
    """What a prior says of a split's codes, and of its images."""

    tokens: int
    """Per image."""
    num_codes: int
    pixels: int
    evidence: str
    """What the tokenizer's likelihood is called: see `vaedist.evaluation.metrics.likelihood`."""
    rows: list[dict[str, float]]
    """Of each image, in nats: `prior`, the baselines by name, and `decoder` = -log p(x | c)."""

    def document(self) -> dict[str, Any]:
        """JSON values: nats per token of the prior and of each baseline, and of the image where defined."""
        names = [name for name in self.rows[0] if name != "decoder"]
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "codes": self.num_codes,
            "images": len(self.rows),
            "nats_per_token": summaries(
                {name: row[name] / self.tokens for name in names} for row in self.rows
            ),
            "nll": None,
            "bits_per_dim": None,
            "name": self.evidence,
            "meaning": MEANINGS[self.evidence],
            "not_defined": {},
        }
        if self.evidence == "surrogate":
            found["not_defined"]["image"] = (
                "image bits/dim is not defined, because the tokenizer's likelihood of images is a surrogate"
            )
            return found
        total = [row["prior"] + row["decoder"] for row in self.rows]
        found["nll"] = summary(total)
        found["bits_per_dim"] = summary(bits_per_dim(nats, self.pixels) for nats in total)
        return found


@torch.no_grad()
def training_codes(model: Variant, batches: Iterable[Batch]) -> Codes:
    """(N, h, w): the codes of every image of `batches`."""
    parts = [as_numpy(with_codes(model, batch)["codes"]) for batch in map(without_padding, batches)]
    return np.concatenate(parts).astype(np.int64)


@torch.no_grad()
def measure_prior(
    model: Variant,
    batches: Iterable[Batch],
    baselines: TokenBaselines | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PriorLikelihood:
    """Nats of every image's codes under the prior and the baselines, and of the image given them.

    Args:
        model: With `reads == "codes"`, `codes` and `decode_codes`, in evaluation mode, on the device of the batches.
        batches: Of images, with `label`, `key`, `sample`; rows where `mask` is False are left out.
        baselines: Fitted on the training codes of the same tokenizer.
        seed, step: Of noise that `forward` may draw, and of the dequantisation.
        progress: Called with the number of images done.

    Raises:
        NotDefined: the model reads no codes, or there is no image.
    """
    if model.reads != "codes":
        raise model.not_defined("nats per token")
    rows: list[dict[str, float]] = []
    bilevel = True
    for batch in images_of(batches, progress):
        image = batch["image"]
        ctx = SampleContext(seed=seed, samples=batch["sample"], step=step, device=image.device)
        coded = with_codes(model, batch)
        codes = coded["codes"]
        columns = {"prior": model(coded, ctx)["loss"].double().tolist()}
        if baselines is not None:
            columns |= {name: nats.tolist() for name, nats in baselines.nats(as_numpy(codes)).items()}
        decoded = model.decode_codes(codes)
        nats = -log_likelihood(decoded, image, functools.partial(ctx.uniform, "dequantise", image.shape))
        columns["decoder"] = nats.double().tolist()
        check_finite("likelihood", batch, np.isfinite(np.add(columns["prior"], columns["decoder"])))
        bilevel = bilevel and black_and_white(image)
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not rows:
        raise NotDefined("nats per token are not defined, because there is no image")
    name = likelihood_name(decoded, bilevel)
    return PriorLikelihood(codes[0].numel(), model.num_codes, model.spec.pixels, name, rows)
