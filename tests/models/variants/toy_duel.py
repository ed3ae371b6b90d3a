"""A variant only for tests: two phases with two optimizers, a buffer that counts, and a batch statistic.

`critic` learns to tell images from the constant that `maker` paints; `maker` follows. It has nothing to do with
good pictures: it proves the contract (phases, `parameters_of`, `after_step`, `ctx.accumulate`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.settings import Strict
from vaedist.core.context import Batch, Context
from vaedist.models.contract import Variant


class Config(Strict):
    kind: Literal["toy_duel"] = "toy_duel"
    width: int = 4


class Model(Variant):
    phases = ("critic", "maker")
    compiled = ()

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        width = config.width
        self.critic = nn.Sequential(nn.Linear(spec.pixels, width), nn.Tanh(), nn.Linear(width, 1))
        self.maker = nn.Parameter(torch.zeros(spec.pixels))
        self.register_buffer("brightness", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def parameters_of(self, phase: str) -> Iterable[nn.Parameter]:
        return self.critic.parameters() if phase == "critic" else [self.maker]

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        image = self.to_network(batch["image"]).flatten(1)
        noise = ctx.noise("maker", (image.shape[0], self.spec.pixels)).to(image)
        fake = torch.tanh(self.maker + 0.1 * noise)
        if ctx.phase == "critic":
            ctx.accumulate("brightness", image.sum())
            loss = nn.functional.softplus(self.critic(fake.detach())) + nn.functional.softplus(
                -self.critic(image)
            )
        else:
            # A statistic of the whole batch, added to every row: its gradient must be the one-process one.
            spread = (ctx.mean(fake) - ctx.mean(image)).square().sum()
            loss = nn.functional.softplus(-self.critic(fake)) + spread
        return {"loss": loss.squeeze(1) if loss.ndim == 2 else loss}

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        if ctx.phase != "critic":
            return {}
        self.brightness.copy_(ctx.total("brightness") / (ctx.batch_size * self.spec.pixels))
        self.updates += 1
        return {"brightness": self.brightness}
