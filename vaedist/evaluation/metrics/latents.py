"""What a model's latents look like over a whole split: which units are used, and how near the prior they lie together.

The aggregate posterior of N images is the mixture q(z) = 1/N sum_n q(z | x_n). Numbers of it need the whole split: a
batch mean of them is another, biased, number.

| number | definition |
|---|---|
| active units | whose posterior mean has a variance over images above 0.01, and that carry above 0.005 nats |
| KL by dimension | mean over images of KL(q(z_j given x) from p(z_j)): their sum is the rate |
| moments | of one draw per image, in units of the prior (z - m) / s: per dimension 0 and 1 are right |
| MMD | unbiased, multi-scale inverse multiquadratic, between those draws and as many from the prior |

Active units: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders" (2016), section 5. With a prior per class
a mean varies although the image adds nothing, so the rate counts as well. A unit of a map is one channel: its variance
is that of the position where it is largest, its rate the sum over positions. Beside the MMD stands its spread between
two sets of prior draws: its value where there is no difference.

The split of the rate. With z_n drawn from q(z | x_n), and q(z_j) the marginals of q(z),

    E KL(q(z|x) || p(z)) = I(x; z)              mutual information of image and latent
                         + KL(q(z) || p(z))     = total correlation  KL(q(z) || prod q(z_j))
                                                + dimension-wise KL  sum_j KL(q(z_j) || p(z_j))

Hoffman and Johnson, "ELBO surgery" (2016); Chen et al., "Isolating sources of disentanglement in VAEs" (2018), eq. 2.
Each is a mean over the same draws, so the parts add up exactly. q(z) is the mixture over all N images, not an
estimate from a batch; the mutual information it can show is therefore at most log N, which is printed beside it.

Where the prior depends on the class, so does q(z): the mixture runs over the images of the same class, and all
numbers are means over images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vaedist.core.context import Batch, SampleContext, generator
from vaedist.core.errors import NotDefined
from vaedist.evaluation.metrics.per_image import images_of
from vaedist.models.contract import Prior, Variant
from vaedist.nets.divergences import mmd

ACTIVE_VARIANCE = 0.01
ACTIVE_KL = ACTIVE_VARIANCE / 2
_SPLIT_WORK = 1_000_000_000
"""Most N * N * D terms of the split's mixtures; of a larger split every n-th image is taken."""
_CHUNK_TERMS = 1 << 18  # of fp64: they stay in a core's cache
_SPLIT_DRAWS = 1000
"""Draws that the split's means are of, at least: of fewer images several each."""
_MMD_ROWS = 1000
_MMD_REPEATS = 3
_LARGEST_CORRELATION = 2048


@dataclass(frozen=True)
class Latents:
    """Posteriors of N images over D latent numbers (maps are flattened), on the CPU."""

    mean: Tensor
    """(N, D)."""
    log_variance: Tensor | None
    """(N, D); None where the encoder is deterministic."""
    samples: Tensor
    """(N, D): one draw from each posterior."""
    prior_mean: Tensor
    """(N, D): of p(z), or of p(z | y) of each image's class."""
    prior_log_variance: Tensor
    labels: Tensor
    """(N,) int64."""
    keys: list[str]
    shape: tuple[int, ...]
    """Of one latent: (D,) or (D, h, w)."""

    def every(self, step: int) -> Latents:
        """Every n-th image."""
        of_images = {
            name: value for name, value in vars(self).items() if name != "shape" and value is not None
        }
        return replace(self, **{name: value[::step] for name, value in of_images.items()})

    def whitened(self) -> Tensor:
        """(N, D) draws in units of the prior: (z - m) / s, fp64."""
        centered = self.samples.double() - self.prior_mean.double()
        return centered * (-self.prior_log_variance.double() / 2).exp()

    def kl(self) -> Tensor:
        """(D,) mean KL of the posteriors from the prior by dimension, in nats."""
        if self.log_variance is None:
            raise NotDefined(_DETERMINISTIC)
        mean, log_variance = self.mean.double(), self.log_variance.double()
        other_mean, other = self.prior_mean.double(), self.prior_log_variance.double()
        spread = (log_variance - other).exp() + (mean - other_mean).square() * (-other).exp()
        return ((spread - 1 - log_variance + other) / 2).mean(0)


_DETERMINISTIC = "the rate is not defined, because the encoder is deterministic: its posterior has no density"


@torch.no_grad()
def collect_latents(
    model: Variant,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Latents:
    """The posterior of every image of `batches`, each once, and one draw from it.

    Args:
        model: In evaluation mode, on the device of the batches.
        batches: With `image`, `label`, `key`, `sample`; rows where `mask` is False are left out.
        seed: Of the draws: the noise of `forward` in evaluation, per (seed, sample).
        progress: Called with the number of images done.

    Raises:
        NotDefined: the variant has no posterior or prior over numbers, or there is no image.
    """
    if model.latent not in ("vector", "map"):
        raise model.not_defined("encode")
    parts: list[tuple[Tensor, ...]] = []
    keys: list[str] = []
    shape: tuple[int, ...] = ()
    deterministic = False
    for batch in images_of(batches, progress):
        label = batch["label"] if model.conditional else None
        posterior = model.encode(batch["image"], label)
        ctx = SampleContext(seed=seed, samples=batch["sample"], device=batch["image"].device)
        shape = tuple(posterior.mean.shape[1:])
        samples = posterior.sample(ctx.noise("z", posterior.mean.shape))
        log_variance = getattr(posterior, "log_variance", None)
        deterministic = log_variance is None
        columns = (
            posterior.mean,
            samples if log_variance is None else log_variance,
            samples,
            *_diagonal(model.prior(label), samples),
            batch["label"][:, None],
        )
        parts.append(tuple(column.flatten(1).cpu() for column in columns))
        keys += batch["key"]
    if not keys:
        raise NotDefined("latents are not defined, because there is no image")
    mean, variances, samples, prior_mean, prior_variances, labels = map(torch.cat, zip(*parts, strict=True))
    posterior_variances = None if deterministic else variances
    return Latents(
        mean, posterior_variances, samples, prior_mean, prior_variances, labels.flatten(), keys, shape
    )


def _diagonal(prior: Prior, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of a prior, for each row of `like`."""
    try:
        mean, log_variance = prior.mean, prior.log_variance  # type: ignore[attr-defined]
    except AttributeError:
        raise NotDefined(
            "numbers of the aggregate posterior are not defined, because the prior is not a diagonal Gaussian"
        ) from None
    return mean.expand_as(like), log_variance.expand_as(like)


# Numbers -----------------------------------------------------------------------------------------------------


def by_unit(variance: Tensor, kl: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both for each unit: of maps (D, h, w) the largest variance and the summed KL of each channel."""
    if variance.ndim == 1:
        return variance, kl
    return variance.flatten(1).amax(1), None if kl is None else kl.flatten(1).sum(1)


def is_active(variance: Tensor, kl: Tensor | None) -> Tensor:
    """(U,) bool of `by_unit`'s numbers: which units say something."""
    varies = variance > ACTIVE_VARIANCE
    return varies if kl is None else varies & (kl > ACTIVE_KL)


def active_units(latents: Latents) -> tuple[int, int]:
    """How many units say something, and how many there are."""
    variance = latents.mean.double().var(0, correction=0).view(latents.shape)
    kl = None if latents.log_variance is None else latents.kl().view(latents.shape)
    says = is_active(*by_unit(variance, kl))
    return int(says.sum()), len(says)


def latent_statistics(latents: Latents, *, seed: int = 0, classes: bool = False) -> dict[str, Any]:
    """Every number of the module's table, as JSON values.

    Args:
        latents: Of a split.
        seed: Of the prior draws that the MMD compares with, and of more draws where the images are few.
        classes: The prior and the decoder know the class: the mixtures of the split are those of each class.
    """
    active, units = active_units(latents)
    found: dict[str, Any] = {
        "images": len(latents.mean),
        "shape": list(latents.shape),
        "active_units": active,
        "units": units,
        **_moments(latents.whitened()),
        **_mmd(latents, seed),
    }
    if latents.log_variance is None:
        return {**found, "not_defined": {"rate": _DETERMINISTIC}}
    kl = latents.kl()
    found["kl_by_dimension"] = kl.tolist()
    if len(latents.mean) > 1:
        found["split"] = rate_split(latents, seed=seed, classes=classes)
    return found


def _moments(whitened: Tensor) -> dict[str, float]:
    """Of (N, D) draws that should be standard normal."""
    mean, std = whitened.mean(0), whitened.std(0, correction=0)
    found = {
        "mean_rms": float(mean.square().mean().sqrt()),
        "std_smallest": float(std.min()),
        "std_mean": float(std.mean()),
        "std_largest": float(std.max()),
    }
    dimensions = whitened.shape[1]
    if 1 < dimensions <= _LARGEST_CORRELATION:
        correlation = torch.corrcoef(whitened.T).nan_to_num(0.0)
        off = correlation - correlation.diagonal().diag()
        found["correlation_largest"] = float(off.abs().max())
    return found


def _mmd(latents: Latents, seed: int) -> dict[str, float]:
    step = -(-len(latents.mean) // _MMD_ROWS)
    drawn = latents.every(step).whitened().float()
    if len(drawn) < 2:
        return {}

    def prior(number: int) -> Tensor:
        return torch.randn(drawn.shape, generator=generator("aggregate", seed, number))

    same = [float(mmd(prior(2 * i + 1), prior(2 * i + 2))) for i in range(_MMD_REPEATS)]
    return {
        "mmd": float(mmd(drawn, prior(0))),
        "mmd_prior_spread": math.sqrt(math.fsum(value**2 for value in same) / len(same)),
        "mmd_draws": len(drawn),
    }


def rate_split(latents: Latents, *, seed: int = 0, classes: bool = False) -> dict[str, float | int]:
    """The rate of the latents' draws and its parts, in nats per image; see the module.

    Returns:
        `rate` = `mutual_information` + `total_correlation` + `dimension_wise_kl`, `marginal_kl` = the last two,
        `mutual_information_limit` (log N) and `images`.

    Raises:
        NotDefined: the encoder is deterministic.
    """
    if latents.log_variance is None:
        raise NotDefined(_DETERMINISTIC)
    count, dimensions = latents.mean.shape
    part = latents.every(max(1, math.ceil(count * math.sqrt(dimensions / _SPLIT_WORK))))
    assert part.log_variance is not None
    labels = part.labels if classes else torch.zeros_like(part.labels)
    rounds = -(-_SPLIT_DRAWS // len(labels))
    sums = dict.fromkeys(("own", "joint", "marginals", "prior"), 0.0)
    limit = 0.0
    for label in labels.unique():
        rows = labels == label
        mean, log_variance = (x[rows].double() for x in (part.mean, part.log_variance))
        priors = (part.prior_mean[rows].double(), part.prior_log_variance[rows].double())
        limit += len(mean) * math.log(len(mean)) / len(labels)
        for number in range(rounds):
            z = part.samples[rows].double()
            if number:  # one draw of each of few images would say little
                draw = generator("rate split", seed, int(label), number)
                z = mean + (log_variance / 2).exp() * torch.randn(z.shape, generator=draw, dtype=z.dtype)
            joint, marginals = _mixture(z, mean, log_variance)
            sums["own"] += float(_log_normal(z, mean, log_variance).sum())
            sums["joint"] += float(joint.sum())
            sums["marginals"] += float(marginals.sum())
            sums["prior"] += float(_log_normal(z, *priors).sum())
    own, joint_mean, marginals_mean, prior_mean = (total / (rounds * len(labels)) for total in sums.values())
    return {
        "rate": own - prior_mean,
        "mutual_information": own - joint_mean,
        "marginal_kl": joint_mean - prior_mean,
        "total_correlation": joint_mean - marginals_mean,
        "dimension_wise_kl": marginals_mean - prior_mean,
        "mutual_information_limit": limit,
        "images": len(labels),
    }


def _log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(z; mean, exp(log_variance)) by element."""
    square = (z - mean).square() * (-log_variance).exp()
    return -0.5 * (square + log_variance + math.log(2 * math.pi))


def _mixture(z: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) log q(z) and (M,) sum_j log q(z_j) under the mixture of N equal diagonal Gaussians."""
    count, dimensions = mean.shape
    precision = (-log_variance).exp().mul_(-0.5)
    constant = -0.5 * (log_variance + math.log(2 * math.pi)) - math.log(count)
    joint, marginals = [], []
    for part in z.split(max(1, _CHUNK_TERMS // (count * dimensions))):
        # log 1/N N(z_j; mean_nj, s_nj^2), (m, N, D), in place: this is where the time goes.
        terms = (part[:, None] - mean).square_().mul_(precision).add_(constant)
        joint.append((terms.sum(2) + (dimensions - 1) * math.log(count)).logsumexp(1))
        top = terms.amax(1)
        marginals.append((terms.sub_(top[:, None]).exp_().sum(1).log_() + top).sum(1))
    return torch.cat(joint), torch.cat(marginals)
