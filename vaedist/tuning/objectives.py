"""What a trial's number may be: it must mean the same at every setting that is searched.

A weight that is searched must not enter the number that judges it. The loss of a beta-VAE falls with beta whatever the
model does, and the loss of an InfoVAE with its MMD weight; so `loss` is no objective at all, and each metric refuses
the dimensions that would change what it measures.

| metric | of | better | means another thing where one searches |
|---|---|---|---|
| `kid`, `frechet`, `sliced_wasserstein` | samples from the prior against held-out images | low | - |
| `precision`, `recall`, `density`, `coverage` | the same | high | - |
| `ssim_foreground`, `ssim`, `ms_ssim`, `psnr` | reconstructions, as picture files | high | `augment.denoise` |
| `mse`, `mae` | the same | low | `augment.denoise` |
| `rate` | KL(q(z|x) : p(z)), nats per image | low | - |
| `distortion` | -log p(x|z), nats per image | low | `model.likelihood` |
| `elbo` | -(rate + distortion) | high | `model.likelihood` |
| `iwae` | importance-weighted bound on -log p(x), nats | low | `model.likelihood`, `model.deterministic` |
| `bits_per_image` | positions x log2(codes): a code map written down without a code model | low | - |
| `codes_used`, `perplexity` | of the codebook on held-out images | high | - |

Rate and distortion are both taken without their weights: which of the two a beta buys is what the front between them
shows, and no single number of it is better for being bought with another beta. `iwae` needs a proper likelihood (the
Bernoulli of grey images is none), one for all trials, and a stochastic encoder. More codes always reconstruct better,
so the quality of a codebook stands beside the bits that its images take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from vaedist.core.errors import UserError, did_you_mean
from vaedist.tuning.space import KNEE, Asha, Space
from vaedist.tuning.trial_log import Trial

Mode = Literal["min", "max"]


class Metric(NamedTuple):
    """One row of the table."""

    mode: Mode
    part: Literal["samples", "reconstructions", "terms", "iwae", "codes"]
    """What has to be measured for it."""
    fixed: tuple[str, ...] = ()
    """Settings, with all below them, that change its meaning and so cannot be searched."""


_SHOWN = ("augment.denoise",)
_LIKELIHOOD = ("model.likelihood", *_SHOWN)
METRICS: Mapping[str, Metric] = {
    "kid": Metric("min", "samples"),
    "frechet": Metric("min", "samples"),
    "precision": Metric("max", "samples"),
    "recall": Metric("max", "samples"),
    "density": Metric("max", "samples"),
    "coverage": Metric("max", "samples"),
    "sliced_wasserstein": Metric("min", "samples"),
    "ssim_foreground": Metric("max", "reconstructions", _SHOWN),
    "ssim": Metric("max", "reconstructions", _SHOWN),
    "ms_ssim": Metric("max", "reconstructions", _SHOWN),
    "psnr": Metric("max", "reconstructions", _SHOWN),
    "mse": Metric("min", "reconstructions", _SHOWN),
    "mae": Metric("min", "reconstructions", _SHOWN),
    "rate": Metric("min", "terms"),
    "distortion": Metric("min", "terms", _LIKELIHOOD),
    "elbo": Metric("max", "terms", _LIKELIHOOD),
    "iwae": Metric("min", "iwae", (*_LIKELIHOOD, "model.deterministic")),
    "bits_per_image": Metric("min", "codes"),
    "codes_used": Metric("max", "codes"),
    "perplexity": Metric("max", "codes"),
}

ASHA_METRICS: Mapping[str, tuple[str, ...]] = {
    "mse": _SHOWN,
    "rate": (),
    "distortion": _LIKELIHOOD,
    "kid": (),
}
"""Numbers of validation by which trials may be halved, and what must not be searched beside them."""
_LENGTHS = ("train.steps", "train.epochs", "train.batch_size", "train.validate_every", "train.early_stop")


def check_objectives(space: Space) -> None:
    """Refuse objectives that a searched setting would change the meaning of.

    Raises:
        UserError: naming the objective, the dimension and what to do.
    """
    for objective in space.objectives:
        name = objective.metric
        if name == "loss" or name.startswith("loss/"):
            raise UserError(
                f"space {space.name!r}: the loss cannot be an objective, because the weights in it are not the same in "
                f"all trials: choose among {', '.join(METRICS)}"
            )
        if name not in METRICS:
            raise UserError(
                f"space {space.name!r}: there is no objective {name!r}{did_you_mean(name, METRICS)}"
            )
        metric = METRICS[name]
        if objective.mode not in (None, metric.mode):
            raise UserError(
                f"space {space.name!r}: of {name} the {metric.mode}imum is best: set mode: {metric.mode}, or leave it "
                "out"
            )
        _refuse_dimensions(space, name, metric.fixed)
    if isinstance(space.scheduler, Asha):
        name = space.scheduler.metric
        if name not in ASHA_METRICS:
            raise UserError(
                f"space {space.name!r}: scheduler.metric {name!r} is no number of validation that means the same in "
                f"all trials{did_you_mean(name, ASHA_METRICS)}"
            )
        _refuse_dimensions(space, name, ASHA_METRICS[name])
        for key in space.dimensions:
            if key in _LENGTHS:
                raise UserError(
                    f"space {space.name!r}: asha compares trials after equal numbers of steps, so {key} cannot be "
                    "searched: take it out, or set scheduler.kind: none"
                )


def _refuse_dimensions(space: Space, name: str, fixed: Sequence[str]) -> None:
    for key in space.dimensions:
        for part in fixed:
            if key == part or key.startswith(f"{part}.") or part.startswith(f"{key}."):
                raise UserError(
                    f"space {space.name!r}: {name} means another thing at each {key}, so it cannot judge trials that "
                    "differ in it: take that dimension out, or choose another metric"
                )


def modes(space: Space) -> list[Mode]:
    """Of each objective: `min` or `max`."""
    return [METRICS[objective.metric].mode for objective in space.objectives]


def value_of(measures: Mapping[str, float], metric: str) -> float | None:
    """A measured number by its plain name (`kid` of `kid[vd-1a2b3c4d]`); None if it is not there or not finite."""
    for name, value in measures.items():
        if name.partition("[")[0] == metric and math.isfinite(value):
            return value
    return None


def values_of(space: Space, trial: Trial) -> list[float] | None:
    """A trial's objectives; None if it has not ended, or failed."""
    if trial.status not in ("finished", "stopped early"):
        return None
    found = [value_of(trial.measures, objective.metric) for objective in space.objectives]
    return None if None in found else [value for value in found if value is not None]


# What is best -----------------------------------------------------------------------------------------------


def _costs(space: Space, trial: Trial) -> list[float]:
    """The objectives, turned so that less is better."""
    values = values_of(space, trial)
    assert values is not None
    return [value if mode == "min" else -value for value, mode in zip(values, modes(space), strict=True)]


def pareto_front(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that no other one beats: as good in everything and better in something.

    Trials that were stopped early do not count: they were trained less than others. In the order of the first
    objective, the best first; with one objective it holds the best trials alone.
    """
    held = [trial for trial in trials if trial.status == "finished" and values_of(space, trial) is not None]
    costs = {trial.number: _costs(space, trial) for trial in held}

    def dominated(one: Trial) -> bool:
        mine = costs[one.number]
        return any(
            all(a <= b for a, b in zip(theirs, mine, strict=True)) and theirs != mine
            for theirs in costs.values()
        )

    return sorted(
        (trial for trial in held if not dominated(trial)), key=lambda one: (costs[one.number], one.number)
    )


def best_trial(space: Space, trials: Sequence[Trial]) -> Trial | None:
    """The trial of the front that `pick` names; None before one has finished.

    The knee: each objective is scaled to go from 0, its best on the front, to 1, its worst there, and the trial with
    the smallest distance to 0 in all of them is taken; of equals the one that is better in the first objective.
    """
    ahead = pareto_front(space, trials)
    if not ahead:
        return None
    costs = [_costs(space, trial) for trial in ahead]
    if space.pick != KNEE:
        place = [objective.metric for objective in space.objectives].index(space.pick)
        return min(zip(ahead, costs, strict=True), key=lambda pair: pair[1][place])[0]
    low = [min(column) for column in zip(*costs, strict=True)]
    high = [max(column) for column in zip(*costs, strict=True)]

    def distance(cost: list[float]) -> float:
        parts = [
            (value - least) / (most - least)
            for value, least, most in zip(cost, low, high, strict=True)
            if most > least
        ]
        return math.hypot(*parts)

    return min(zip(ahead, costs, strict=True), key=lambda pair: distance(pair[1]))[0]
