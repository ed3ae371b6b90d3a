"""Which settings to try next: a pure function of the space, the trial's number and what is known of the others.

Nothing is kept between two questions. A search that was killed and goes on asks with the same record and gets the
same answer, whoever asks.

| kind | how |
|---|---|
| `tpe` | Optuna's tree-structured Parzen estimator: settings that were good are likelier; those being tried now count |
| | as bad, so that concurrent trials spread out; of several objectives by domination and hypervolume |
| `random` | independent draws |
| `grid` | the combination of that number |

Bergstra, Bardenet, Bengio, Kegl: Algorithms for hyper-parameter optimization (2011). Ozaki et al.: Multiobjective
tree-structured Parzen estimator (2022). Akiba et al.: Optuna (2019).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from vaedist.tuning.dimensions import Categorical, Integer, LogUniform, Setting
from vaedist.tuning.objectives import modes, values_of
from vaedist.tuning.space import Grid, Random, Space, Tpe
from vaedist.tuning.trial_log import Trial


def propose(space: Space, number: int, known: Sequence[Trial]) -> dict[str, Setting] | None:
    """Settings of trial `number`; None where a grid has no more.

    Args:
        space: The space.
        number: Of the trial, from 0.
        known: All trials before it, ended or not, in order of their numbers.
    """
    if isinstance(space.search, Grid):
        return next(itertools.islice(space.combinations(), number, None), None)
    if isinstance(space.search, Random):
        return _random(space, space.search.seed, number)
    ended = [trial for trial in known if values_of(space, trial) is not None]
    if len(ended) < space.search.startup:
        # Not Optuna's start: its random draws would depend on how many trials are being tried right now.
        return _random(space, space.search.seed, number)
    return _tpe(space, space.search, number, known)


def _random(space: Space, seed: int, number: int) -> dict[str, Setting]:
    import numpy as np

    draws = np.random.Generator(np.random.PCG64([seed, number])).random(len(space.dimensions))
    return space.settings_of(dict(zip(space.dimensions, draws.tolist(), strict=True)))


def _tpe(space: Space, search: Tpe, number: int, known: Sequence[Trial]) -> dict[str, Setting]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=search.seed + number, n_startup_trials=0, multivariate=True, constant_liar=True
        )
        ways = optuna.study.StudyDirection
        study = optuna.create_study(
            directions=[ways.MINIMIZE if mode == "min" else ways.MAXIMIZE for mode in modes(space)],
            sampler=sampler,
        )
    distributions = {key: _distribution(space, key) for key in space.dimensions}
    for trial in known:
        values = values_of(space, trial)
        state = optuna.trial.TrialState
        study.add_trial(
            optuna.trial.create_trial(
                state=state.RUNNING if not trial.ended else state.FAIL if values is None else state.COMPLETE,
                values=values if trial.ended else None,
                params=dict(trial.settings),
                distributions={key: distributions[key] for key in trial.settings},
            )
        )
    asked = study.ask()
    settings: dict[str, Setting] = {}
    for key, dimension in space.dimensions.items():
        if dimension.exists(settings):
            settings[key] = _suggest(asked, key, distributions[key])
    return settings


def _suggest(trial: Any, key: str, distribution: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(key, distribution.low, distribution.high, log=distribution.log)


def _distribution(space: Space, key: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    dimension = space.dimensions[key]
    if isinstance(dimension, Categorical):
        return CategoricalDistribution(dimension.grid())
    if isinstance(dimension, Integer):
        return IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogUniform))
