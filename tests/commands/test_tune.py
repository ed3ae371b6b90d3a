"""`vaedist-tune` as typed: what it says when something is missing, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.spaces import small_space, write_space
from vaedist.config.settings import parse
from vaedist.runs.run_lock import RunLock
from vaedist.tune import main
from vaedist.tuning.space import Space


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VAEDIST_DATA", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command that is refused."""
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("vaedist-tune: error: ")
    return line.removeprefix("vaedist-tune: error: ")


@pytest.mark.usefixtures("elsewhere")
def test_missing_data_name_the_command_that_makes_them(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "--space", "infovae")
    assert told == (
        "there are no shards in shards/oasis64 (space 'infovae'): make them with `vaedist-shard FOLDER --size 64 --out "
        "shards/oasis64` and say where with --data, or try the search on built-in images with --data phantom"
    )
    assert not Path("runs/tune_infovae").exists(), "a mistake leaves no folder behind"
    assert refused(capsys, "--space", "infovae", "--data", "other").startswith(
        "there are no shards in other (--data)"
    )


@pytest.mark.usefixtures("elsewhere")
def test_the_environment_says_where_the_data_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAEDIST_DATA", "here/they/are")
    assert refused(capsys, "--space", "vqvae").startswith(
        "there are no shards in here/they/are ($VAEDIST_DATA)"
    )


@pytest.mark.usefixtures("elsewhere")
def test_an_unknown_space_and_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'vqvae'" in refused(capsys, "--space", "vqvaes")
    assert refused(capsys, "--space", "./mine.yaml").startswith("cannot read mine.yaml: No such file")


@pytest.mark.usefixtures("elsewhere")
def test_two_searches_in_one_folder_are_refused(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path / "space.yaml", small_space(phantom))
    (tmp_path / "search").mkdir()
    with RunLock.acquire(tmp_path / "search"):
        told = refused(capsys, "--space", str(space), "--run-dir", "search")
    assert str(tmp_path / "search" / "lock") in told
    assert not (tmp_path / "search" / "trials.jsonl").exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_space_that_does_not_fit_the_data_is_refused_before_ray_is_started(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = small_space(phantom, objectives=[{"metric": "codes_used"}])
    space = write_space(tmp_path / "space.yaml", codes)
    assert "the objective codes_used does not fit its base job" in refused(capsys, "--space", str(space))


@pytest.mark.usefixtures("elsewhere")
def test_a_try_that_is_too_short_is_warned_of_before_ray_is_started(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path / "space.yaml", small_space(phantom))
    assert main(["--space", str(space), "train.steps=2", "--workers-per-trial", "4000"]) == 2
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith("warning: a trial of space 'small' has 2 steps, but weights of the loss move")
    assert err.startswith("vaedist-tune: error: 4000 workers need 4000 CPUs"), "Ray was not started for this"


def test_a_space_is_printed_with_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--space", "beta_vae", "--trials", "5", "train.steps=9", "--print-space"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    space = parse(Space, content, where="what was printed")
    assert (space.trials, space.base["train"]["steps"], space.measure.samples) == (5, 9, 512)


def test_a_dimension_is_not_set_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "--space", "beta_vae", "model.beta.end=2")
    assert told.startswith("model.beta.end is a dimension of this space: to fix it, take the dimension out")
