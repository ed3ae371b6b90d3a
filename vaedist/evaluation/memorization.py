"""Does a model repeat its training images? With medical scans this is a question of privacy, not of taste.

Distances from an image to its nearest training image are measured for samples and, as the measure of what is natural,
for held-out images: in pixels (root mean square difference on the [0, 1] scale) and in an extractor's features
(root mean square difference per feature). Three comparisons, each in both spaces:

- **close**: the share of samples that are nearer to a training image than the 1st percentile of held-out images
  (`level`). An honest model gives about 1 %, a copying one much more.
- **close to one**: the same for the ratio of the distances to the nearest training image and to the nearest one
  of *another* patient (without patients: to the second nearest image). A blurred sample lies near to many
  images, so `close` alone accuses it wrongly; a copy is near to one patient only.
- **whole patients**: `close` with held-out images replaced by training patients. Training patients are cut into parts
  of about the size of the held-out set, never within a patient; the images of one part play the held-out ones,
  and they and the samples are measured against the other parts. Few held-out patients may be odd ones;
  how much `level` and share vary over parts shows it.

The verdict is `flagged` where, in one space, both shares and the mean over the parts exceed what chance gives. Were
samples and held-out images draws of one law, the share of n samples below the j-th smallest of m held-out distances
would be Beta-binomial(n, j, m + 1 - j) / n, whatever the law; its 99 % point is the limit. For 1,000 samples
that is 3.2 % with 263 held-out images and 1.8 % with 10,000: smaller shares of copies are not told from chance. The
interval beside each share is Wilson's, 95 %, for the draw of samples alone. Slices of one patient are not
independent draws: read the limit beside the spread over parts.

`clear` is no proof: a copy that is shifted, mirrored or recoloured is far in pixels and may be far in features.

After Meehan, Chaudhuri, Dasgupta: A non-parametric test to detect data-copying in generative models (2020), for
the held-out set as the measure; Carlini et al.: Extracting training data from diffusion models (2023), for the ratio;
Wilson: Probable inference (1927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError
from vaedist.core.imaging import Pixels, channels_last, figure, figure_png
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.nearest_neighbors import Distances, Numbers, nearest_two

PERCENTILE = 0.01
MOST_PARTS = 10
MOST_PLAYING = 2000
"""Training images that play held-out ones, over all parts, at most: all pairs of a large set cost too much."""
SHOWN_PAIRS = 8
_DRAWS = 20_000


@dataclass(frozen=True)
class Share:
    """A share of samples below a level set by other images."""

    share: float
    interval: tuple[float, float]
    """Wilson, 95 %, for the draw of samples."""
    level: float
    limit: float
    """The largest share that chance gives, 99 %."""

    @property
    def exceeds(self) -> bool:
        return self.share > self.limit

    def document(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "interval": list(self.interval),
            "level": self.level,
            "limit": self.limit,
            "exceeds": self.exceeds,
        }


@dataclass(frozen=True)
class WholePatients:
    """`close` against each part of the training patients."""

    parts: tuple[Share, ...]
    limit: float
    """The largest mean over parts that chance gives, 99 %."""

    @property
    def mean(self) -> float:
        return sum(part.share for part in self.parts) / len(self.parts)

    @property
    def exceeds(self) -> bool:
        return self.mean > self.limit

    def document(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "limit": self.limit,
            "exceeds": self.exceeds,
            "parts": [part.document() for part in self.parts],
        }


@dataclass(frozen=True)
class SpaceAudit:
    """One space's findings."""

    name: str
    """`pixels`, or the extractor's label."""
    samples: Distances
    """(n,) to the nearest training image."""
    held_out: Distances
    """(m,)."""
    nearest: Numbers
    """(n,) number of each sample's nearest training image."""
    other: Distances
    """(n,) to the nearest training image of another patient; infinite where all are one patient's."""
    close: Share
    close_to_one: Share | None
    """None where all training images are one patient's."""
    whole_patients: WholePatients | None
    """None where the patients make fewer than two parts."""

    @property
    def flagged(self) -> bool:
        others = (self.close_to_one, self.whole_patients)
        return self.close.exceeds and all(other is None or other.exceeds for other in others)

    def document(self) -> dict[str, Any]:
        spread = (0, 1, 5, 25, 50, 75, 95, 99, 100)

        def percentiles(values: Distances) -> dict[str, float]:
            return {str(p): float(v) for p, v in zip(spread, np.percentile(values, spread), strict=True)}

        return {
            "flagged": self.flagged,
            "close": self.close.document(),
            "close_to_one": None if self.close_to_one is None else self.close_to_one.document(),
            "whole_patients": None if self.whole_patients is None else self.whole_patients.document(),
            "distance_percentiles": {
                "samples": percentiles(self.samples),
                "held_out": percentiles(self.held_out),
            },
        }


@dataclass(frozen=True)
class ClosestPair:
    """A sample and its nearest training image."""

    sample: int
    train: int
    key: str
    """The training image's, where keys were given."""
    space: str
    distance: float
    ratio: float
    """To the distance of the nearest image of another patient."""


@dataclass(frozen=True)
class Audit:
    """What `audit` found."""

    spaces: dict[str, SpaceAudit]
    pairs: tuple[ClosestPair, ...]
    """The closest ones, half of them by pixels, half by features; every training image once in each half."""
    counts: dict[str, int]
    """Of samples, training images, held-out images and (0: not given) training patients."""
    picture: bytes
    """A PNG: the distances' distributions, and the pairs. It shows training images: as private as they are."""

    @property
    def flagged(self) -> bool:
        return any(space.flagged for space in self.spaces.values())

    @property
    def verdict(self) -> str:
        """One sentence."""
        for space in self.spaces.values():
            if space.flagged:
                return (
                    f"flagged: {_percent(space.close)} of samples are closer to a training image than all but "
                    f"{PERCENTILE:.0%} of held-out images ({space.name}); look at the pairs before you share anything"
                )
        for space in self.spaces.values():
            if space.close.exceeds:
                return (
                    f"not flagged: {_percent(space.close)} of samples are closer to training images than all but "
                    f"{PERCENTILE:.0%} of held-out images ({space.name}), but not to single ones, as smooth samples are"
                )
        return "clear: samples are no closer to training images than held-out images are"

    def document(self) -> dict[str, Any]:
        """Everything but the picture, as JSON values."""
        return {
            "flagged": self.flagged,
            "verdict": self.verdict,
            "counts": self.counts,
            "spaces": {name: space.document() for name, space in self.spaces.items()},
            "pairs": [
                {**vars(pair), "ratio": pair.ratio if math.isfinite(pair.ratio) else None}
                for pair in self.pairs
            ],
        }


def audit(
    samples: Pixels,
    train: Pixels,
    held_out: Pixels,
    features: Extractor,
    *,
    groups: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    seed: int = 0,
) -> Audit:
    """Compare samples with training images, by the measure of held-out ones.

    Args:
        samples: uint8 (n, C, H, W).
        train: uint8 (N, C, H, W): all images that the model was trained on.
        held_out: uint8 (m, C, H, W), never trained on: the test split, of other patients.
        features: The extractor of the second space.
        groups: Patient of each training image. Without them every image stands for itself.
        keys: Name of each training image, for the list of pairs.
        seed: Of the cut into parts and of the chance limits.

    Raises:
        UserError: there are too few images for a comparison.
    """
    for what, images, least in (("samples", samples, 1), ("training", train, 2), ("held-out", held_out, 2)):
        if len(images) < least:
            raise UserError(f"the memorisation audit needs at least {least} {what} images, not {len(images)}")
    assert samples.shape[1:] == train.shape[1:] == held_out.shape[1:]
    assert all(names is None or len(names) == len(train) for names in (groups, keys))
    patients = np.arange(len(train)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    parts = partition_patients(patients, len(held_out), seed)
    vectors: dict[str, Callable[[Pixels], NDArray[Any]]] = {
        "pixels": lambda images: images.reshape(len(images), -1),
        features.label: lambda images: features(images).values,
    }
    spaces = {
        name: _space(name, vector(samples), vector(train), vector(held_out), patients, parts, seed)
        for name, vector in vectors.items()
    }
    pairs = _pairs(spaces, keys)
    heading = f"{len(samples)} samples, {len(train)} training images, {len(held_out)} held out"
    return Audit(
        spaces=spaces,
        pairs=pairs,
        counts={
            "samples": len(samples),
            "train": len(train),
            "held_out": len(held_out),
            "patients": 0 if groups is None else len(set(groups)),
        },
        picture=_picture(spaces, pairs, samples, train, heading),
    )


def partition_patients(patients: Numbers, size: int, seed: int) -> Numbers:
    """Part of each training image: whole patients, in random order, until a part has `size` images.

    At most 10 parts; what remains joins the last, -1, which plays no held-out set but is always measured against.

    Args:
        patients: (N,) patient number of each image.
        size: Images that a part should have.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    counts = np.bincount(patients)
    of_patient = np.full(len(counts), -1, np.intp)
    part, filled = 0, 0
    for patient in rng.permutation(len(counts)):
        # A part takes another patient if that brings it nearer to its size.
        if filled and filled + counts[patient] / 2 > size:
            part, filled = part + 1, 0
        if part == MOST_PARTS:
            break
        of_patient[patient] = part
        filled += counts[patient]
    if filled < size / 2:
        of_patient[of_patient == part] = -1
    return of_patient[patients]


def _space(
    name: str,
    samples: NDArray[Any],
    train: NDArray[Any],
    held_out: NDArray[Any],
    patients: Numbers,
    parts: Numbers,
    seed: int,
) -> SpaceAudit:
    rng = np.random.Generator(np.random.PCG64(seed))
    (near, nearest), (other, _) = nearest_two(samples, train, patients)
    (natural, _), (natural_other, _) = nearest_two(held_out, train, patients)
    single = not np.isfinite(other).all()
    return SpaceAudit(
        name=name,
        samples=near,
        held_out=natural,
        nearest=nearest,
        other=other,
        close=share_below(near, natural, rng),
        close_to_one=None
        if single
        else share_below(_ratio(near, other), _ratio(natural, natural_other), rng),
        whole_patients=_whole_patients(samples, train, parts, rng),
    )


def _whole_patients(
    samples: NDArray[Any], train: NDArray[Any], parts: Numbers, rng: np.random.Generator
) -> WholePatients | None:
    """`close` with each part of the training images as the held-out ones, against all that are not of that part."""
    number = parts.max() + 1
    if len(np.unique(parts)) < 2:
        return None
    playing = [np.flatnonzero(parts == part) for part in range(number)]
    playing = [rng.permutation(rows)[: max(2, MOST_PLAYING // number)] for rows in playing]
    (near, at), (other, _) = nearest_two(samples, train, parts)
    # Each finds itself first, or its equal in another part.
    (own, own_at), (own_other, _) = nearest_two(train[np.concatenate(playing)], train, parts)
    found, begin = [], 0
    for part, rows in enumerate(playing):
        mine = slice(begin, begin + len(rows))
        natural = np.where(parts[own_at[mine]] == part, own_other[mine], own[mine])
        found.append(share_below(np.where(parts[at] == part, other, near), natural, rng))
        begin += len(rows)
    chance = np.mean([_chance(len(samples), len(rows), rng) for rows in playing], axis=0)
    return WholePatients(tuple(found), float(np.quantile(chance, 0.99)))


def _ratio(near: Distances, other: Distances) -> Distances:
    """near / other in [0, 1]; 1 where both are 0: equal to images of several patients, so to no single one."""
    return np.divide(near, other, out=np.ones_like(near), where=other > 0)


def share_below(samples: Distances, natural: Distances, rng: np.random.Generator) -> Share:
    """The share of `samples` below the 1st percentile of `natural`.

    The percentile is the order statistic number 0.01 (m + 1), interpolated; the smallest value where m < 99.
    """
    count, others = len(samples), len(natural)
    level = float(np.quantile(natural, PERCENTILE, method="weibull"))
    below = int((samples < level).sum())
    limit = float(np.quantile(_chance(count, others, rng), 0.99))
    return Share(below / count, wilson_interval(below, count), level, limit)


def _chance(count: int, others: int, rng: np.random.Generator) -> Distances:
    """Draws of the share of `count` samples below the 1st percentile of `others` images of the same law."""
    order = max(1.0, PERCENTILE * (others + 1))
    return rng.binomial(count, rng.beta(order, others + 1 - order, _DRAWS)) / count


def wilson_interval(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default."""
    share, z2 = successes / count, z * z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _percent(share: Share) -> str:
    return f"{share.share:.1%} ({share.interval[0]:.1%} to {share.interval[1]:.1%})"


def _pairs(spaces: dict[str, SpaceAudit], keys: Sequence[str] | None) -> tuple[ClosestPair, ...]:
    """The closest of each space, every training image once, so that one plain image does not fill the picture."""
    found = []
    for name, space in spaces.items():
        seen: set[int] = set()
        for i in np.argsort(space.samples, kind="stable").tolist():
            train = int(space.nearest[i])
            if train not in seen:
                seen.add(train)
                ratio = float(_ratio(space.samples[i : i + 1], space.other[i : i + 1])[0])
                key = "" if keys is None else keys[train]
                found.append(ClosestPair(i, train, key, name, float(space.samples[i]), ratio))
            if len(seen) == SHOWN_PAIRS // 2:
                break
    return tuple(found)


def _picture(
    spaces: dict[str, SpaceAudit],
    pairs: tuple[ClosestPair, ...],
    samples: Pixels,
    train: Pixels,
    heading: str,
) -> bytes:
    """A PNG: above, both spaces' distances; below, the closest pairs with their differences."""
    sheet = figure(figsize=(1.5 * len(pairs) + 0.8, 7.4), dpi=100, layout="constrained")
    halves: Any = sheet.subfigures(2, 1, height_ratios=(2.3, 5))
    above, below = halves
    for axis, space in zip(above.subplots(1, len(spaces)), spaces.values(), strict=True):
        edges = np.linspace(0, max(space.samples.max(), space.held_out.max(), 1e-9), 41)
        for values, label in ((space.held_out, "held out"), (space.samples, "samples")):
            axis.hist(values, edges, weights=np.full(len(values), 1 / len(values)), alpha=0.55, label=label)
        axis.axvline(space.close.level, color="black", lw=1, ls="--", label="1 % of held out")
        state = "FLAGGED" if space.flagged else "not flagged"
        axis.set_title(f"{space.name}: {_percent(space.close)} below, {state}", fontsize=8)
        axis.set_xlabel("distance to the nearest training image", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    axes = below.subplots(3, len(pairs), squeeze=False)
    for column, pair in zip(axes.T, pairs, strict=True):
        shown, source = samples[pair.sample], train[pair.train]
        gap = np.abs(shown.astype(np.int16) - source).astype(np.uint8)
        for axis, image in zip(column, channels_last(np.stack([shown, source, gap])), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        column[0].set_title(f"{pair.space}\n{pair.distance:.4f}, ratio {pair.ratio:.2f}", fontsize=7)
        column[1].set_title(pair.key[:20], fontsize=6)
    for axis, name in zip(axes[:, 0], ("sample", "training image", "difference"), strict=True):
        axis.set_ylabel(name, fontsize=8)
    sheet.suptitle(heading, fontsize=9)
    return figure_png(sheet)
