"""Search spaces: what a file may say, the jobs that come out of it, and one sentence for each mistake."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.spaces import DIMENSIONS, MODEL, content, small_space, write_space
from vaedist.config.model_section import model_config
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.nets.quantizers_config import EmaCodebook, Fsq
from vaedist.tuning.dimensions import Integer, LogUniform
from vaedist.tuning.space import Space, differences, load_space, shipped

CODES = {
    "model.codebook": {"kind": "choice", "values": {"ema": {"kind": "ema"}, "fsq": {"kind": "fsq"}}},
    "model.codebook.codes": {
        "kind": "integer",
        "low": 8,
        "high": 64,
        "log": True,
        "when": {"model.codebook": "ema"},
    },
    "model.codebook.levels": {
        "kind": "choice",
        "values": [[4, 4], [5, 4]],
        "when": {"model.codebook": "fsq"},
    },
}
VQ = {"model": {"kind": "vqvae", "codebook": {"kind": "ema"}}, "train": {"steps": 2}}


def test_settings_become_an_ordinary_job() -> None:
    space = small_space(train={"threads": None}, resources={"cpus": 2})
    job = space.job({"model.beta.end": 2.5, "model.latent": 4}, "somewhere", "small-003")
    assert job.model == model_config({**MODEL, "latent": 4, "beta": {"start": 0.0, "end": 2.5, "steps": 4}})
    assert (job.name, job.data.path, job.seed, job.train.threads) == ("small-003", "somewhere", 3, 2)
    assert space.base["model"]["beta"]["end"] == 1.0, "the space itself is left as it is"


def test_a_choice_among_sections_and_dimensions_that_depend_on_it() -> None:
    space = small_space(dimensions=CODES, base=VQ, objectives=[{"metric": "ssim"}])
    low, high = (space.settings_of(dict.fromkeys(CODES, part)) for part in (0.0, 0.999))
    assert low == {"model.codebook": "ema", "model.codebook.codes": 8}
    assert high == {"model.codebook": "fsq", "model.codebook.levels": "[5, 4]"}
    assert space.job(low, "d", "n").model.codebook == EmaCodebook(codes=8)
    assert space.job(high, "d", "n").model.codebook == Fsq(levels=(5, 4))


def test_a_grid_has_every_combination_once() -> None:
    dimensions = {
        "model.beta.end": {"kind": "loguniform", "low": 0.1, "high": 10.0, "points": 3},
        "model.latent": {"kind": "integer", "low": 2, "high": 3},
    }
    found = list(small_space(dimensions=dimensions, search={"kind": "grid"}).combinations())
    assert [one["model.latent"] for one in found] == [2, 3, 2, 3, 2, 3]
    assert [one["model.beta.end"] for one in found] == pytest.approx([0.1, 0.1, 1.0, 1.0, 10.0, 10.0])
    grid = small_space(
        dimensions=CODES | {"model.codebook.codes": {**CODES["model.codebook.codes"], "low": 8, "high": 10}},
        base=VQ,
        objectives=[{"metric": "ssim"}],
        search={"kind": "grid"},
    )
    assert len(list(grid.combinations())) == 3 + 2


def test_ranges_are_even_in_what_they_say() -> None:
    integers = Integer(low=1, high=4)
    counted = Counter(integers.at((place + 0.5) / 400) for place in range(400))
    assert counted == {1: 100, 2: 100, 3: 100, 4: 100}
    octaves = Counter(
        Integer(low=1, high=64, log=True).at((place + 0.5) / 600).bit_length() for place in range(600)
    )
    assert min(octaves[size] for size in (2, 3, 4, 5, 6)) > 60
    wide = LogUniform(low=1e-4, high=1e-2)
    assert (wide.at(0.0), wide.at(1.0)) == (1e-4, 1e-2)
    assert wide.at(0.5) == pytest.approx(1e-3)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"trails": 3}, "unknown key 'trails'; did you mean 'trials'?"),
    "unknown kind": (
        {"dimensions": {"model.latent": {"kind": "loguniforn", "low": 1, "high": 2}}},
        "loguniform",
    ),
    "low above high": (
        {"dimensions": {"model.beta.end": {"kind": "uniform", "low": 2, "high": 1}}},
        "low (2) must be below high (1)",
    ),
    "logarithm of zero": (
        {"dimensions": {"model.beta.end": {"kind": "loguniform", "low": 0, "high": 1}}},
        "low (0) must be above 0",
    ),
    "twice the same": ({"dimensions": {"model.latent": {"kind": "choice", "values": [2, 2]}}}, "twice"),
    "when of nothing": (
        {"dimensions": {"model.latent": {"kind": "choice", "values": [2], "when": {"model.x": 1}}}},
        "'model.x' is no dimension before it",
    ),
    "when of no value": (
        {"dimensions": DIMENSIONS | {"seed": {"kind": "choice", "values": [1], "when": {"model.latent": 3}}}},
        "3 is not a value of that choice",
    ),
    "the data searched": (
        {"dimensions": {"data.path": {"kind": "choice", "values": ["a", "b"]}}},
        "the name and the data are the same for all trials",
    ),
    "a grid without points": ({"search": {"kind": "grid"}}, "a grid takes how many of its values?"),
    "points without a grid": (
        {"dimensions": {"model.beta.end": {"kind": "uniform", "low": 1, "high": 2, "points": 3}}},
        "points has no effect without search.kind: grid",
    ),
    "an objective twice": ({"objectives": [{"metric": "kid"}, {"metric": "kid"}]}, "twice"),
    "picks no objective": ({"pick": "ssim"}, "'ssim' is no objective; Valid: distortion, knee, rate"),
    "a path in the base": (
        {"base": {"data": {"path": "x"}, "model": MODEL, "train": {"steps": 2}}},
        "base.data.path: where the data lie is said by data.path of the space",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(name: str) -> None:
    changes, told = MISTAKES[name]
    with pytest.raises(UserError) as error:
        parse(Space, content() | changes, where="mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert told in str(error.value)


def test_settings_that_make_no_job_name_the_setting() -> None:
    space = small_space(dimensions={"train.batch_size": {"kind": "choice", "values": [0, 8]}})
    with pytest.raises(
        UserError, match=r"train.batch_size=0: train.batch_size: .*greater than or equal to 1"
    ):
        space.job({"train.batch_size": 0}, "d", "n")
    deep = small_space(dimensions={"model.latent.channels": {"kind": "choice", "values": [2]}})
    with pytest.raises(UserError, match=r"model\.latent is a value in the base job, not a section"):
        deep.job({"model.latent.channels": 2}, "d", "n")


def test_a_space_of_ones_own_is_given_by_path(tmp_path: Path) -> None:
    path = write_space(tmp_path / "mine.yaml", small_space())
    assert load_space(str(path)) == small_space()
    changed = load_space(str(path), ["train.steps=99"])
    assert changed.base["train"]["steps"] == 99
    with pytest.raises(UserError, match=r"model\.latent is a dimension of this space"):
        load_space(str(path), ["model.latent=3"])


def test_its_base_may_be_a_job_file(tmp_path: Path) -> None:
    job = {"data": {"path": "elsewhere", "cache": "memory"}, "model": MODEL, "train": {"steps": 7}}
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "base.yaml").write_text(yaml.safe_dump(job))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content() | {"base": "jobs/base.yaml"}))
    space = load_space(str(path))
    assert space.base["train"] == {"steps": 7}
    assert space.base["data"] == {"cache": "memory"}, "where the data lie is the space's to say"


def test_an_unknown_name_lists_those_there_are() -> None:
    assert shipped() == ("beta_vae", "gan", "infovae", "mmdvae", "vqvae")
    with pytest.raises(UserError, match=r"there is no space .infova.; did you mean .infovae."):
        load_space("infova")


def test_only_what_is_free_may_change_while_a_search_goes_on() -> None:
    old = small_space()
    assert differences(old, small_space("elsewhere", trials=99, resources={"cpus": 2})) == []
    found = differences(old, small_space(train={"steps": 13}, search={"kind": "random"}))
    assert {str(one) for one in found} >= {
        "base.train.steps was 12 and is now 13",
        "search.kind was tpe and is now random",
    }
