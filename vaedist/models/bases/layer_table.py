"""The layer table: what a model is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vaedist.core.context import Batch, LaneContext
from vaedist.models.contract import Variant


def layer_table(model: Variant) -> str:
    """One row per layer that computes (name, type, output shape of one image, parameters), then the totals.

    Layers appear in the order in which they first run; the rest of the parameters follows in one row.

    Args:
        model: In evaluation mode. It runs once, on an image or codes of zeros.
    """
    rows: dict[str, tuple[str, str, int]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if name and not any(layer.children()):

            def record(layer: nn.Module, _: Any, output: Any, name: str = name) -> None:
                shape = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else ""
                rows.setdefault(name, (type(layer).__name__, shape, _count(layer)))

            hooks.append(layer.register_forward_hook(record))
    device = next(model.parameters()).device
    batch: Batch = {"label": torch.zeros(1, dtype=torch.int64, device=device), "key": [""], "sample": [0]}
    if model.reads == "codes":
        batch["codes"] = torch.zeros(1, *model.latent_shape, dtype=torch.int64, device=device)
    else:
        batch["image"] = torch.zeros(1, *model.spec.image_shape, dtype=torch.uint8, device=device)
    with torch.no_grad():
        for phase in model.phases:
            ctx = LaneContext(seed=0, step=0, phase=phase, batch_size=1, lanes=1, device=device)
            ctx.training = (
                False  # in training a batch statistic, such as InfoVAE's MMD, needs more than one image
            )
            model(batch, ctx)
    for hook in hooks:
        hook.remove()

    total = _count(model)
    if rest := total - sum(count for *_, count in rows.values()):
        rows["(others)"] = ("", "", rest)
    lines = [("layer", "type", "output", "parameters")]
    lines += [(name, kind, shape, f"{count:,}") for name, (kind, shape, count) in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {count:>{widths[3]}}"
        for name, kind, shape, count in lines
    ]
    kind = getattr(model.config, "kind", type(model).__name__)
    last = f"{kind} on {'x'.join(map(str, model.spec.image_shape))}: {total:,} parameters"
    if frozen := sum(_count(model.get_submodule(name)) for name in model.pretrained):
        last += f", {frozen:,} of them frozen"
    if buffers := sum(buffer.numel() for buffer in model.buffers()):
        last += f", {buffers:,} numbers in buffers"
    return "\n".join([*table, last])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
