"""A small causal transformer over a map of codes.

Codes in raster order are a sequence; the input at position t is the code before it (at position 0 a trained start), so
that the output at t is a distribution of code t. Blocks are pre-normalised (Xiong et al., "On layer normalization
in the transformer architecture"): x + attention(norm(x)), then x + mlp(norm(x)), with softmax attention over the
positions up to t (Vaswani et al., "Attention is all you need"). A label is a vector added at every position.

Positional encodings: `learned`, a vector per position added to the input, good for aligned images; `rotary`, queries
and keys rotated by angles that grow with the position, so that their product depends on the distance (Su et al.,
"RoFormer"), here along two axes: half of a head's pairs rotate with the row, half with the column; or `both`. The
position is always that of the code to predict.

`TransformerSamplingState` caches every layer's keys and values, so that a code costs the products of one position and
one row of attention.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.nets.dropout import dropout
from vaedist.nets.transformer_config import Transformer


def rotary_terms(grid: tuple[int, int], size: int) -> Tensor:
    """(2, T, size) fp64: cosines and sines of the rotary angles of a head of `size` features, a multiple of 4.

    Pair i is features i and i + size/2; the first half of the pairs rotates with the row, the other with the column,
    each at frequencies 100^(-2k/(size/2)): over a grid of some dozens of rows the slowest makes less than one turn.
    """
    count = size // 4
    frequencies = 100.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    rows = torch.arange(grid[0], dtype=torch.float64)[:, None, None] * frequencies
    columns = torch.arange(grid[1], dtype=torch.float64)[None, :, None] * frequencies
    shape = (*grid, count)
    angles = torch.cat([rows.expand(shape), columns.expand(shape)], 2).flatten(0, 1)
    return torch.stack([torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)])


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(..., T, size) features, every pair rotated by its angle."""
    a, b = x.chunk(2, -1)
    return x * cosines + torch.cat([-b, a], -1) * sines


class TransformerBlock(nn.Module):
    """Attention and MLP around a residual stream (B, T, D)."""

    def __init__(self, config: Transformer) -> None:
        super().__init__()
        width, inner = config.width, config.width * config.expand
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        # The stream's variance grows with depth, so what blocks add to it is initially small (Radford et al., GPT-2).
        for layer in (self.out, self.down):
            nn.init.normal_(layer.weight, std=(2 * config.layers * layer.in_features) ** -0.5)

    def qkv(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, size) of the stream."""
        b, t, width = x.shape
        parts = self.project(self.attention_norm(x)).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return q, k, v

    def attention_output(self, heads: Tensor) -> Tensor:
        """What attention adds to the stream, from (B, heads, T, size)."""
        added: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return added

    def mlp_output(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        added: Tensor = self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return added


class CausalTransformer(nn.Module):
    """p(codes | label).

    Args:
        config: Its size.
        codes: K.
        grid: (h, w).
        labels: Rows of the label table: the classes and one for "no label"; 0: no labels.
    """

    rotary_terms: Tensor

    def __init__(self, config: Transformer, codes: int, grid: tuple[int, int], labels: int = 0) -> None:
        super().__init__()
        width = config.width
        self.grid, self.rate = grid, config.dropout
        self.embedding = nn.Embedding(codes, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        # The input at position 0; the other positions have a vector of their own only where they are learned.
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.place: nn.Parameter | None = None
        if config.positions != "rotary":
            self.place = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))
        self.rotary = config.positions != "learned"
        if self.rotary:
            terms = rotary_terms(grid, width // config.heads)
            self.register_buffer("rotary_terms", terms.to(torch.get_default_dtype()), persistent=False)
        self.label: nn.Embedding | None = None
        if labels:
            self.label = nn.Embedding(labels, width)
            nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)

    def rotary_at(self, positions: slice) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the rotary angles at these positions."""
        return (self.rotary_terms[0, positions], self.rotary_terms[1, positions]) if self.rotary else None

    def label_vectors(self, label: Tensor | None) -> Tensor | None:
        """(B, 1, D) of (B,) labels."""
        return None if self.label is None or label is None else self.label(label)[:, None]

    def embed_inputs(self, previous: Tensor, positions: slice, label: Tensor | None) -> Tensor:
        """(B, t, D) stream at these positions, from the vectors of the previous codes and of the labels."""
        x = previous if self.place is None else previous + self.place[positions]
        return x if label is None else x + label

    def forward(self, codes: Tensor, label: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """(B, K, h, w) logits of (B, h, w) codes, (B,) labels; `seeds` (B,) of dropout, None outside training."""
        previous = self.embedding(codes.flatten(1)[:, :-1])
        previous = torch.cat([self.start.expand(len(codes), 1, -1), previous], 1)
        everywhere = slice(None)
        x = self.embed_inputs(previous, everywhere, self.label_vectors(label))
        for number, block in enumerate(cast(list[TransformerBlock], self.blocks)):
            q, k, v = block.qkv(x, self.rotary_at(everywhere))
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + dropout(block.attention_output(heads), self.rate, seeds, 2 * number)
            x = x + dropout(block.mlp_output(x), self.rate, seeds, 2 * number + 1)
        return self.head(self.norm(x)).transpose(1, 2).unflatten(2, self.grid)

    def start_sampling(self, rows: int, label: Tensor | None = None) -> TransformerSamplingState:
        """The state of `rows` maps without any code yet, of (rows,) labels."""
        return TransformerSamplingState(self, rows, label)


class TransformerSamplingState:
    """Sampling with a cache: see the module."""

    @torch.no_grad()
    def __init__(self, network: CausalTransformer, rows: int, label: Tensor | None) -> None:
        self.network = network
        self.blocks = cast(list[TransformerBlock], network.blocks)
        self.known = 0
        self.label = network.label_vectors(label)
        self.newest = network.start.expand(rows, 1, -1)
        height, width = network.grid
        size = network.start.shape[0] // self.blocks[0].heads
        shape = (2, rows, self.blocks[0].heads, height * width, size)
        self.cache = [network.start.new_zeros(shape) for _ in self.blocks]  # keys, values

    def logits(self) -> Tensor:
        """(B, K)."""
        here = slice(self.known, self.known + 1)
        with torch.no_grad():
            x = self.network.embed_inputs(self.newest, here, self.label)
            rotary = self.network.rotary_at(here)
            for block, cache in zip(self.blocks, self.cache, strict=True):
                q, cache[0, :, :, here], cache[1, :, :, here] = block.qkv(x, rotary)
                k, v = cache[:, :, :, : self.known + 1]
                x = x + block.attention_output(functional.scaled_dot_product_attention(q, k, v))
                x = x + block.mlp_output(x)
            return self.network.head(self.network.norm(x))[:, 0]

    def append(self, codes: Tensor) -> None:
        with torch.no_grad():
            self.newest = self.network.embedding(codes)[:, None]
        self.known += 1
