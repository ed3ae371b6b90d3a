"""Gated PixelCNN over a map of codes.

van den Oord et al., "Conditional image generation with PixelCNN decoders": two stacks of convolutions. The
vertical one sees the rows above; the horizontal one sees the codes to the left in the same row and, through a 1x1
convolution, the vertical one at its position. Together they see all earlier codes, without a blind spot. Each layer is
(their equation 3)

    y = tanh(W_a * x + V_a^T h) . sigmoid(W_b * x + V_b^T h),     h: the label,

with a residual connection around it (here in both stacks). Masks of type A hide a position from itself in the
first layer, those of type B let later layers see their own position. Kernels here leave out the masked taps: type A
has r rows above, or r columns to the left; type B has its own row or column too.

Two additions for small sets of aligned images: the dilations of the layers after the first alternate, so that a dozen
of them see all of a 32x32 map, and a trained vector for every position is added to both stacks after the first layer.

`PixelCnnSamplingState` is the cache. The vertical stack reads only the rows above, so a whole row of it is computed
when a row begins, from the earlier rows that each kernel reaches. Within a row a new code changes only the horizontal
stack, at one position: two matrix products per layer.
"""

from __future__ import annotations

from collections import deque
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.nets.dropout import dropout
from vaedist.nets.pixelcnn_config import PixelCnn


def gated(x: Tensor, label: Tensor | None = None) -> Tensor:
    """(B, 2C, ...), plus what the label adds, to (B, C, ...)."""
    a, b = (x if label is None else x + label).chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One gated layer.

    Args:
        width: C, channels of both stacks.
        reach: r, taps above and to the left.
        dilation: Distance between taps.
        masked: Type A: a position does not see itself, and there is no residual connection.
        last: The vertical stack ends here.
        labels: Rows of the label table; 0: none.
    """

    def __init__(
        self, width: int, *, reach: int, dilation: int, masked: bool, last: bool, labels: int
    ) -> None:
        super().__init__()
        self.dilation, self.masked, self.last = dilation, masked, last
        self.margin = reach * dilation
        taps = reach if masked else reach + 1
        self.vertical = nn.Conv2d(width, 2 * width, (taps, 2 * reach + 1), dilation=dilation)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, taps), dilation=dilation)
        self.across = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.out = nn.Conv2d(width, width, 1, bias=False)
        # For the horizontal stack, then for the vertical one, which has no gate in the last layer.
        self.label = nn.Embedding(labels, (2 if last else 4) * width) if labels else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def label_terms(self, label: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the label adds before the gates: (B, 2C, 1, 1) for the horizontal and for the vertical stack."""
        if self.label is None or label is None:
            return None, None
        table = self.label(label)[:, :, None, None]
        size = self.horizontal.out_channels
        return table[:, :size], None if self.last else table[:, size:]

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The residuals (B, C, h, w) of the vertical and of the horizontal stack."""
        m, end = self.margin, -1 if self.masked else 0
        label_h, label_v = self.label_terms(label)
        v = self.vertical(functional.pad(v, (m, m, m, end)))
        h = self.horizontal(functional.pad(h, (m, end, 0, 0))) + self.across(v)
        return None if self.last else gated(v, label_v), gated(h, label_h)


class GatedPixelCnn(nn.Module):
    """p(codes | label).

    Args:
        config: Its size.
        codes: K.
        grid: (h, w).
        labels: Rows of the label tables: the classes and one for "no label"; 0: no labels.
    """

    def __init__(self, config: PixelCnn, codes: int, grid: tuple[int, int], labels: int = 0) -> None:
        super().__init__()
        width = config.width
        self.grid, self.rate = grid, config.dropout
        self.embedding = nn.Embedding(codes, width)
        self.layers = nn.ModuleList(
            GatedLayer(
                width,
                reach=1 if number else config.first // 2,
                dilation=config.dilations[(number - 1) % len(config.dilations)] if number else 1,
                masked=number == 0,
                last=number == config.layers - 1,
                labels=labels,
            )
            for number in range(config.layers)
        )
        # Of the vertical stack, then of the horizontal one.
        self.place = nn.Parameter(0.02 * torch.randn(1, 2 * width, *grid))
        self.head = nn.Sequential(
            nn.SiLU(), nn.Conv2d(width, config.hidden, 1), nn.SiLU(), nn.Conv2d(config.hidden, codes, 1)
        )

    def forward(self, codes: Tensor, label: Tensor | None = None, seeds: Tensor | None = None) -> Tensor:
        """(B, K, h, w) logits of (B, h, w) codes, (B,) labels; `seeds` (B,) of dropout, None outside training."""
        v = h = self.embedding(codes).permute(0, 3, 1, 2)
        place_v, place_h = self.place.chunk(2, 1)
        for number, layer in enumerate(cast(list[GatedLayer], self.layers)):
            residual_v, residual_h = layer(v, h, label)
            residual_h = layer.out(dropout(residual_h, self.rate, seeds, 2 * number))
            h = residual_h + (place_h if layer.masked else h)
            if residual_v is not None:
                v = dropout(residual_v, self.rate, seeds, 2 * number + 1) + (place_v if layer.masked else v)
        return self.head(h)

    def start_sampling(self, rows: int, label: Tensor | None = None) -> PixelCnnSamplingState:
        """The state of `rows` maps without any code yet, of (rows,) labels."""
        return PixelCnnSamplingState(self, rows, label)


class PixelCnnSamplingState:
    """Sampling with a cache: see the module. It holds reshaped copies of the weights, so other weights need another."""

    @torch.no_grad()
    def __init__(self, network: GatedPixelCnn, rows: int, label: Tensor | None) -> None:
        self.network = network
        self.height, self.width = network.grid
        self.layers = cast(list[GatedLayer], network.layers)
        self.known = 0
        place_v, place_h = network.place.chunk(2, 1)
        self.place_v = place_v
        self.place_h = place_h[0].permute(1, 2, 0).flatten(0, 1)  # (T, C)
        self.taps = [
            layer.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1).contiguous()
            for layer in self.layers
        ]  # (taps * C, 2C), leftmost tap first
        self.kernels = [layer.vertical.weight.permute(0, 2, 3, 1).flatten(1) for layer in self.layers]
        self.outs = [layer.out.weight[:, :, 0, 0].T.contiguous() for layer in self.layers]
        first, last = network.head[1], network.head[3]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        self.head = [(cast(Tensor, m.bias), m.weight[:, :, 0, 0].T.contiguous()) for m in (first, last)]
        self.label_terms = [layer.label_terms(label) for layer in self.layers]
        blank = network.place.new_zeros(rows, self.place_v.shape[1], self.width)
        # Inputs of each layer's vertical convolution: the rows above that it reaches, oldest first.
        self.above = [deque([blank] * layer.margin, layer.margin) for layer in self.layers]
        # Inputs of each layer's horizontal convolution: this row's positions, after a margin.
        self.left = [deque([blank[:, :, 0]] * layer.margin, layer.margin) for layer in self.layers]
        self.blank = blank[:, :, 0]
        self.row: list[Tensor] = []  # embeddings (B, C) of this row's codes
        # Of each layer: what the vertical stack gives to each column (B, 2C) of the horizontal one.
        self.vertical_terms: list[tuple[Tensor, ...]] = []

    def logits(self) -> Tensor:
        """(B, K)."""
        with torch.no_grad():
            column = self.known % self.width
            if column == 0:
                self._compute_vertical_stack(self.known // self.width)
            h = self.blank
            for number, layer in enumerate(self.layers):
                left = self.left[number]
                if layer.masked:
                    x = torch.cat(list(left), 1)
                else:
                    x = torch.cat([left[0], h], 1)
                    left.append(h)
                x = gated(torch.addmm(self.vertical_terms[number][column], x, self.taps[number]))
                h = torch.addmm(self.place_h[self.known] if layer.masked else h, x, self.outs[number])
            for bias, weight in self.head:
                h = torch.addmm(bias, functional.silu(h), weight)
            return h

    def append(self, codes: Tensor) -> None:
        with torch.no_grad():
            vectors = self.network.embedding(codes)
        self.row.append(vectors)
        self.left[0].append(vectors)
        self.known += 1
        if len(self.row) == self.width:
            self.above[0].append(torch.stack(self.row, 2))
            self.row.clear()

    def _compute_vertical_stack(self, row: int) -> None:
        """The vertical stack in this row, and what it gives to each layer of the horizontal one."""
        self.vertical_terms.clear()
        v = self.blank
        for number, layer in enumerate(self.layers):
            m, above = layer.margin, self.above[number]
            self.left[number].extend([self.blank] * m)
            taps = [
                functional.pad(input_row, (m, m))[:, :, start : start + self.width]
                for input_row in (list(above) if layer.masked else [above[0], v])
                for start in range(0, 2 * m + 1, layer.dilation)
            ]
            # One matrix product: torch's convolutions are slow for one row of few maps, more so with dilation.
            x = torch.matmul(self.kernels[number], torch.cat(taps, 1)) + layer.vertical.bias[:, None]  # type: ignore[index]
            label_h, label_v = self.label_terms[number]
            across = torch.matmul(layer.across.weight[:, :, 0, 0], x)
            across = across + layer.horizontal.bias[:, None]  # type: ignore[index]
            across = across if label_h is None else across + label_h[:, :, 0]
            self.vertical_terms.append(across.permute(2, 0, 1).contiguous().unbind(0))
            if not layer.masked:
                above.append(v)
            if layer.last:
                break
            x = gated(x, None if label_v is None else label_v[:, :, 0])
            v = x + self.place_v[:, :, row] if layer.masked else v + x
