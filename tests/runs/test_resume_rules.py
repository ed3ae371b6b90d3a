"""A resumed run may change some settings, some with --override, and others never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.small_job import CONTENT, job
from vaedist.config.job import Job
from vaedist.config.settings import apply_overrides, parse
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.runs.checkpoint_manifest import LoadedCheckpoint
from vaedist.runs.provenance import Change
from vaedist.runs.resolved_job import resolved
from vaedist.runs.resume_rules import Differences, check_differences, check_resume, compare_jobs, data_section
from vaedist.runs.run_folder import RunFolder

DATA = {"identity": "ab" * 32, "shape": [1, 8, 8], "classes": ["ill", "well"], "path": "/shards"}


def differences(*overrides: str, saved: Job | None = None, data: dict[str, Any] | None = None) -> Differences:
    return compare_jobs(saved or job(), job(*overrides), DATA, DATA | (data or {}))


def test_the_same_job_differs_in_nothing_resolved_or_not() -> None:
    nothing = Differences((), (), ())
    assert differences() == nothing
    assert differences(saved=resolved(job())) == nothing
    assert resolved(resolved(job())) == resolved(job())
    # The largest divisor of 24 up to 16 is 12: saying so is no change, and nor is spelling out other defaults.
    assert resolved(job()).data.lanes == 12
    assert (
        differences("data.lanes=12", "train.weights=raw", "model.beta=1.0", "train.optim.main.eps=1e-8")
        == nothing
    )


@pytest.mark.parametrize(
    ("override", "kind", "key"),
    [
        ("train.steps=200", "free", "train.steps"),
        ("train.save_every=7", "free", "train.save_every"),
        ("data.cache=memory", "free", "data.cache"),
        ("data.path=/elsewhere", "free", "data.path"),
        ("name=other", "free", "name"),
        ("train.optim.main.learning_rate=0.01", "override", "train.optim.main.learning_rate"),
        (
            "train.optim.main.schedule={kind: constant, warmup: 5}",
            "override",
            "train.optim.main.schedule.warmup",
        ),
        ("train.ema_half_life=1000", "override", "train.ema_half_life"),
        ("train.monitor.metric=mse", "override", "train.monitor.metric"),
        ("train.precision=bf16", "override", "train.precision"),
        ("model.beta=4", "override", "model.beta"),
        ("model.beta={end: 2, steps: 10}", "override", "model.beta"),
        ("model.latent=3", "fixed", "model.latent"),
        ("model.encoder.width=9", "fixed", "model.encoder.width"),
        ("seed=1", "fixed", "seed"),
        ("train.batch_size=48", "fixed", "train.batch_size"),
        ("data.lanes=4", "fixed", "data.lanes"),
        ("data.train_split=test", "fixed", "data.train_split"),
        ("model.kind=vqvae", "fixed", "model.kind"),
    ],
)
def test_every_setting_is_free_overridable_or_fixed(override: str, kind: str, key: str) -> None:
    content = apply_overrides(CONTENT, [override])
    if key == "model.kind":
        content["model"] = {"kind": "vqvae"}
    found = compare_jobs(job(), parse(Job, content, where="test"), DATA, DATA)
    changes = {name: [change.key for change in getattr(found, name)] for name in found._fields}
    assert key in changes.pop(kind)
    if key == "train.ema_half_life":  # which weights are used follows from it
        assert found.override[1].key == "train.weights"
    elif key == "train.batch_size":  # 48 has the divisor 16
        assert found.fixed == (Change("data.lanes", 12, 16), Change("train.batch_size", 24, 48))
    else:
        assert len(getattr(found, kind)) == 1
    assert not any(changes.values())


def test_another_phase_takes_the_strictest_policy_below_it() -> None:
    found = differences("train.optim={main: {}, second: {learning_rate: 1}}")
    assert [change.key for change in found.override] == ["train.optim.second"] and not found.fixed


def test_other_data_are_never_the_same_run() -> None:
    found = differences(data={"identity": "cd" * 32, "path": "/copy"})
    assert found == Differences((), (), (Change("data identity", "ab" * 32, "cd" * 32),))
    assert len(differences(data={"shape": [3, 8, 8], "classes": []}).fixed) == 2


def test_refusals_name_the_key_both_values_and_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_differences(differences("seed=5"), True, tmp_path)
    message = str(error.value)
    for part in (str(tmp_path), "seed was 0 and is now 5", "--new-run", f"init_from={tmp_path}"):
        assert part in message
    faster = differences("train.optim.main.learning_rate=0.01", "train.steps=7")
    with pytest.raises(UserError, match=r"learning_rate was 0.001 and is now 0.01.*--override.*--new-run"):
        check_differences(faster, False, tmp_path)
    check_differences(faster, True, tmp_path)
    check_differences(differences("train.steps=7"), False, tmp_path)


def test_resume_returns_what_changed_for_the_record(tmp_path: Path, index: Index) -> None:
    run = RunFolder.make(tmp_path / "run")
    assert check_resume(run.path, None, job(), index) == ()
    state = {"job": resolved(job()).model_dump(mode="json"), "data": data_section(index)}
    found = LoadedCheckpoint(state, 10, run.path)
    assert check_resume(run.path, found, job(), index) == ()
    with pytest.raises(UserError, match="override"):
        check_resume(run.path, found, job("train.optim.main.clip=1"), index)
    (change,) = check_resume(run.path, found, job("train.optim.main.clip=1"), index, override=True)
    assert change == Change("train.optim.main.clip", None, 1.0)
