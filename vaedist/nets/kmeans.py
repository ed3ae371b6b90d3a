"""Clusters of vectors: the nearest of many, k-means, and the vectors that a codebook starts from.

Sums run in a fixed order on every device, so all processes find the same clusters bit for bit. k-means begins as in
Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaedist.core.context import Context, generator

_CHUNK = 1 << 22  # distances held at once


def nearest_vectors(rows: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Index (N,) of the nearest of K vectors (K, D) to each of N rows (N, D), and the squared distance (N,).

    |e|^2 - 2 z.e as one matrix product per chunk of rows; a tie goes to the smaller index.
    """
    embedding = embedding.detach()
    half = embedding.square().sum(1) / 2
    size = max(1, _CHUNK // len(embedding))
    # An exported program is for any number of rows, which a number of chunks would fix.
    parts = (rows,) if torch.compiler.is_compiling() else rows.split(size)
    best, index = zip(*(torch.addmm(half, part, embedding.T, alpha=-1).min(1) for part in parts), strict=True)
    distance = rows.square().sum(1) + 2 * torch.cat(best)
    return torch.cat(index), distance.clamp_min(0)


def kmeans(vectors: Tensor, k: int, seed: int, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """k-means++ start and Lloyd's iterations: means (k, D) and cluster sizes (k,), a function of the arguments.

    A mean that loses all its vectors takes the vector farthest from its own mean. With fewer distinct vectors
    than k some means are equal; their sizes are at least 1.
    """
    draw = torch.rand(k, generator=generator("k-means", seed), dtype=torch.float64).to(vectors.device)
    n = len(vectors)
    chosen = [min(int(draw[0] * n), n - 1)]
    distance = (vectors - vectors[chosen[0]]).square().sum(1)
    for i in range(1, k):
        reach = distance.to(torch.float64).cumsum(0)
        # All distances 0: every vector is taken, so any will do.
        target = draw[i] * (reach[-1] if reach[-1] > 0 else 1)
        chosen.append(min(int(torch.searchsorted(reach, target, right=True)), n - 1))
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1))
    means = vectors[chosen].clone()
    counts = vectors.new_ones(k)
    for _ in range(iterations):
        index, distance = nearest_vectors(vectors, means)
        counts = torch.bincount(index, minlength=k).to(vectors.dtype)
        sums = ordered_index_add(torch.zeros_like(means, dtype=torch.float64), index, vectors).to(means.dtype)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
        empty = (counts == 0).nonzero().flatten()
        far = distance.topk(min(len(empty), n)).indices
        means[empty[: len(far)]] = vectors[far]
    return means, counts.clamp_min(1)


def flatten_positions(z: Tensor) -> Tensor:
    """(B, D, h, w) to (B*h*w, D)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def ordered_index_add(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target[index[i]] += rows[i] as matrix products, which add in a fixed order on every device."""
    for part, at in zip(
        rows.split(max(1, _CHUNK // len(target))), index.split(max(1, _CHUNK // len(target))), strict=True
    ):
        hit = torch.zeros(len(target), len(part), dtype=part.dtype, device=part.device)
        hit.scatter_(0, at[None], 1)
        target += (hit @ part).to(target.dtype)
    return target


def sample_initial_vectors(maps: Sequence[Tensor], ctx: Context, wanted: int) -> tuple[Tensor, int, int]:
    """Arguments of `Quantizer.initialize_codebook`: (N, D) vectors of all processes, N about `wanted`; a seed; vectors
    per step.

    Args:
        maps: Encoder outputs (B_r, D, h, w) of this process's rows of the first global batches.
        ctx: Its noise picks positions in each sample.
        wanted: How many vectors; all there are if that is fewer.
    """
    parts = []
    seed = per_step = 0
    for chunk, z in enumerate(maps):
        rows = z.permute(0, 2, 3, 1).flatten(1, 2)
        noise = ctx.uniform("k-means", (rows.shape[0], rows.shape[1]), chunk=chunk).to(rows.device)
        m = min(rows.shape[1], -(-wanted // (len(maps) * ctx.batch_size)))
        place = noise.argsort(dim=1, stable=True)[:, :m]
        picked = rows.gather(1, place[..., None].expand(-1, -1, rows.shape[2]))
        parts.append(ctx.gather(picked).flatten(0, 1))
        seed = int(ctx.gather(noise[:, :1])[0, 0].item() * 2**24)
        per_step = rows.shape[1] * ctx.batch_size
    return torch.cat(parts), seed, per_step
