"""What a model receives of an image: binarized, augmented, and for a denoiser with noise that it has to remove.

All of it happens on the device, on the uint8 images of the stream, in this order:

| setting | law, x = value / 255 in [0, 1], n standard normal, u uniform |
|---|---|
| `data.binarise` | white with probability x: `static` once per image, by a hash of (seed, key); `dynamic` anew at |
| | every step; `threshold`: white from 128 on |
| `augment.flip` | left for right with that probability |
| `augment.shift` | whole image by up to so many pixels in each direction, evenly; the edge is repeated |
| `augment.poisson` | Poisson(x * photons) / photons: the noise of counted light |
| `augment.speckle` | x * (1 + speckle * n), of coherent light (ultrasound, radar) |
| `augment.gaussian` | x + gaussian * n |
| `augment.salt_pepper` | that share of pixels, half of them black and half white, all channels together |

The result is rounded to uint8 once. `augment.denoise` keeps the image without the four noises as `target`, which is
what the likelihood then scores: Vincent et al., "Extracting and composing robust features with denoising
autoencoders".

Training noise comes from the step's context, by sample: 1 and 8 processes see the same images, and
a resumed run continues with those that it would have seen. Outside training nothing is augmented and binarization is
static, so that numbers compare; only a denoiser, whose task the noise is, is evaluated with noise, fixed per
(seed, sample).

What comes first and is the same at every step (`static`, `threshold`) is done once to the images that a cache holds,
where there is one (`Inputs.static_transform`).

`static` uses one 24-bit number per value from the SplitMix64 generator (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators"), in integers: the same on every device, for every order and batch. Salakhutdinov and
Murray, "On the quantitative analysis of deep belief networks", drew the binarized MNIST that way, once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaedist.config.job import Job, Spec
from vaedist.core.context import Batch, Context, SampleContext
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.cache import StaticTransform
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig


class Inputs:
    """A job's `data.binarise` and `augment`, applied to batches.

    Args:
        job: The job.
        transformed: Whether `static_transform` was applied to all images of these batches.
    """

    def __init__(self, job: Job, *, transformed: bool = False) -> None:
        self._transformed = transformed
        self.seed, self.binarization, self.augment = job.seed, job.data.binarise, job.augment
        augmented = self.augment.flip or self.augment.shift or self.augment.noisy
        self._changes_images = self.binarization != "none" or bool(augmented)
        tokenizer = getattr(job.model, "tokenizer", None)
        if tokenizer is not None and not isinstance(tokenizer, str):
            # A prior's own images, of an evaluation, are binarized as those that its tokenizer was trained on.
            self.seed, self.binarization = tokenizer.seed, tokenizer.binarise
        self._counts: Tensor | None = None

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        """`batch` as the model sees it under `ctx`, whose rows are those of the batch; `batch` is left as it is.

        Raises:
            UserError: the batch holds codes, which cannot be changed like pixels.
        """
        augment = self.augment
        if "image" not in batch:
            if self._changes_images:
                raise UserError(
                    "data.binarise and augment change images, but this model reads the codes of its tokenizer: "
                    "leave both out of this job (they belong into the tokenizer's)"
                )
            return batch
        image = batch["image"]
        if not self._transformed:
            image = self.binarize(image, batch.get("key", []), ctx if ctx.training else None)
        if ctx.training and augment.flip:
            chosen = ctx.uniform("augment/flip", (len(image),)) < augment.flip
            image = torch.where(chosen[:, None, None, None], image.flip(-1), image)
        if ctx.training and augment.shift:
            image = _shifted(image, augment.shift, ctx.uniform("augment/shift", (len(image), 2)))
        clean = image
        if augment.noisy and (ctx.training or augment.denoise):
            image = self._noisy(image, ctx)
        shown: Batch = {**batch, "image": image}
        if augment.denoise:
            shown["target"] = clean
        return shown

    def binarize(self, image: Tensor, keys: Sequence[str], ctx: Context | None = None) -> Tensor:
        """uint8 (B, C, H, W) of 0 and 255, or `image` itself where the job does not binarize.

        Args:
            image: uint8 (B, C, H, W).
            keys: B names; a static draw depends on (seed, key) alone.
            ctx: A training step's, for `dynamic`; none: the static draw in its place.
        """
        if self.binarization == "none":
            return image
        if self.binarization == "threshold":
            white = image >= 128
        elif self.binarization == "dynamic" and ctx is not None:
            white = ctx.uniform("binarise", image.shape) * 255 < image
        else:
            bits = static_bits(self.seed, keys, image[0].numel(), image.device).view(image.shape)
            white = bits * 255 < image.long() << BITS
        return white.to(torch.uint8) * 255

    @property
    def static_transform(self) -> StaticTransform | None:
        """The part that comes first and is the same at every step, which a cache can hold. None: there is none."""
        if self.binarization not in ("static", "threshold"):
            return None

        def transform(images: NDArray[np.uint8], keys: Sequence[str]) -> None:
            images[:] = self.binarize(torch.from_numpy(images), keys).numpy()

        return transform

    def _noisy(self, image: Tensor, ctx: Context) -> Tensor:
        augment = self.augment
        x = image.to(torch.float32) / 255
        if augment.poisson is not None:
            if self._counts is None or self._counts.device != image.device:
                self._counts = poisson_table(augment.poisson).to(image.device)
            x = poisson(image, ctx.uniform("augment/poisson", image.shape), self._counts) / augment.poisson
        if augment.speckle:
            x = x * (1 + augment.speckle * ctx.noise("augment/speckle", image.shape))
        if augment.gaussian:
            x = x + augment.gaussian * ctx.noise("augment/gaussian", image.shape)
        if augment.salt_pepper:
            u = ctx.uniform("augment/salt_pepper", (len(image), 1, *image.shape[2:]))
            x = x.masked_fill(u < augment.salt_pepper / 2, 0).masked_fill(u >= 1 - augment.salt_pepper / 2, 1)
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)


class EvaluationInputs:
    """The batches of a split as a model of `job` is evaluated on them; can be iterated more than once.

    Attributes:
        first, count: Number of the first sample, and how many there are.
        inputs: What is done to them.
    """

    def __init__(self, batches: EvaluationStream, job: Job) -> None:
        self.first, self.count, self.inputs = batches.first, batches.count, Inputs(job)
        self._batches, self._job = batches, job

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            device = batch["label"].device
            ctx = SampleContext(seed=self._job.seed, samples=batch["sample"], device=device)
            yield self.inputs(batch, ctx)


def rows_at_once(spec: Spec) -> int:
    """Images of about half a million pixels, 128 at most.

    More are slower on a CPU: activations of more than 32 MiB are given back to the system after each layer, and zeroed
    by it for the next (`vaedist.distributed.memory`).
    """
    return max(1, min(128, (1 << 19) // math.prod(spec.shape)))


def whole_split(
    index: Index, name: str, job: Job, *, device: torch.device | str = "cpu", limit: int | None = None
) -> EvaluationInputs:
    """Every image of a split, or its first `limit`, as a model of `job` is evaluated on them.

    The batch size is always `rows_at_once`, so that the same model has the same digits everywhere.
    """
    config = EvaluationStreamConfig(batch_size=rows_at_once(index.spec), device=device, limit=limit)
    return EvaluationInputs(EvaluationStream(index, name, config), job)


# Noise laws -------------------------------------------------------------------------------------------------

BITS = 24
"""Bits of each number that a static draw compares a gray value with."""
_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_GOLDEN, _FIRST, _SECOND = (constant - (1 << 64) for constant in _CONSTANTS)


def static_bits(seed: int, keys: Sequence[str], count: int, device: torch.device | str) -> Tensor:
    """(B, count) int64 in [0, 2^24): row i is a function of (seed, keys[i]) alone."""
    digests = [hashlib.blake2b(f"binarise\x1f{seed}\x1f{key}".encode(), digest_size=8) for key in keys]
    starts = [int.from_bytes(digest.digest(), "little", signed=True) for digest in digests]
    start = torch.tensor(starts, dtype=torch.int64, device=device)
    z = start[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN  # wraps, as it should
    _mix(z, 30).mul_(_FIRST)
    _mix(z, 27).mul_(_SECOND)
    _mix(z, 31)
    return (z >> 64 - BITS).bitwise_and_((1 << BITS) - 1)


def _mix(z: Tensor, places: int) -> Tensor:
    """z ^= z >> places, in place, as of 64 bits without a sign, which int64 does not have by itself."""
    return z.bitwise_xor_((z >> places).bitwise_and_((1 << (64 - places)) - 1))


def _shifted(image: Tensor, most: int, uniform: Tensor) -> Tensor:
    """Each image moved by two whole numbers of pixels, even on [-most, most]; uniform is (B, 2) on [0, 1)."""
    rows, (height, width) = len(image), image.shape[2:]
    offsets = (uniform * (2 * most + 1)).long().clamp(max=2 * most) - most
    down = (torch.arange(height, device=image.device) - offsets[:, :1]).clamp(0, height - 1)
    right = (torch.arange(width, device=image.device) - offsets[:, 1:]).clamp(0, width - 1)
    number = torch.arange(rows, device=image.device)[:, None, None]
    # Two index tensors around a slice put their axes first: (B, H, W, C).
    return image[number, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2).contiguous()


def poisson_table(photons: float) -> Tensor:
    """(256, K) float64: g + P(N <= k) for a gray value g of mean g / 255 * photons; sorted when flattened.

    P(N <= k) = Q(k + 1, mean), the upper regularised incomplete gamma function; k ends ten deviations above `photons`.
    """
    gray = torch.arange(256, dtype=torch.float64)
    k = torch.arange(int(photons + 10 * photons**0.5) + 16, dtype=torch.float64)
    mean = (gray / 255 * photons)[:, None]
    below = torch.special.gammaincc((k + 1).expand(256, -1), mean.expand(-1, len(k)))
    below[:, -1] = 1
    return gray[:, None] + below


def poisson(image: Tensor, uniform: Tensor, table: Tensor) -> Tensor:
    """Counts (float32) by inversion: the smallest k with P(N <= k) > u, found for all gray values in one search."""
    wanted = image.to(torch.float64) + uniform
    place = torch.searchsorted(table.flatten(), wanted.contiguous(), right=True)
    count = place - image.long() * table.shape[1]
    return count.clamp(0, table.shape[1] - 1).to(torch.float32)
