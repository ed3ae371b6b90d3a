"""How much of a latent is used, and the alarm where all or part of it carries no information on the image.

The loss of a variational autoencoder may be smallest where the posterior equals the prior and the decoder ignores z
(posterior collapse): wholly, or in some dimensions. Per unit j, over a whole split:

    KL_j = mean over x of KL(q(z_j | x) || p(z_j))          in nats
    V_j  = variance over x of the posterior's mean of z_j   active where V_j > 0.01

Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", section 5, count active units so. For a standard
normal prior KL_j >= mean of mu_j^2 / 2 >= V_j / 2, so a unit with KL_j <= 0.005 is inactive by that rule already; it
counts as well, because with a prior per class the mean varies with the class although z carries nothing.

A unit is one number of a vector, or one channel of a map: its KL is then summed over positions, and its V is that of
the position where it is largest.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vaedist.core.errors import NotDefined, UserError
from vaedist.distributed.process_group import Group
from vaedist.evaluation.metrics.latents import by_unit, is_active
from vaedist.models.contract import Posterior

Units = Literal["dimensions", "channels"]


class Collapse(NamedTuple):
    """The alarm: which part of a latent carries nothing."""

    step: int
    extent: Literal["total", "partial"]
    active: int
    units: int
    what: Units
    kl: float | None
    """Of the whole latent, in nats per image; None for an encoder without a density."""

    def __str__(self) -> str:
        rate = "" if self.kl is None else f", KL {self.kl:.4g} nats per image"
        if self.extent == "total":
            return (
                f"posterior collapse (total) at step {self.step}: none of the {self.units} latent {self.what} is "
                f"active{rate}: the decoder works without the latent. Try free bits, a lower beta, or a beta that "
                "rises from 0"
            )
        return (
            f"posterior collapse (partial) at step {self.step}: {self.units - self.active} of {self.units} latent "
            f"{self.what} carry nothing{rate}. Free bits or a lower beta would use them; a smaller latent would do "
            "without them"
        )

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint and for JSON; `from_json` takes it back."""
        return {**self._asdict(), "told": str(self)}

    @classmethod
    def from_json(cls, content: Any, where: object) -> Collapse | None:
        """What `to_json` gave; None for None.

        Raises:
            UserError: it is something else: the file is of another making.
        """
        if content is None:
            return None
        try:
            step, active, units = (int(content[name]) for name in ("step", "active", "units"))
            extent, what, kl = content["extent"], content["what"], content["kl"]
            if extent not in ("total", "partial") or what not in ("dimensions", "channels"):
                raise ValueError
            return cls(step, extent, active, units, what, None if kl is None else float(kl))
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"{where}: its record of posterior collapse is not one that vaedist-train writes"
            ) from None


class Usage(NamedTuple):
    """What each unit of a latent carries, over a split."""

    variance: list[float]
    kl: list[float] | None
    what: Units

    @property
    def active(self) -> int:
        """Units that carry information."""
        kl = None if self.kl is None else torch.tensor(self.kl, dtype=torch.float64)
        return int(is_active(torch.tensor(self.variance, dtype=torch.float64), kl).sum())

    def collapse(self, step: int) -> Collapse | None:
        """The alarm, where a unit is inactive."""
        units, active = len(self.variance), self.active
        if active == units:
            return None
        extent: Literal["total", "partial"] = "partial" if active else "total"
        return Collapse(step, extent, active, units, self.what, None if self.kl is None else sum(self.kl))


class UsageCounter:
    """Adds up posteriors, batch by batch and over ranks, in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._rows = 0.0
        self._has_kl = True

    @property
    def used(self) -> bool:
        """Whether anything was added; on all ranks or on none, because all take as many batches."""
        return self._sums is not None

    def add(self, posterior: Posterior, mask: Tensor) -> None:
        """One batch; rows where `mask` (B,) is False only pad it."""
        mean = posterior.mean[mask].double()
        try:
            kl = posterior.kl()[mask].double()
        except NotDefined:
            kl, self._has_kl = torch.zeros_like(mean), False
        sums = torch.stack([mean.sum(0), mean.square().sum(0), kl.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows += float(len(mean))

    def result(self, group: Group) -> Usage:
        """Over all ranks; the same bits on each. Every rank has added a batch."""
        assert self._sums is not None
        sums = self._sums.cpu()
        count = torch.tensor([self._rows], dtype=torch.float64)
        total = group.total(torch.cat([count, sums.flatten()]))
        mean, square, rate = (total[1:] / total[0]).view(sums.shape)
        what: Units = "channels" if mean.ndim > 1 else "dimensions"
        variance, kl = by_unit((square - mean.square()).clamp(min=0), rate if self._has_kl else None)
        return Usage(variance.tolist(), None if kl is None else kl.tolist(), what)
