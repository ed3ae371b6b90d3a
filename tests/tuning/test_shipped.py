"""Every space that is shipped is loaded, and its trials are built, trained two steps and measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.conftest import pack_phantom
from vaedist.data.format.index import Index
from vaedist.distributed.process_group import Group
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit
from vaedist.tuning.dimensions import Categorical
from vaedist.tuning.feasibility import check_settings, plan_search, schedules_end, steps
from vaedist.tuning.measure import measure
from vaedist.tuning.objectives import value_of
from vaedist.tuning.samplers import propose
from vaedist.tuning.space import SHIPPED, Space, load_space, shipped

SHORT = """
    train.steps=2 train.batch_size=4 train.log_every=1 train.validate_every=2 train.save_every=2 data.cache=none
    train.monitor.images=16
""".split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Of the smallest size that every body divides."""
    return Index.open(pack_phantom(tmp_path_factory.mktemp("spaces") / "shards", size=32))


def corners(space: Space) -> list[dict[str, object]]:
    """A trial for each option of the first choice, or the middle of everything where there is none."""
    key = next((key for key, one in space.dimensions.items() if isinstance(one, Categorical)), None)
    parts = [0.5] if key is None else [0.01, 0.99]
    return [
        dict(space.settings_of({name: part if name == key else 0.5 for name in space.dimensions}))
        for part in parts
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_its_trials_train_and_have_the_objectives(name: str, tiny: Index, tmp_path: Path) -> None:
    space = load_space(name, SHORT)
    space = space.model_copy(update={"measure": space.measure.model_copy(update={"samples": 8})})
    plan_search(space, tiny)
    threads = torch.get_num_threads()
    try:
        for number, settings in enumerate(corners(space)):
            run = tmp_path / str(number)
            job = space.job(settings, str(tiny.folder), f"{name}-{number}")  # type: ignore[arg-type]
            outcome = fit(job, run, group=Group.join("cpu"), options=FitOptions(quiet=True))
            assert (outcome.status, outcome.step) == ("finished", 2)
            found = measure(run, space)
            for objective in space.objectives:
                value = value_of(found, objective.metric)
                assert value is not None and math.isfinite(value)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", shipped())
def test_every_trial_that_it_can_propose_is_one(name: str, tiny: Index) -> None:
    """Whole schedules fit into the length, and all settings make a model."""
    space = load_space(name)
    base = space.job({}, str(tiny.folder), name)
    assert schedules_end(space, tiny) < steps(base, tiny)
    random = space.model_copy(update={"search": space.search.model_copy(update={"startup": 99})})
    for number in range(8):
        settings = propose(random, number, [])
        assert settings is not None
        check_settings(space, settings, tiny)
    assert space.trials >= 12


@pytest.mark.parametrize("name", shipped())
def test_its_file_explains_its_choice(name: str) -> None:
    text = (SHIPPED / f"{name}.yaml").read_text()
    for part in ("Searched", "Judged by", "Cost", "Expected", "Command"):
        assert f"\n# {part}: " in text, f"what it says about: {part}"
    assert f"vaedist-tune --space {name}" in text
    assert load_space(name).name == name
    assert load_space(name).data.make in text
