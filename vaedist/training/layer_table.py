"""The layer table: what a model is made of, on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vaedist.config.job import Job
from vaedist.config.settings import expand
from vaedist.core.context import Batch, LaneContext
from vaedist.data.format.index import Index
from vaedist.distributed.process_group import Group
from vaedist.models.contract import build
from vaedist.training.tokenizer_codes import resolve_tokenizer


def layer_table(job: Job) -> str:
    """One row per layer that computes (name, type, output of one image, parameters), then the totals.

    Layers appear in the order in which they first run; parameters held outside such a layer are counted too.

    Raises:
        UserError: the job's data or model section is wrong.
    """
    index = Index.open(expand(job.data.path, "data.path"))
    spec, job = index.spec, resolve_tokenizer(job, index, Group(torch.device("cpu")))
    model = build(job.model, spec, job.seed).eval()
    rows: dict[str, tuple[str, str, str]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            shape = "x".join(str(size) for size in output.shape[1:]) if isinstance(output, Tensor) else ""
            rows.setdefault(name, (type(layer).__name__, shape, f"{_count(layer):,}"))

        return hook

    for name, layer in model.named_modules():
        if name and not any(layer.children()):
            layer.register_forward_hook(watch(name))
    batch: Batch = {"label": torch.zeros(1, dtype=torch.int64), "key": [""], "sample": [0]}
    if model.reads == "codes":
        batch["codes"] = torch.zeros(1, *model.latent_shape, dtype=torch.int64)
    else:
        batch["image"] = torch.zeros(1, *spec.image_shape, dtype=torch.uint8)
    with torch.no_grad():
        for phase in model.phases:
            ctx = LaneContext(seed=job.seed, step=0, phase=phase, batch_size=1, lanes=1)
            model(batch, ctx)

    lines = [("layer", "type", "output", "parameters"), *((name, *row) for name, row in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    table = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {count:>{widths[3]}}"
        for name, kind, shape, count in lines
    ]
    buffers = sum(buffer.numel() for buffer in model.buffers())
    total = f"{job.kind} on {'x'.join(map(str, spec.image_shape))}: {_count(model):,} parameters"
    if frozen := sum(_count(model.get_submodule(name)) for name in model.pretrained):
        total += f", {frozen:,} of them frozen"
    return "\n".join([*table, total + (f", {buffers:,} numbers in buffers" if buffers else "")])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
