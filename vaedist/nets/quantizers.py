"""Quantisers: a latent map of D channels to a map of codes 0..K-1 and back.

Each position's vector z in R^D is replaced by a code vector q; `vaedist.nets.gradient_estimators` says how the gradient
of q reaches z.

| kind | code vectors |
|---|---|
| `ema` | K running means of the vectors assigned to them |
| `gradient` | K trained vectors, drawn towards the vectors assigned to them by the term mean((sg(z) - q)^2) |
| `fsq` | a fixed grid: channel i is bounded and rounded to `levels[i]` values in [-1, 1] |

van den Oord et al., "Neural discrete representation learning" (`gradient`, and `ema` in its appendix A.1); Mentzer
et al., "Finite scalar quantization" (`fsq`).

Running means. With n_k vectors assigned to code k in a step, and s_k their sum, over the *global* batch:

    N_k <- d N_k + (1 - d) n_k,   M_k <- d M_k + (1 - d) s_k,   e_k = M_k / N_k

`forward` only passes n and s to `ctx.accumulate`; `after_step` sums them over processes and applies them. So the
codebook is right after a refused step, an evaluation and a step accumulated from several passes, and it is the same on
every process.

Initialization. N and M must start consistent with each other: with N = 0 and M = the embedding, a rare code's mean
M_k / N_k is far away after the first step. `initialize_codebook` runs k-means (`vaedist.nets.kmeans`) on vectors of
the first batches, gathered over all processes, and sets N and M to the sizes and sums of its clusters, scaled to
(1 - d) times a step's vectors: they weigh as much as one step, so the codebook follows an untrained encoder closely.

Cosine codes. With `cosine: true` vectors and codes lie on the sphere of radius sqrt(D), and the nearest code is the
one at the smallest angle, so the length of the encoder's vectors cannot diverge. Yu et al., "Vector-quantized image
modeling with improved VQGAN" (there the radius is 1; sqrt(D) keeps single values near 1).

Residual levels. With `residual_levels: L` there are L codebooks of K vectors: each quantises the residual that the ones
before leave, and q is the sum. A map of h x w positions then has L h x w codes: below each row of codes of one level is
the same row of the next, so a prior in raster order reads the coarse code of a position before the finer one. The
commitment is the mean over levels of the squared residual after each. Zeghidour et al., "SoundStream: an end-to-end
neural audio codec", and Lee et al., "Autoregressive image generation using residual quantization".

Dead codes. A code whose N falls below `expire` times the mean of N is moved to a vector of the current batch, and its N
and M are reset. The candidates are gathered from all samples, each with noise of its own, in proportion to the squared
distance to their code, as in k-means++: the choice does not depend on the number of processes, and no candidate equals
a code vector.

All of it runs in fp32 (fp64 for fp64 models), outside autocast: bf16 finds the wrong nearest neighbours.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vaedist.core.context import Context
from vaedist.nets.gradient_estimators import apply_estimator, project_to_sphere
from vaedist.nets.kmeans import flatten_positions, kmeans, nearest_vectors, ordered_index_add
from vaedist.nets.quantizers_config import EmaCodebook, Fsq, GradientCodebook, QuantizerConfig


class Quantized(NamedTuple):
    """The quantization of a map (B, D, h, w)."""

    values: Tensor
    """(B, D, h, w) code vectors, with a gradient to the map."""
    codes: Tensor
    """(B, h, w) int64, or (B, L h, w) with L residual levels."""
    commitment: Tensor | None
    """(B,) mean over elements of (z - sg(q))^2; None where the code vectors are fixed."""
    codebook: Tensor | None
    """(B,) mean over elements of (sg(z) - q)^2, where the code vectors are trained by gradient."""


class Quantizer(nn.Module):
    """Base class: `dim` channels in and out, `num_codes` codes."""

    dim: int
    num_codes: int
    depth = 1
    """Codes of each position, one per residual level."""
    tag = ""
    """Suffix of the statistics' names, for residual levels."""
    initialized_from_data = False
    """Whether `initialize_codebook` must be called before step 1."""

    def encode(self, z: Tensor) -> Tensor:
        """(B, h, w) int64 codes of a map (B, D, h, w)."""
        raise NotImplementedError

    def embed(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) code vectors of (B, h, w) codes."""
        raise NotImplementedError

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        raise NotImplementedError

    def initialize_codebook(self, vectors: Tensor, seed: int, per_step: int) -> None:
        """Initialize from (N, D) vectors that are the same on every process; a step has `per_step` of them."""

    def count_codes(self, codes: Tensor, ctx: Context) -> None:
        """Add a batch's codes to this step's statistics."""
        counts = torch.bincount(codes.flatten(), minlength=self.num_codes)
        ctx.accumulate(f"codes{self.tag}", counts.to(torch.float64))

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        """Apply the step's statistics and return `usage`."""
        return self.usage(ctx.total(f"codes{self.tag}"))

    def usage(self, counts: Tensor) -> dict[str, Tensor]:
        """Perplexity exp(H) and number of the codes that the global batch used, from its (K,) counts."""
        share = counts / counts.sum()
        return {
            f"perplexity{self.tag}": torch.special.entr(share).sum().exp(),
            f"codes_used{self.tag}": (counts > 0).sum(),
        }


class _Codebook(Quantizer):
    """K vectors of D numbers in `embedding`; the nearest one is the code."""

    embedding: Tensor
    initialized_from_data = True
    trained: bool
    """Whether the vectors are trained by gradient."""

    def __init__(self, config: EmaCodebook | GradientCodebook) -> None:
        super().__init__()
        self.num_codes, self.dim = config.codes, config.dim
        self.cosine, self.estimator = config.cosine, config.estimator

    def assign(self, z: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Codes (B, h, w) and vectors (B, D, h, w) of a map in code space without gradient; counted in training."""
        raise NotImplementedError

    def nearest_codes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, h, w) and squared distances (B*h*w,) of a map in code space."""
        codes, distance = nearest_vectors(flatten_positions(z), self.vectors)
        return codes.view(z.shape[0], *z.shape[2:]), distance

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self._to_code_space(z)
            codes, q = self.assign(z.detach(), ctx)
            commitment = (z - q.detach()).square().flatten(1).mean(1)
            codebook = (z.detach() - q).square().flatten(1).mean(1) if self.trained else None
            return Quantized(apply_estimator(z, q.detach(), self.estimator), codes, commitment, codebook)

    def encode(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return self.nearest_codes(self._to_code_space(z))[0]

    def embed(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.vectors).permute(0, 3, 1, 2).contiguous()

    @property
    def vectors(self) -> Tensor:
        """(K, D) code vectors."""
        return project_to_sphere(self.embedding, 1) if self.cosine else self.embedding

    def _to_code_space(self, z: Tensor) -> Tensor:
        """The map in full precision; on the sphere for cosine codes."""
        z = z.to(torch.promote_types(z.dtype, self.embedding.dtype))
        return project_to_sphere(z, 1) if self.cosine else z

    @torch.no_grad()
    def initialize_codebook(self, vectors: Tensor, seed: int, per_step: int) -> None:
        if self.cosine:
            vectors = project_to_sphere(vectors, 1)
        means, counts = kmeans(vectors, self.num_codes, seed)
        self.embedding.copy_(means)
        self.initialize_averages(counts, per_step)

    def initialize_averages(self, counts: Tensor, per_step: int) -> None:
        """Initialize running means from the sizes of the clusters around `embedding`."""


class GradientQuantizer(_Codebook):
    """Code vectors trained by gradient."""

    trained = True

    def __init__(self, config: GradientCodebook) -> None:
        super().__init__(config)
        self.embedding = nn.Parameter(torch.randn(config.codes, config.dim) / math.sqrt(config.dim))

    def assign(self, z: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        codes = self.nearest_codes(z)[0]
        if ctx.training:
            self.count_codes(codes, ctx)
        return codes, self.embed(codes)


class EmaQuantizer(_Codebook):
    """Code vectors that are running means; `count_average` is N, `sum_average` M of the module docstring."""

    trained = False
    embedding: Tensor
    count_average: Tensor
    sum_average: Tensor

    def __init__(self, config: EmaCodebook) -> None:
        super().__init__(config)
        self.config = config
        vectors = torch.randn(config.codes, config.dim) / math.sqrt(config.dim)
        self.register_buffer("embedding", vectors)
        self.register_buffer("count_average", torch.ones(config.codes))
        self.register_buffer("sum_average", vectors.clone())

    def assign(self, z: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        codes, distance = self.nearest_codes(z)
        if ctx.training:
            rows = flatten_positions(z)
            # (K, 1 + D), counts and sums in one tensor: one sum over processes instead of two.
            statistics = torch.zeros(self.num_codes, 1 + self.dim, dtype=torch.float64, device=z.device)
            statistics[:, 0] = torch.bincount(codes.flatten(), minlength=self.num_codes)
            ordered_index_add(statistics[:, 1:], codes.flatten(), rows)
            ctx.accumulate(f"codes{self.tag}", statistics)
            if self.config.expire > 0:
                ctx.collect(f"candidates{self.tag}", self._candidates(rows, distance, z.shape[0], ctx))
        return codes, self.embed(codes)

    def _candidates(self, rows: Tensor, distance: Tensor, samples: int, ctx: Context) -> Tensor:
        """(samples, m, 1 + D): vectors drawn in each sample in proportion to `distance`, after a sorting key."""
        m = -(-self.num_codes // ctx.batch_size)
        noise = ctx.uniform(f"expire{self.tag}", (samples, 2 * m)).to(rows)
        cumulative = distance.view(samples, -1).to(torch.float64).cumsum(1)
        position = torch.searchsorted(cumulative, noise[:, :m].to(cumulative) * cumulative[:, -1:])
        position = position.clamp(max=cumulative.shape[1] - 1)
        chosen = rows.view(samples, -1, self.dim).gather(1, position[..., None].expand(-1, -1, self.dim))
        return torch.cat([noise[:, m:, None], chosen], 2)

    @torch.no_grad()
    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        statistics = ctx.total(f"codes{self.tag}")
        counts, sums = statistics[:, 0], statistics[:, 1:]
        decay = self.config.decay
        self.count_average.mul_(decay).add_((1 - decay) * counts.to(self.count_average.dtype))
        self.sum_average.mul_(decay).add_((1 - decay) * sums.to(self.sum_average.dtype))
        # An unused code stays exactly where it is, even when its average has decayed to 0.
        moved = (counts > 0) & (self.count_average > 0)
        smallest = torch.finfo(self.count_average.dtype).tiny
        mean = self.sum_average / self.count_average.clamp_min(smallest)[:, None]
        self.embedding.copy_(torch.where(moved[:, None], mean, self.embedding))
        if self.config.expire > 0:
            self._expire(ctx.collected(f"candidates{self.tag}").flatten(0, 1))
        return self.usage(counts)

    def _expire(self, candidates: Tensor) -> None:
        """Move dead codes to candidates (n, 1 + D), taken in the order of their first column, a random key.

        A moved code gets the smallest count that is not dead, so it soon dies again if it is not used.
        """
        floor = self.config.expire * self.count_average.mean()
        dead = (self.count_average < floor).nonzero().flatten()
        order = candidates[:, 0].argsort(dim=0, stable=True)[: len(dead)]
        fresh = candidates[order, 1:].to(self.embedding.dtype)
        self.embedding[dead] = fresh
        self.count_average[dead] = floor
        self.sum_average[dead] = fresh * floor

    def initialize_averages(self, counts: Tensor, per_step: int) -> None:
        counts = counts * ((1 - self.config.decay) * per_step / counts.sum())
        self.count_average.copy_(counts)
        self.sum_average.copy_(self.embedding * counts[:, None])


class ResidualQuantizer(Quantizer):
    """Several codebooks, each for the residual that the ones before leave."""

    initialized_from_data = True

    def __init__(self, books: list[_Codebook]) -> None:
        super().__init__()
        self.books = nn.ModuleList(books)
        self.depth = len(books)
        self.num_codes, self.dim, self.estimator = books[0].num_codes, books[0].dim, books[0].estimator
        for number, book in enumerate(books[1:], 2):
            book.tag = f"/level{number}"

    @property
    def _levels(self) -> list[_Codebook]:
        return cast(list[_Codebook], self.books)

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self._levels[0]._to_code_space(z)
            total = torch.zeros_like(z)
            codes, commitments, codebooks = [], [], []
            for book in self._levels:
                level_codes, q = book.assign(z.detach() - total, ctx)
                if book.trained:
                    codebooks.append((z.detach() - total - q).square().flatten(1).mean(1))
                total = total + q.detach()
                codes.append(level_codes)
                commitments.append((z - total).square().flatten(1).mean(1))
            return Quantized(
                apply_estimator(z, total, self.estimator),
                torch.stack(codes, 2).flatten(1, 2),
                torch.stack(commitments).mean(0),
                torch.stack(codebooks).sum(0) if codebooks else None,
            )

    def encode(self, z: Tensor) -> Tensor:
        codes = []
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            residual = self._levels[0]._to_code_space(z)
            for book in self._levels:
                codes.append(book.encode(residual))
                residual = residual - book.embed(codes[-1])
        return torch.stack(codes, 2).flatten(1, 2)

    def embed(self, codes: Tensor) -> Tensor:
        levels = codes.unflatten(1, (-1, self.depth)).unbind(2)
        vectors = [book.embed(level) for book, level in zip(self._levels, levels, strict=True)]
        return torch.stack(vectors).sum(0)

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        """The `usage` of each level; the finer ones are named `perplexity/level2` and so on."""
        return {name: value for book in self._levels for name, value in book.after_step(ctx).items()}

    @torch.no_grad()
    def initialize_codebook(self, vectors: Tensor, seed: int, per_step: int) -> None:
        for number, book in enumerate(self._levels):
            book.initialize_codebook(vectors, seed + number, per_step)
            vectors = vectors - book.vectors[nearest_vectors(vectors, book.vectors)[0]]


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

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, h, w) and values (B, D, h, w), with a straight-through gradient."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            highest = (self.levels - 1).to(z.dtype)[:, None, None]
            # Slightly wider than the outermost levels, which tanh alone would only reach in the limit.
            bounded = (torch.tanh(z) * (1 + 1e-3) + 1) / 2 * highest
            digits = bounded.detach().round().clamp_min(0).minimum(highest)
            codes = (digits.long() * self.place[:, None, None]).sum(1)
            return codes, 2 * (bounded + (digits - bounded).detach()) / highest - 1

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        return self._quantize(z)[0]

    def embed(self, codes: Tensor) -> Tensor:
        digits = codes[:, None] // self.place[:, None, None] % self.levels[:, None, None]
        return 2 * digits.to(torch.get_default_dtype()) / (self.levels - 1)[:, None, None] - 1

    def forward(self, z: Tensor, ctx: Context) -> Quantized:
        codes, values = self._quantize(z)
        if ctx.training:
            self.count_codes(codes, ctx)
        return Quantized(values, codes, None, None)


def quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer of a job's `codebook` section."""
    if isinstance(config, Fsq):
        return FsqQuantizer(config)
    books: list[_Codebook] = [
        EmaQuantizer(config) if isinstance(config, EmaCodebook) else GradientQuantizer(config)
        for _ in range(config.residual_levels)
    ]
    return books[0] if len(books) == 1 else ResidualQuantizer(books)
