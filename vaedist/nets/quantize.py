"""Quantisers: a latent map of D channels to a map of codes 0..K-1 and back.

Each position's vector z in R^D is replaced by a code vector q, with the straight-through gradient dq/dz = 1.

| kind | code vectors |
|---|---|
| `ema` | K running means of the vectors assigned to them |
| `gradient` | K trained vectors, pulled to their vectors by the term mean((sg(z) - q)^2) |
| `fsq` | a fixed grid: channel i is bounded and rounded to `levels[i]` values in [-1, 1] |

van den Oord et al., "Neural discrete representation learning" (`gradient`, and `ema` in its appendix A.1); Mentzer
et al., "Finite scalar quantization" (`fsq`).

The running means. With n_k vectors assigned to code k in a step, and s_k their sum, over the *global* batch:

    N_k <- d N_k + (1 - d) n_k,   M_k <- d M_k + (1 - d) s_k,   e_k = M_k / N_k

`forward` only hands n and s to `ctx.accumulate`; `after_step` sums them over processes and applies them. So a
refused step, an evaluation and a step accumulated from several passes leave the codebook right, and every process
holds the same one.

Start. N and M must begin as what they are running means of: counts at 0 with sums at the embedding fling rare codes
far away at the first step (3 of 512 codes survived). `start` runs k-means (Arthur and Vassilvitskii, "k-means++")
on vectors of the first batches, gathered over all processes, and N and M begin with its clusters, scaled to (1 - d)
times a step's vectors: the start weighs as much as one step, so the codebook follows a young encoder closely.

Dead codes. A code whose N falls below `expire` times the mean of N is moved onto a vector of the current batch, N
and M with it. Candidates are drawn per sample, far vectors more likely than near ones (in proportion to the squared
distance to their code, as k-means++ does), from noise that belongs to the sample, and gathered: the choice does not
depend on the number of processes, and never falls on what the codebook already holds exactly.

Everything here is fp32 (fp64 for fp64 models), outside autocast: nearest neighbours in bf16 are wrong ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from vaedist.config import OVERRIDE, Strict
from vaedist.context import Context, generator

_CHUNK = 1 << 22  # distances held at once


class EmaCodebook(Strict):
    """Running means."""

    kind: Literal["ema"] = "ema"
    codes: int = Field(512, ge=2, description="K.")
    dim: int = Field(64, ge=1, description="D.")
    decay: float = Field(0.99, ge=0, lt=1, description="d.", json_schema_extra=OVERRIDE)
    expire: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="A code whose running count is below this part of their mean is dead; 0: never.",
        json_schema_extra=OVERRIDE,
    )


class GradientCodebook(Strict):
    """Trained vectors."""

    kind: Literal["gradient"] = "gradient"
    codes: int = Field(512, ge=2, description="K.")
    dim: int = Field(64, ge=1, description="D.")


class Fsq(Strict):
    """A fixed grid of rounded channels."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (8, 5, 5, 5), min_length=1, description="Values per channel; K is their product."
    )


QuantizerConfig = Annotated[EmaCodebook | GradientCodebook | Fsq, Field(discriminator="kind")]


class Quantized(NamedTuple):
    """What a quantiser makes of a map (B, D, h, w)."""

    values: Tensor
    """(B, D, h, w) code vectors, gradient passed straight through to the map."""
    codes: Tensor
    """(B, h, w) int64."""
    commitment: Tensor | None
    """(B,) mean over elements of (z - sg(q))^2; None where there is nothing to commit to."""
    codebook: Tensor | None
    """(B,) mean over elements of (sg(z) - q)^2, where the code vectors are trained by gradient."""


class Quantizer(nn.Module):
    """Base: `dim` channels in and out, `num_codes` codes."""

    dim: int
    num_codes: int
    starts_from_data = False
    """Whether `start` is wanted before step 1."""

    def encode(self, z: Tensor) -> Tensor:
        """(B, h, w) int64 codes of a map (B, D, h, w)."""
        raise NotImplementedError

    def embed(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) code vectors of (B, h, w) codes."""
        raise NotImplementedError

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        raise NotImplementedError

    def start(self, vectors: Tensor, seed: int, per_step: int) -> None:
        """Start from (N, D) vectors that are the same on every process; a step has `per_step` of them."""

    def count(self, codes: Tensor, ctx: Context) -> None:
        """Add a batch's codes to this step's statistics."""
        counts = torch.bincount(codes.flatten(), minlength=self.num_codes)
        ctx.accumulate("codes", counts.to(torch.float64))

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        """Perplexity exp(H) and number of the codes that the global batch used."""
        counts = ctx.sum(ctx.statistic("codes"))
        share = counts / counts.sum()
        return {"perplexity": torch.special.entr(share).sum().exp(), "codes_used": (counts > 0).sum()}


class _Codebook(Quantizer):
    """K vectors of D numbers in `embedding`; the nearest one is the code."""

    embedding: Tensor
    starts_from_data = True

    def encode(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return nearest(_rows(self._wide(z)), self.embedding)[0].view(z.shape[0], *z.shape[2:])

    def embed(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.embedding).permute(0, 3, 1, 2).contiguous()

    def _wide(self, z: Tensor) -> Tensor:
        return z.to(torch.promote_types(z.dtype, self.embedding.dtype))


class GradientQuantizer(_Codebook):
    """Code vectors trained by gradient."""

    def __init__(self, config: GradientCodebook) -> None:
        super().__init__()
        self.num_codes, self.dim = config.codes, config.dim
        self.embedding = nn.Parameter(torch.randn(config.codes, config.dim) / math.sqrt(config.dim))

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self._wide(z)
            codes = self.encode(z)
            if ctx.training:
                self.count(codes, ctx)
            q = self.embed(codes)
            commitment = (z - q.detach()).square().flatten(1).mean(1)
            codebook = (z.detach() - q).square().flatten(1).mean(1)
            return Quantized(z + (q - z).detach(), codes, commitment, codebook)

    @torch.no_grad()
    def start(self, vectors: Tensor, seed: int, per_step: int) -> None:
        self.embedding.copy_(kmeans(vectors, self.num_codes, seed)[0])


class EmaQuantizer(_Codebook):
    """Code vectors that are running means; `count_average` is N, `sum_average` M of the module docstring."""

    embedding: Tensor
    count_average: Tensor
    sum_average: Tensor

    def __init__(self, config: EmaCodebook) -> None:
        super().__init__()
        self.config = config
        self.num_codes, self.dim = config.codes, config.dim
        vectors = torch.randn(config.codes, config.dim) / math.sqrt(config.dim)
        self.register_buffer("embedding", vectors)
        self.register_buffer("count_average", torch.ones(config.codes))
        self.register_buffer("sum_average", vectors.clone())

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self._wide(z)
            rows = _rows(z.detach())
            codes, distance = nearest(rows, self.embedding)
            codes = codes.view(z.shape[0], *z.shape[2:])
            q = self.embed(codes)
            if ctx.training:
                self.count(codes, ctx)
                sums = torch.zeros_like(self.embedding, dtype=torch.float64)
                ctx.accumulate("sums", _add_rows(sums, codes.flatten(), rows))
                if self.config.expire > 0:
                    ctx.collect("candidates", self._candidates(rows, distance, z.shape[0], ctx))
            commitment = (z - q).square().flatten(1).mean(1)
            return Quantized(z + (q - z).detach(), codes, commitment, None)

    def _candidates(self, rows: Tensor, distance: Tensor, samples: int, ctx: Context) -> Tensor:
        """(samples, m, 1 + D): vectors drawn in each sample in proportion to `distance`, after a sorting key."""
        m = -(-self.num_codes // ctx.batch_size)
        noise = ctx.uniform("expire", (samples, 2 * m)).to(rows)
        reach = distance.view(samples, -1).to(torch.float64).cumsum(1)
        place = torch.searchsorted(reach, noise[:, :m].to(reach) * reach[:, -1:])
        place = place.clamp(max=reach.shape[1] - 1)
        chosen = rows.view(samples, -1, self.dim).gather(1, place[..., None].expand(-1, -1, self.dim))
        return torch.cat([noise[:, m:, None], chosen], 2)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        shown = super().after_step(ctx)
        counts = ctx.sum(ctx.statistic("codes"))
        sums = ctx.sum(ctx.statistic("sums"))
        decay = self.config.decay
        self.count_average.mul_(decay).add_((1 - decay) * counts.to(self.count_average.dtype))
        self.sum_average.mul_(decay).add_((1 - decay) * sums.to(self.sum_average.dtype))
        # An unused code stays exactly where it is, even when its average has faded to nothing.
        moved = (counts > 0) & (self.count_average > 0)
        mean = (
            self.sum_average
            / self.count_average.clamp_min(torch.finfo(self.count_average.dtype).tiny)[:, None]
        )
        self.embedding.copy_(torch.where(moved[:, None], mean, self.embedding))
        if self.config.expire > 0:
            candidates = ctx.gather(ctx.statistic("candidates")).flatten(0, 1)
            self._expire(candidates)
        return shown

    def _expire(self, candidates: Tensor) -> None:
        """Move dead codes onto candidates (n, 1 + D), taken in the order of their first column, a random key.

        A moved code has the smallest count that is not dead: it must earn its place in the next steps.
        """
        floor = self.config.expire * self.count_average.mean()
        dead = (self.count_average < floor).nonzero().flatten()
        order = candidates[:, 0].argsort(dim=0, stable=True)[: len(dead)]
        fresh = candidates[order, 1:].to(self.embedding.dtype)
        self.embedding[dead] = fresh
        self.count_average[dead] = floor
        self.sum_average[dead] = fresh * floor

    @torch.no_grad()
    def start(self, vectors: Tensor, seed: int, per_step: int) -> None:
        means, counts = kmeans(vectors, self.num_codes, seed)
        counts = counts * ((1 - self.config.decay) * per_step / counts.sum())
        self.embedding.copy_(means)
        self.count_average.copy_(counts)
        self.sum_average.copy_(means * counts[:, None])


class FsqQuantizer(Quantizer):
    """Each channel bounded by tanh and rounded to one of its levels, spread evenly over [-1, 1]."""

    levels: Tensor
    place: Tensor

    def __init__(self, config: Fsq) -> None:
        super().__init__()
        self.dim, self.num_codes = len(config.levels), math.prod(config.levels)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        place = torch.cat([torch.ones(1, dtype=torch.int64), levels[:-1].cumprod(0)])
        self.register_buffer("place", place, persistent=False)

    def _digits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Bounded values and their rounding, both as 0 .. levels - 1, (B, D, h, w)."""
        top = (self.levels - 1).to(z.dtype)[:, None, None]
        # A hair wider than the outermost levels, which tanh alone would only reach in the limit.
        bounded = (torch.tanh(z) * (1 + 1e-3) + 1) / 2 * top
        return bounded, bounded.detach().round().clamp_min(0).minimum(top)

    def encode(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            digits = self._digits(z.to(torch.promote_types(z.dtype, torch.float32)))[1]
            return (digits.long() * self.place[:, None, None]).sum(1)

    def embed(self, codes: Tensor) -> Tensor:
        digits = codes[:, None] // self.place[:, None, None] % self.levels[:, None, None]
        return 2 * digits.to(torch.get_default_dtype()) / (self.levels - 1)[:, None, None] - 1

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            bounded, digits = self._digits(z)
            codes = (digits.long() * self.place[:, None, None]).sum(1)
            if ctx.training:
                self.count(codes, ctx)
            top = (self.levels - 1).to(z.dtype)[:, None, None]
            values = 2 * (bounded + (digits - bounded).detach()) / top - 1
            return Quantized(values, codes, None, None)


def quantizer(config: EmaCodebook | GradientCodebook | Fsq) -> Quantizer:
    """The quantiser of a job's `codebook` section."""
    if isinstance(config, EmaCodebook):
        return EmaQuantizer(config)
    if isinstance(config, GradientCodebook):
        return GradientQuantizer(config)
    return FsqQuantizer(config)


def nearest(rows: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Index (N,) of the nearest of K vectors (K, D) to each of N rows (N, D), and the squared distance (N,).

    |e|^2 - 2 z.e as one matrix product per chunk of rows; a tie goes to the smaller index.
    """
    embedding = embedding.detach()
    half = embedding.square().sum(1) / 2
    size = max(1, _CHUNK // len(embedding))
    best, index = zip(
        *(torch.addmm(half, part, embedding.T, alpha=-1).min(1) for part in rows.split(size)), strict=True
    )
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
        index, distance = nearest(vectors, means)
        counts = torch.bincount(index, minlength=k).to(vectors.dtype)
        sums = _add_rows(torch.zeros_like(means, dtype=torch.float64), index, vectors).to(means.dtype)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
        empty = (counts == 0).nonzero().flatten()
        far = distance.topk(min(len(empty), n)).indices
        means[empty[: len(far)]] = vectors[far]
    return means, counts.clamp_min(1)


def _rows(z: Tensor) -> Tensor:
    """(B, D, h, w) to (B*h*w, D)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _add_rows(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target[index[i]] += rows[i] as matrix products, which add in a fixed order on every device."""
    for part, at in zip(
        rows.split(max(1, _CHUNK // len(target))), index.split(max(1, _CHUNK // len(target))), strict=True
    ):
        hit = torch.zeros(len(target), len(part), dtype=part.dtype, device=part.device)
        hit.scatter_(0, at[None], 1)
        target += (hit @ part).to(target.dtype)
    return target


def starting_vectors(maps: Sequence[Tensor], ctx: Context, wanted: int) -> tuple[Tensor, int, int]:
    """Arguments of `Quantizer.start`: (N, D) vectors of all processes, N about `wanted`, a seed, and vectors per step.

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
