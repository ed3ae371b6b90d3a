"""k-means with a k-means++ start, and the vectors that a codebook is initialized from.

Sums run in a fixed order on every device, so all processes find the same clusters bit for bit. Arthur and
Vassilvitskii, "k-means++: the advantages of careful seeding".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaedist.core.context import Context, generator

_CHUNK = 1 << 22  # distances held at once


def nearest_vectors(rows: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Index (N,) of the nearest of K vectors (K, D) to each of N rows (N, D), and the squared distance (N,).

    |e|^2 - 2 z.e as one matrix product per chunk of rows; a tie goes to the smaller index.
    """
    vectors = vectors.detach()
    half = vectors.square().sum(1) / 2
    # An exported program is for any number of rows, which a number of chunks would fix.
    parts = (rows,) if torch.compiler.is_compiling() else rows.split(max(1, _CHUNK // len(vectors)))
    best, index = zip(*(torch.addmm(half, part, vectors.T, alpha=-1).min(1) for part in parts), strict=True)
    distance = rows.square().sum(1) + 2 * torch.cat(best)
    return torch.cat(index), distance.clamp_min(0)


def kmeans_plus_plus(vectors: Tensor, k: int, seed: int) -> Tensor:
    """(k, D) of the vectors (N, D): each is drawn in proportion to its squared distance to those drawn before."""
    uniform = torch.rand(k, generator=generator("k-means", seed), dtype=torch.float64).to(vectors.device)
    last = len(vectors) - 1
    chosen = [min(int(uniform[0] * len(vectors)), last)]
    distance = (vectors - vectors[chosen[0]]).square().sum(1)
    for i in range(1, k):
        cumulative = distance.to(torch.float64).cumsum(0)
        # All distances 0: every distinct vector is chosen already, so any will do.
        target = uniform[i] * (cumulative[-1] if cumulative[-1] > 0 else 1)
        chosen.append(min(int(torch.searchsorted(cumulative, target, right=True)), last))
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen]


def kmeans(vectors: Tensor, k: int, seed: int, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from a k-means++ start: means (k, D) and cluster sizes (k,), a function of the arguments.

    A mean that loses all its vectors takes the vector farthest from its own mean. With fewer distinct vectors
    than k some means are equal; their sizes are at least 1.
    """
    means, counts = kmeans_plus_plus(vectors, k, seed), vectors.new_ones(k)
    for _ in range(iterations):
        index, distance = nearest_vectors(vectors, means)
        counts = torch.bincount(index, minlength=k).to(vectors.dtype)
        sums = ordered_index_add(torch.zeros_like(means, dtype=torch.float64), index, vectors).to(means.dtype)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
        empty = (counts == 0).nonzero().flatten()
        farthest = distance.topk(min(len(empty), len(vectors))).indices
        means[empty[: len(farthest)]] = vectors[farthest]
    return means, counts.clamp_min(1)


def flatten_positions(z: Tensor) -> Tensor:
    """(B, D, h, w) to (B*h*w, D)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def ordered_index_add(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target[index[i]] += rows[i] as matrix products, which add in a fixed order on every device."""
    size = max(1, _CHUNK // len(target))
    for part, indices in zip(rows.split(size), index.split(size), strict=True):
        one_hot = torch.zeros(len(target), len(part), dtype=part.dtype, device=part.device)
        one_hot.scatter_(0, indices[None], 1)
        target += (one_hot @ part).to(target.dtype)
    return target


def sample_initial_vectors(maps: Sequence[Tensor], ctx: Context, count: int) -> tuple[Tensor, int, int]:
    """Arguments of `Quantizer.initialize_codebook`: (N, D) vectors of all processes, N about `count`; a seed; vectors
    per step.

    Args:
        maps: Encoder outputs (B_r, D, h, w) of this process's rows of the first global batches.
        ctx: Its noise picks positions in each sample.
        count: How many vectors; all there are if that is fewer.
    """
    parts = []
    seed = per_step = 0
    for chunk, z in enumerate(maps):
        rows = z.permute(0, 2, 3, 1).flatten(1, 2)
        noise = ctx.uniform("k-means", (rows.shape[0], rows.shape[1]), chunk=chunk).to(rows.device)
        per_sample = min(rows.shape[1], -(-count // (len(maps) * ctx.batch_size)))
        positions = noise.argsort(dim=1, stable=True)[:, :per_sample]
        picked = rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[2]))
        parts.append(ctx.gather(picked).flatten(0, 1))
        seed = int(ctx.gather(noise[:, :1])[0, 0].item() * 2**24)
        per_step = rows.shape[1] * ctx.batch_size
    return torch.cat(parts), seed, per_step
