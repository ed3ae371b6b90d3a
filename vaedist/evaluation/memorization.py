"""Does a model repeat its training images? With medical scans this is a question of privacy, not of taste.

Distances from an image to its nearest training image are measured for samples and, as the measure of what is natural,
for held-out images: in pixels (root mean square difference on the [0, 1] scale) and in an extractor's features
(root mean square difference per feature). Three comparisons, each in both spaces:

- **close**: the share of samples that are nearer to a training image than the 1st percentile of held-out images
  (`level`). An honest model gives about 1 %, a copying one much more.
- **close to one**: the same for the ratio of the distances to the nearest training image and to the nearest one
  of *another* patient (without patients: to the second nearest image). A blurred sample lies near to many
  images, so `close` alone accuses it wrongly; a copy is near to one patient only.
- **whole patients**: `close`, with training patients in place of held-out images. Training patients are cut into
  parts of about the size of the held-out set, never within a patient. The images of one part take the place of the
  held-out images; they and the samples are measured against the other parts. Few held-out patients may be unusual;
  the spread of `level` and share over parts shows how much that matters.

The verdict is `flagged` where, in one space, both shares and the mean over the parts exceed what chance gives. If
samples and held-out images follow one law, the share of n samples below the j-th smallest of m held-out distances
is Beta-binomial(n, j, m + 1 - j) / n, whatever the law; its 99 % point is the limit. For 1,000 samples
that is 3.2 % with 263 held-out images and 1.8 % with 10,000: smaller shares of copies do not differ from chance. The
interval beside each share is Wilson's, 95 %, for the draw of samples alone. Slices of one patient are not
independent draws: read the limit beside the spread over parts.

`clear` is no proof: a copy that is shifted, mirrored or recolored is far in pixels and may be far in features.

After Meehan, Chaudhuri, Dasgupta: A non-parametric test to detect data-copying in generative models (2020), for
the held-out set as the measure; Carlini et al.: Extracting training data from diffusion models (2023), for the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.core.errors import UserError
from vaedist.core.imaging import Pixels
from vaedist.evaluation.metrics.features import Extractor
from vaedist.evaluation.metrics.nearest_neighbors import Distances, Numbers, nearest_two
from vaedist.evaluation.metrics.shares import PERCENTILE, Share, chance_shares, share_below

MOST_PARTS = 10
MOST_QUERIES = 2000
"""Training images in place of held-out ones, over all parts, at most: all pairs of a large set cost too much."""
SHOWN_PAIRS = 8


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
        points = (0, 1, 5, 25, 50, 75, 95, 99, 100)
        parts = {name: getattr(self, name) for name in ("close", "close_to_one", "whole_patients")}
        return {
            "flagged": self.flagged,
            **{name: None if part is None else part.document() for name, part in parts.items()},
            "distance_percentiles": {
                name: dict(zip(map(str, points), np.percentile(values, points).tolist(), strict=True))
                for name, values in (("samples", self.samples), ("held_out", self.held_out))
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
    """The result of `audit`."""

    spaces: dict[str, SpaceAudit]
    pairs: tuple[ClosestPair, ...]
    """The closest ones, half of them by pixels, half by features; every training image once in each half."""
    counts: dict[str, int]
    """Of samples, training images, held-out images and (0: not given) training patients."""

    @property
    def flagged(self) -> bool:
        return any(space.flagged for space in self.spaces.values())

    @property
    def verdict(self) -> str:
        """One sentence."""
        for space in self.spaces.values():
            if space.flagged:
                return (
                    f"flagged: {space.close} of samples are closer to a training image than all but "
                    f"{PERCENTILE:.0%} of held-out images ({space.name}); look at the pairs before you share anything"
                )
        for space in self.spaces.values():
            if space.close.exceeds:
                return (
                    f"not flagged: {space.close} of samples are closer to training images than all but "
                    f"{PERCENTILE:.0%} of held-out images ({space.name}), but not to single ones, as smooth samples are"
                )
        return "clear: samples are no closer to training images than held-out images are"

    def document(self) -> dict[str, Any]:
        """JSON values."""
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
        name: _audit_space(
            name, [vector(images) for images in (samples, train, held_out)], patients, parts, seed
        )
        for name, vector in vectors.items()
    }
    counts = {"samples": len(samples), "train": len(train), "held_out": len(held_out)}
    return Audit(
        spaces, _closest_pairs(spaces, keys), counts | {"patients": 0 if groups is None else len(set(groups))}
    )


def partition_patients(patients: Numbers, size: int, seed: int) -> Numbers:
    """Part of each training image: whole patients, in random order, until a part has `size` images.

    At most 10 parts; what remains joins the last, -1, which takes the place of no held-out set.

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


def _audit_space(
    name: str, vectors: Sequence[NDArray[Any]], patients: Numbers, parts: Numbers, seed: int
) -> SpaceAudit:
    """The comparisons in one space; `vectors` are those of samples, training and held-out images."""
    samples, train, held_out = vectors
    rng = np.random.Generator(np.random.PCG64(seed))
    (near, nearest), (other, _) = nearest_two(samples, train, patients)
    (natural, _), (natural_other, _) = nearest_two(held_out, train, patients)
    close, close_to_one = share_below(near, natural, rng), None
    if np.isfinite(other).all():
        close_to_one = share_below(_ratio(near, other), _ratio(natural, natural_other), rng)
    whole = _whole_patients(samples, train, parts, rng)
    return SpaceAudit(name, near, natural, nearest, other, close, close_to_one, whole)


def _whole_patients(
    samples: NDArray[Any], train: NDArray[Any], parts: Numbers, rng: np.random.Generator
) -> WholePatients | None:
    """`close` with each part of the training images as the held-out ones, against all that are not of that part."""
    number = parts.max() + 1
    if len(np.unique(parts)) < 2:
        return None
    queries = [np.flatnonzero(parts == part) for part in range(number)]
    queries = [rng.permutation(rows)[: max(2, MOST_QUERIES // number)] for rows in queries]
    (near, at), (other, _) = nearest_two(samples, train, parts)
    # Each finds itself first, or its equal in another part.
    (own, own_at), (own_other, _) = nearest_two(train[np.concatenate(queries)], train, parts)
    shares, start = [], 0
    for part, rows in enumerate(queries):
        mine = slice(start, start + len(rows))
        natural = np.where(parts[own_at[mine]] == part, own_other[mine], own[mine])
        shares.append(share_below(np.where(parts[at] == part, other, near), natural, rng))
        start += len(rows)
    chance = np.mean([chance_shares(len(samples), len(rows), rng) for rows in queries], axis=0)
    return WholePatients(tuple(shares), float(np.quantile(chance, 0.99)))


def _ratio(near: Distances, other: Distances) -> Distances:
    """near / other in [0, 1]; 1 where both are 0: equal to images of several patients, so to no single one."""
    return np.divide(near, other, out=np.ones_like(near), where=other > 0)


def _closest_pairs(spaces: dict[str, SpaceAudit], keys: Sequence[str] | None) -> tuple[ClosestPair, ...]:
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
