"""A whole search without Ray: trials one after the other, with kills, stops and failures wherever they can be."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.spaces import MODEL, TRAIN, small_space
from vaedist import evaluate
from vaedist.config.job import Job
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.distributed.process_group import Group
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.stop_request import POLL_SECONDS
from vaedist.train import main as train_door
from vaedist.training.loop import fit
from vaedist.tuning import results, trial_run
from vaedist.tuning.controller import SearchController
from vaedist.tuning.space import Space
from vaedist.tuning.trial_log import Record, Trial


@pytest.fixture(scope="module")
def index(phantom: Path) -> Index:
    return Index.open(phantom)


def train(job: Job, place: Path) -> Outcome:
    return fit(job, place, group=Group.join("cpu"), options=FitOptions(quiet=True))


class Killed(Exception):
    """Stands for a process that is no more: nothing after it is done."""


def opened(folder: Path, space: Space, index: Index, lines: list[str] | None = None) -> SearchController:
    folder.mkdir(exist_ok=True)
    return SearchController.open(folder, space, index, (lines if lines is not None else []).append)


def drive(search: SearchController, training: Callable[[Job, Path], Outcome] = train) -> list[int]:
    """What an engine does, one trial at a time; the numbers that were trained."""
    done = []
    while (one := search.next_trial()) is not None:
        answer = trial_run.run_trial(search.record.folder, one.number, str(search.index.folder), training)
        search.on_trial_end(one.number, json.loads(json.dumps(answer)))
        done.append(one.number)
    return done


def read(folder: Path) -> list[Trial]:
    record = Record.read(folder)
    assert record is not None
    return record.trials


def numbers(folder: Path) -> list[dict[str, float]]:
    return [one.measures for one in read(folder)]


@pytest.fixture(scope="module")
def whole(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed search of three trials."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    search = opened(folder, small_space(), index)
    assert drive(search) == [0, 1, 2]
    assert search.complete
    results.write_all(search.record)
    return folder


def test_a_search_leaves_a_table_the_best_run_figures_and_hparams(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "results.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert {"model.beta.end", "model.latent", "rate", "distortion", "ssim_foreground"} <= set(rows[0])
    assert [float(row["rate"]) for row in rows] == [one.measures["rate"] for one in read(whole)]
    chosen = next(row for row in rows if row["best"] == "1")
    assert os.readlink(whole / "best") == chosen["run"]
    assert (whole / "best" / "job.yaml").exists()
    assert {path.name for path in (whole / "figures").iterdir()} == {
        "dimensions.png",
        "rate_distortion.png",
        "curves.png",
    }
    for path in (whole / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "tensorboard").iterdir()) == ["000", "001", "002"]


def test_a_trials_number_is_the_direct_runs_digit_for_digit(whole: Path, tmp_path: Path) -> None:
    """By the doors: vaedist-train of its job file, vaedist-evaluate on the validation split."""
    job, run = whole / "trials" / "002" / "job.yaml", tmp_path / "direct"
    assert train_door([str(job), "--run-dir", str(run), "--device", "cpu", "-q"]) == 0
    asked = ["--split", "validate", "--importance", "0", "--no-baselines", "--device", "cpu"]
    assert evaluate.main([str(run), *asked]) == 0
    told = json.loads((run / "evaluation" / "validate" / "metrics.json").read_text())
    expected = {
        name: section["mean"] for part in ("terms", "metrics") for name, section in told[part].items()
    }
    found = numbers(whole)[2]
    assert found == {name: value for name, value in expected.items() if value is not None}
    assert {"rate", "distortion", "elbo", "ssim_foreground", "psnr"} <= set(found)


def test_killed_between_any_two_trials_it_ends_the_same(whole: Path, index: Index, tmp_path: Path) -> None:
    """What the driver knew is forgotten after each trial; the record and the run folders are all that is left."""
    folder = tmp_path / "search"
    for number in range(3):
        search = opened(folder, small_space(), index)
        one = search.next_trial()
        assert one is not None and one.number == number
        search.on_trial_end(number, trial_run.run_trial(folder, number, str(index.folder), train))
    assert opened(folder, small_space(), index).next_trial() is None
    assert [one.settings for one in read(folder)] == [one.settings for one in read(whole)]
    assert numbers(folder) == numbers(whole)


def test_killed_in_a_trial_it_goes_on_from_its_checkpoint(whole: Path, index: Index, tmp_path: Path) -> None:
    folder, kept = tmp_path / "search", list[Outcome]()

    def dies(job: Job, place: Path) -> Outcome:
        short = job.model_copy(update={"train": job.train.model_copy(update={"steps": 8})})
        if place.name == "001":
            kept.append(train(short, place))
            raise Killed
        return train(job, place)

    with pytest.raises(Killed):
        drive(opened(folder, small_space(), index), dies)
    assert [one.ended for one in read(folder)] == [True, False]
    started: list[int] = []

    def watched(job: Job, place: Path) -> Outcome:
        started.append(int(place.name))
        outcome = train(job, place)
        if place.name == "001":
            starts = json.loads((place / "provenance.json").read_text())
            assert [start["start_step"] for start in starts] == [0, 8]
        return outcome

    lines: list[str] = []
    assert drive(opened(folder, small_space(), index, lines), watched) == started == [1, 2]
    assert lines[0].startswith("trial 1 goes on: ")
    assert [one.settings for one in read(folder)] == [one.settings for one in read(whole)]
    assert [one["rate"] for one in numbers(folder)] == pytest.approx([one["rate"] for one in numbers(whole)])


def test_more_trials_are_the_same_search_with_more_trials(whole: Path, index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    assert drive(opened(folder, small_space(trials=1), index)) == [0]
    assert drive(opened(folder, small_space(trials=3), index)) == [1, 2]
    assert numbers(folder) == numbers(whole)
    assert opened(folder, small_space(trials=2), index).complete


def test_another_space_or_other_data_are_refused(whole: Path, index: Index, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.train\.steps was 12 and is now 13\. Set it back"):
        opened(whole, small_space(train={"steps": 13}), index)
    from tests.conftest import pack_phantom

    other = Index.open(pack_phantom(tmp_path / "other", size=24))
    with pytest.raises(UserError, match="holds a search on other data"):
        opened(whole, small_space(), other)


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(index: Index, tmp_path: Path) -> None:
    rates = {"train.optim.main.learning_rate": {"kind": "choice", "values": [1e-3, 1e30]}}
    base = {"seed": 3, "model": MODEL, "train": TRAIN | {"max_bad_steps": 2}}
    space = small_space(base=base, dimensions=rates, search={"kind": "grid"}, trials=2)
    lines: list[str] = []
    search = opened(tmp_path / "search", space, index, lines)
    assert drive(search) == [0, 1]
    good, bad = read(tmp_path / "search")
    assert (good.status, bad.status) == ("finished", "failed")
    assert bad.reason is not None and "non-finite" in bad.reason
    assert any(line.startswith("trial 1 failed: ") for line in lines)
    assert search.best() is search.record.trials[0]


def test_settings_that_make_no_model_have_failed_without_training(index: Index, tmp_path: Path) -> None:
    base = {"model": MODEL | {"encoder": {"kind": "conv", "width": 8, "downsample": 4}}, "train": TRAIN}
    sizes = {"model.encoder.downsample": {"kind": "choice", "values": [5, 4]}}
    space = small_space(base=base, dimensions=sizes, search={"kind": "grid"}, trials=2)
    assert drive(opened(tmp_path / "search", space, index)) == [1]
    bad, good = read(tmp_path / "search")
    assert bad.status == "failed" and "downsample" in (bad.reason or "")
    assert good.status == "finished"


def test_when_the_first_ones_all_fail_the_search_ends(index: Index, tmp_path: Path) -> None:
    search = opened(tmp_path / "search", small_space(trials=9), index)
    for _ in range(3):
        one = search.next_trial()
        assert one is not None
        search.on_trial_end(one.number, None)
    assert search.next_trial() is None
    assert "the first 3 trials all failed, the last one because: its process died" in str(search.error)


def test_an_error_that_no_trial_escapes_ends_the_search_and_leaves_the_trial_unfinished(
    index: Index, tmp_path: Path
) -> None:
    def full(job: Job, place: Path) -> Outcome:
        raise UserError("no room to write a checkpoint")

    search = opened(tmp_path / "search", small_space(), index)
    assert drive(search, full) == [0]
    assert str(search.error) == "trial 0: no room to write a checkpoint"
    assert [one.ended for one in read(tmp_path / "search")] == [False]


def test_a_search_that_is_stopped_keeps_what_was_interrupted(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "search"

    def asked(job: Job, place: Path) -> Outcome:
        search.stop_all()
        place.mkdir(parents=True, exist_ok=True)
        search.request_stop(0)
        assert (place / "stop").read_text() == "any\n"
        return train(job, place)

    search = opened(folder, small_space(), index)
    drive(search, asked)
    assert not search.complete
    assert [one.ended for one in read(folder)] == [False]
    assert not (folder / "trials" / "000" / "stop").exists()
    assert drive(opened(folder, small_space(), index)) == [0, 1, 2]


ASHA: dict[str, Any] = {
    "scheduler": {"kind": "asha", "metric": "mse", "reduction": 2, "first": 4},
    "search": {"kind": "grid"},
    "dimensions": {"train.optim.main.learning_rate": {"kind": "choice", "values": [3e-3, 1e-7]}},
    "trials": 2,
}


def test_a_trial_that_is_behind_is_stopped_measured_and_not_best(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    base = {"seed": 3, "model": MODEL, "train": TRAIN | {"steps": 40}}
    space = small_space(base=base, **ASHA)

    def reports(job: Job, place: Path) -> Outcome:
        def report(told: dict[str, float]) -> None:
            found = {name.removeprefix("validation/"): value for name, value in told.items()}
            if any(name.startswith("validation/") for name in told) and search.on_validation(
                int(place.name), int(told["step"]), found
            ):
                search.request_stop(int(place.name))
                time.sleep(1.1 * POLL_SECONDS)

        return fit(job, place, group=Group.join("cpu"), report=report, options=FitOptions(quiet=True))

    lines: list[str] = []
    search = opened(folder, space, index, lines)
    assert drive(search, reports) == [0, 1]
    first, second = read(folder)
    assert first.status == "finished" and len(first.rungs) > 2
    assert second.status == "stopped early" and second.halted == 4 and second.step == 5
    assert second.measures["mse"] > 0
    assert search.best() is search.record.trials[0]
    assert any(line.startswith("trial 1 is behind at step 4") for line in lines)


def test_told_to_stop_and_killed_before_it_was_measured_it_is_only_measured(
    index: Index, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    space = small_space(**ASHA)
    search = opened(folder, space, index)
    one = search.next_trial()
    assert one is not None
    train(space.job(one.settings, str(index.folder), "small-000"), search.folder_of(0))
    search.record.rung(one, 4, 0.5, True)

    def never(job: Job, place: Path) -> Outcome:
        raise AssertionError("it was halted: nothing is trained")

    again = opened(folder, space, index)
    assert again.next_trial() is not None
    again.on_trial_end(0, trial_run.run_trial(folder, 0, str(index.folder), never))
    found = read(folder)[0]
    assert (found.status, found.step) == ("stopped early", 4)
