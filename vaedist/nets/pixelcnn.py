"""Gated PixelCNN over a map of codes.

van den Oord et al., "Conditional image generation with PixelCNN decoders": two stacks of convolutions. The
vertical one sees the rows above, the horizontal one the codes to the left in the same row and, through a 1x1
convolution, the vertical one at its place; together they see all that comes before and have no blind spot. Each
layer is (their equation 3)

    y = tanh(W_a * x + V_a^T h) . sigmoid(W_b * x + V_b^T h),     h: the label,

with a residual connection around it (here in both stacks). Masks of type A hide a position from itself in the
first layer, those of type B let later layers look at their own position. As the hidden taps of a mask are always
the same ones, no kernel here has them: type A is r rows above, or r columns to the left; type B has the own row or
column besides.

Two additions that small sets of aligned images want: layers after the first are dilated in turn, so that a dozen
of them see all of a 32x32 map, and a trained vector for every position joins both stacks after the first layer
(where a head ends is known before its codes are).

`Steps` is the cache. The vertical stack needs whole rows above and nothing of the own one, so a row of it is
computed at once when a row begins, from the one earlier row that each kernel reaches. Within a row a code moves
the horizontal stack alone: one position of it, by two matrix products per layer.
"""

from __future__ import annotations

from collections import deque
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.nets.dropout import dropout
from vaedist.nets.pixelcnn_config import PixelCnn


def gate(x: Tensor) -> Tensor:
    """(B, 2C, ...) to (B, C, ...)."""
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """One gated layer.

    Args:
        width: C, channels of both stacks.
        reach: r, taps above and to the left.
        dilation: Distance between taps.
        masked: Type A: the own position is hidden, and nothing goes around the layer.
        last: The vertical stack ends here.
        labels: Rows of the label's table; 0: none.
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
        # For the horizontal stack, then for the vertical one, whose gate after the last layer nobody reads.
        self.label = nn.Embedding(labels, (2 if last else 4) * width) if labels else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def shifts(self, label: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the label adds before the gates: (B, 2C, 1, 1) for the horizontal and for the vertical stack."""
        if self.label is None or label is None:
            return None, None
        table = self.label(label)[:, :, None, None]
        size = self.horizontal.out_channels
        return table[:, :size], None if self.last else table[:, size:]

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """What to add to (B, C, h, w) of the vertical and of the horizontal stack."""
        m, hidden = self.margin, -1 if self.masked else 0
        for_h, for_v = self.shifts(label)
        v = self.vertical(functional.pad(v, (m, m, m, hidden)))
        h = self.horizontal(functional.pad(h, (m, hidden, 0, 0))) + self.across(v)
        h = gate(h if for_h is None else h + for_h)
        if self.last:
            return None, h
        return gate(v if for_v is None else v + for_v), h


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
        for number, layer in enumerate(cast(list[GatedLayer], self.layers)):
            more_v, more_h = layer(v, h, label)
            more_h = layer.out(dropout(more_h, self.rate, seeds, 2 * number))
            if more_v is not None:
                more_v = dropout(more_v, self.rate, seeds, 2 * number + 1)
            if number == 0:
                place_v, place_h = self.place.chunk(2, 1)
                v, h = more_v + place_v, more_h + place_h
            else:
                v, h = v if more_v is None else v + more_v, h + more_h
        return self.head(h)

    def start_sampling(self, rows: int, label: Tensor | None = None) -> PixelCnnSamplingState:
        """`rows` maps begun, of (B,) labels."""
        return PixelCnnSamplingState(self, rows, label)


class PixelCnnSamplingState:
    """Cached sampling: see the module. Holds weights as the products want them; make it anew for other weights."""

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
        self.head = [(cast(Tensor, one.bias), one.weight[:, :, 0, 0].T.contiguous()) for one in (first, last)]
        self.shifts = [layer.shifts(label) for layer in self.layers]
        blank = network.place.new_zeros(rows, self.place_v.shape[1], self.width)
        # Inputs of each layer's vertical convolution: the rows above that it reaches, oldest first.
        self.above = [deque([blank] * layer.margin, layer.margin) for layer in self.layers]
        # Inputs of each layer's horizontal convolution: this row's positions, after a margin.
        self.before = [deque([blank[:, :, 0]] * layer.margin, layer.margin) for layer in self.layers]
        self.blank = blank[:, :, 0]
        self.row: list[Tensor] = []  # embeddings (B, C) of this row's codes
        self.from_above: list[tuple[Tensor, ...]] = []

    def logits(self) -> Tensor:
        """(B, K)."""
        with torch.no_grad():
            column = self.known % self.width
            if column == 0:
                self._begin_row(self.known // self.width)
            size = self.blank.shape[1]
            h = self.blank
            for number, layer in enumerate(self.layers):
                seen, base = self.before[number], self.from_above[number][column]
                if layer.masked:
                    x = torch.cat(list(seen), 1)
                else:
                    x = torch.cat([seen[0], h], 1)
                    seen.append(h)
                x = torch.addmm(base, x, self.taps[number])
                x = torch.tanh(x[:, :size]) * torch.sigmoid(x[:, size:])
                h = torch.addmm(self.place_h[self.known] if layer.masked else h, x, self.outs[number])
            for bias, weight in self.head:
                h = torch.addmm(bias, functional.silu(h), weight)
            return h

    def append(self, codes: Tensor) -> None:
        with torch.no_grad():
            known = self.network.embedding(codes)
        self.row.append(known)
        self.before[0].append(known)
        self.known += 1
        if len(self.row) == self.width:
            self.above[0].append(torch.stack(self.row, 2))
            self.row.clear()

    def _begin_row(self, row: int) -> None:
        """The vertical stack in this row, and what it gives to each layer of the horizontal one."""
        self.from_above.clear()
        v = self.blank
        for number, layer in enumerate(self.layers):
            m, above = layer.margin, self.above[number]
            self.before[number].extend([self.blank] * m)
            reached = list(above) if layer.masked else [above[0], v]
            taps = [
                functional.pad(one, (m, m))[:, :, at : at + self.width]
                for one in reached
                for at in range(0, 2 * m + 1, layer.dilation)
            ]
            # One product: for one row of few maps torch's convolutions take a slow way, more so with dilation.
            x = torch.matmul(self.kernels[number], torch.cat(taps, 1)) + layer.vertical.bias[:, None]  # type: ignore[index]
            for_h, for_v = self.shifts[number]
            across = torch.matmul(layer.across.weight[:, :, 0, 0], x)
            across = across + layer.horizontal.bias[:, None]  # type: ignore[index]
            across = across if for_h is None else across + for_h[:, :, 0]
            self.from_above.append(across.permute(2, 0, 1).contiguous().unbind(0))
            if not layer.masked:
                above.append(v)
            if layer.last:
                break
            x = gate(x if for_v is None else x + for_v[:, :, 0])
            v = x + self.place_v[:, :, row] if layer.masked else v + x
