"""Likelihood of images under a model with a continuous latent: the importance-weighted estimate, and what it is worth.

    log p(x) >= E log 1/k sum_i p(x | z_i) p(z_i) / q(z_i | x),   z_1 ... z_k ~ q(z | x)

Burda, Grosse, Salakhutdinov: Importance weighted autoencoders (2016), eq. 8. k = 1 is the evidence bound (ELBO); the
bound rises with k and tends to log p(x). It stays a bound at every k: the negative log-likelihood (NLL) printed is an
upper bound in expectation. Two numbers show how tight it is: the ELBO from the same draws, and the effective number
of samples (sum w)^2 / sum w^2 of the k weights w; near 1, one draw has almost all the weight.

What the number means depends on what the likelihood's `log_prob` is (its `evidence`), not on the variant:

| evidence | images | name | bits/dim |
|---|---|---|---|
| `discrete` | any | `discrete`: log-probability of the stored bytes | NLL / (P ln 2) |
| `binary` | every value 0 or 255 | `binary`: log-probability of black-and-white images | NLL / (P ln 2) |
| `density` | any | `dequantised`: with a uniform draw in each value's cell, a bound on the discrete one | the same |
| `binary` | gray | `surrogate`: a score, no probability of anything that was measured | not defined |
| none, or `surrogate` | any | `surrogate` | not defined |

P = C*H*W. Theis, van den Oord, Bethge: A note on the evaluation of generative models (2016), section 3.1, for the
dequantization. A comparison never puts numbers of different names in one row, nor surrogates of different
likelihoods.

Noise belongs to (seed, sample, number of the draw), in blocks of `BLOCK` draws: neither the batch, nor how many
draws are decoded at once, nor the number of draws asked for changes the i-th draw. The weights are kept in fp64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaedist.core.context import Batch, SampleContext
from vaedist.core.errors import NotDefined
from vaedist.evaluation.metrics.image_quality import summaries, summary
from vaedist.evaluation.metrics.per_image import check_finite, images_of
from vaedist.models.contract import Likelihood, Variant

BLOCK = 50
"""Importance samples whose noise comes from one generator."""
DRAWS = 200
_CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 20}
"""Pixel values decoded at once, where the caller does not say.

Four times as many take twice as long each on a CPU: see `vaedist.data.loading.inputs.rows_at_once`.
"""

MEANINGS = {
    "discrete": "log-probability of the stored bytes",
    "binary": "log-probability of black-and-white images",
    "dequantised": "bound on the log-probability of the stored bytes, by uniform dequantisation",
    "surrogate": "a score, not a likelihood",
}


# One batch ---------------------------------------------------------------------------------------------------


def black_and_white(image: Tensor) -> bool:
    """Whether every value of uint8 images is 0 or 255."""
    return bool(((image == 0) | (image == 255)).all())


def likelihood_name(decoded: Likelihood, bilevel: bool) -> str:
    """The name of what `log_likelihood` returns: see the module's table.

    Args:
        decoded: A likelihood of the model.
        bilevel: Whether the images are black and white.
    """
    evidence = getattr(decoded, "evidence", "surrogate")
    if evidence == "binary":
        return "binary" if bilevel else "surrogate"
    return {"density": "dequantised"}.get(evidence, evidence)


def log_likelihood(decoded: Likelihood, image: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """(B,) nats of uint8 images.

    Args:
        decoded: p(x | z) of each row.
        image: (B, C, H, W).
        uniform: Gives the dequantisation noise, (B, C, H, W) on [0, 1); only a density asks for it.
    """
    if getattr(decoded, "evidence", "surrogate") == "density":
        nats: Tensor = decoded.dequantized_log_prob(image, uniform())  # type: ignore[attr-defined]
        return nats
    return decoded.log_prob(image)


def importance_noise(
    ctx: SampleContext, shape: tuple[int, ...], start: int, stop: int, number: int = 0
) -> Tensor:
    """(B, stop - start, *shape) standard normal noise of the draws `start` to `stop`, whatever the blocks asked.

    Args:
        number: Of the round; each has its own noise.
    """
    rows, first = len(ctx.samples), start // BLOCK
    blocks = [
        ctx.noise(f"importance {number}", (rows, BLOCK, *shape), chunk=block)
        for block in range(first, -(-stop // BLOCK))
    ]
    return torch.cat(blocks, 1)[:, start - first * BLOCK : stop - first * BLOCK]


@torch.no_grad()
def log_weights(
    model: Variant,
    batch: Batch,
    *,
    draws: int,
    seed: int = 0,
    number: int = 0,
    chunk: int | None = None,
) -> tuple[Tensor, Likelihood]:
    """log p(x | z_i) p(z_i) / q(z_i | x) of each image and draw, and a likelihood of the model to ask its evidence.

    Args:
        model: In evaluation mode, on the device of the batch.
        batch: With `image`, `label`, `sample`.
        draws: k.
        seed, number: Of the noise, and of the round.
        chunk: Draws decoded at once, for all images of the batch; changes memory, not numbers.

    Returns:
        (B, k) fp64, and the last likelihood object.

    Raises:
        NotDefined: the model has no posterior, no prior or no decoder over numbers, or its posterior no density.
    """
    image = batch["image"]
    label = batch["label"] if model.conditional else None
    chunk = chunk or max(1, _CHUNK_VALUES[image.device.type] // image.numel())
    ctx = SampleContext(seed=seed, samples=batch["sample"], device=image.device)

    @functools.cache
    def uniform() -> Tensor:
        return ctx.uniform("dequantise", image.shape)

    posterior, prior = model.encode(image, label), model.prior(label)
    shape = tuple(posterior.mean.shape[1:])
    weights: list[Tensor] = []
    decoded: Likelihood | None = None
    for start in range(0, draws, chunk):
        noise = importance_noise(ctx, shape, start, min(start + chunk, draws), number)
        n = noise.shape[1]
        latents = [posterior.sample(noise[:, i]) for i in range(n)]
        ratio = torch.stack([(prior.log_prob(z) - posterior.log_prob(z)).double() for z in latents], 1)
        labels = None if label is None else label.repeat_interleave(n, 0)
        decoded = model.decode(torch.stack(latents, 1).flatten(0, 1), labels)

        def repeated_uniform(n: int = n) -> Tensor:
            return uniform().repeat_interleave(n, 0)

        nats = log_likelihood(decoded, image.repeat_interleave(n, 0), repeated_uniform)
        weights.append(nats.double().view(-1, n) + ratio)
    assert decoded is not None
    return torch.cat(weights, 1), decoded


def estimate(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From (B, k) log-weights, (B,) each: importance-weighted log p(x), ELBO, and effective number of samples."""
    total = weights.logsumexp(1)
    effective = (2 * total - (2 * weights).logsumexp(1)).exp()
    return total - math.log(weights.shape[1]), weights.mean(1), effective


# A split -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitLikelihood:
    """Likelihood of a split."""

    name: str
    """`discrete`, `binary`, `dequantised` or `surrogate`."""
    likelihood: str
    """Of which distribution: scores of different ones do not compare."""
    pixels: int
    draws: int
    rows: list[dict[str, float]]
    """Of each image, means over rounds: `nll`, `elbo` in nats, and `effective_samples`."""
    rounds: list[float]
    """Mean NLL of each round of draws."""

    def document(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {
            "name": self.name,
            "meaning": MEANINGS[self.name],
            "likelihood": self.likelihood,
            "importance_samples": self.draws,
            "images": len(self.rows),
            **summaries(self.rows),
            "rounds": summary(self.rounds) | {"nll": self.rounds},
            "bits_per_dim": None,
            "not_defined": {},
        }
        if self.name == "surrogate":
            found["not_defined"]["bits_per_dim"] = f"bits/dim is not defined, because {self.why()}"
        else:
            found["bits_per_dim"] = summary(bits_per_dim(row["nll"], self.pixels) for row in self.rows)
        return found

    def why(self) -> str:
        """Why a surrogate is one."""
        if self.likelihood == "bernoulli":
            return (
                "a Bernoulli likelihood of grey images is no probability of them: train with data.binarise, or "
                "with model.likelihood.kind=logistic"
            )
        return f"the likelihood {self.likelihood!r} does not say what its log_prob is the probability of"


def bits_per_dim(nats: float, pixels: int) -> float:
    """Bits per value from nats per image."""
    return nats / (pixels * math.log(2))


@torch.no_grad()
def measure_likelihood(
    model: Variant,
    batches: Iterable[Batch],
    *,
    draws: int = DRAWS,
    rounds: int = 1,
    seed: int = 0,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SplitLikelihood:
    """The importance-weighted likelihood of every image of `batches`, each once.

    Args:
        model: In evaluation mode, on the device of the batches.
        batches: With `image`, `label`, `sample`; rows where `mask` is False are left out.
        draws: Importance samples k of each image.
        rounds: Estimates with new noise each; their means' spread is the estimator's, not the model's.
        seed: Of the noise.
        chunk: Draws decoded at once; default: about a million pixel values.
        progress: Called with the number of images done.

    Raises:
        NotDefined: the model has no such likelihood, with the reason; or there is no image.
        UserError: a likelihood is not finite; the first such key is named.
    """
    rows: list[dict[str, float]] = []
    totals = [0.0] * rounds
    bilevel = True
    for batch in images_of(batches, progress):
        if "target" in batch:
            raise NotDefined(
                "the likelihood is not defined, because a denoiser is shown another image than the one it predicts"
            )
        bilevel = bilevel and black_and_white(batch["image"])
        columns: list[Tensor] = []
        for number in range(rounds):
            weights, decoded = log_weights(model, batch, draws=draws, seed=seed, number=number, chunk=chunk)
            bound, elbo, effective = estimate(weights)
            check_finite("likelihood", batch, bound.isfinite())
            columns.append(torch.stack([-bound, elbo, effective], 1))
            totals[number] += float(-bound.sum())
        means = torch.stack(columns).mean(0).tolist()
        rows += [dict(zip(("nll", "elbo", "effective_samples"), row, strict=True)) for row in means]
    if not rows:
        raise NotDefined("the likelihood is not defined, because there is no image")
    name, spread = likelihood_name(decoded, bilevel), [total / len(rows) for total in totals]
    return SplitLikelihood(name, decoded.name, model.spec.pixels, draws, rows, spread)
