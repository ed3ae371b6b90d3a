"""Validation: every sample of a split once, with the final value of every loss weight.

Numbers are sums and counts, added in float64 and over ranks in rank order; rows that only pad the last batch
are masked. Noise belongs to the sample, so batch size and world size do not enter.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vaedist.config import Job
from vaedist.context import Batch
from vaedist.models.contract import Variant
from vaedist.training.dist import Group, GroupSampleContext
from vaedist.training.step import precision

_SHOWN = 8


@torch.no_grad()
def validate(
    model: Variant, batches: Iterable[Batch], job: Job, group: Group, step: int
) -> tuple[dict[str, float], Tensor | None]:
    """Mean of every term over the split, and this process's first uint8 images for a picture.

    With several phases each is evaluated, and a term is named `term/phase`.
    """
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64)
    shown: list[Tensor] = []
    model.eval()
    for batch in batches:
        mask = batch["mask"]
        count += float(mask.sum())
        if sum(map(len, shown)) < _SHOWN:
            shown.append(batch["image"][mask])
        for phase in model.phases:
            ctx = GroupSampleContext(
                group,
                seed=job.seed,
                samples=batch["sample"],
                step=step,
                batch_size=len(batch["sample"]) * group.world,
            )
            ctx.phase = phase
            with precision(job, group.device):
                terms = model(batch, ctx)
            suffix = "" if len(model.phases) == 1 else f"/{phase}"
            for name, value in terms.items():
                total = torch.where(mask, value.double(), 0.0).sum().cpu()
                sums[f"{name}{suffix}"] = sums.get(f"{name}{suffix}", 0.0) + total
    names = sorted(sums)
    everything = group.total(torch.stack([count, *(sums[name] for name in names)]))
    means = (everything[1:] / everything[0]).tolist()
    first = torch.cat(shown)[:_SHOWN] if shown else None
    return dict(zip(names, means, strict=True)), first
