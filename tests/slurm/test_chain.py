"""What is launched: grids, seeds and chains, and every mistake found before anything is in the queue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vaedist.cli.launch_options import is_setting, parse_grid_axis, parse_seeds
from vaedist.core.errors import UserError
from vaedist.slurm.chain import LaunchRequest, Stage, plan_stages

JOB = """
name: tiny
data: {path: DATA}
model: {kind: vae, latent: 4, encoder: {kind: mlp, width: 16, depth: 1}}
train: {steps: 4, batch_size: 8}
"""
PRIOR = """
name: codes
data: {path: DATA}
model: {kind: pixelcnn, tokenizer: runs/none}
train: {steps: 4, batch_size: 8}
"""


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchRequest:
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "my shards"
    shards.mkdir()
    (shards / "index.json").touch()
    Path("tiny.yaml").write_text(JOB.replace("DATA", str(shards)))
    Path("codes.yaml").write_text(PRIOR.replace("DATA", str(shards)))
    return LaunchRequest(jobs=("tiny.yaml",), settings=(), runs=Path("runs"))


def commands(found: list[Stage]) -> dict[str, list[tuple[str, ...]]]:
    return {stage.name: [task.arguments for task in stage.tasks] for stage in found}


def test_one_job(plain: LaunchRequest, tmp_path: Path) -> None:
    (stage,) = plan_stages(replace(plain, settings=("train.steps=9",), extra_arguments=("--override",)))
    assert (stage.name, stage.after, stage.trains) == ("train", None, True)
    assert stage.tasks[0].arguments == (
        "train",
        "tiny.yaml",
        "train.steps=9",
        f"data.path={tmp_path}/my shards",
        "--run-dir",
        "runs/tiny",
        "--override",
    )


def test_a_grid_and_seeds_make_a_run_each(plain: LaunchRequest) -> None:
    wanted = replace(
        plain,
        grid=(parse_grid_axis("model.beta=0.5,1"), parse_grid_axis("train.batch_size=4,8")),
        seeds=parse_seeds("0-1"),
    )
    (stage,) = plan_stages(wanted)
    runs = [str(task.run) for task in stage.tasks]
    assert len(set(runs)) == 8
    assert runs[0] == "runs/tiny-beta-0.5-batch_size-4-seed-0"
    assert "seed=1" in stage.tasks[1].arguments and "model.beta=0.5" in stage.tasks[1].arguments
    assert stage.tasks[1].arguments[-1] == runs[1]


def test_a_chain_waits_stage_by_stage_and_runs_on_the_shards_that_it_makes(plain: LaunchRequest) -> None:
    found = plan_stages(
        replace(
            plain,
            seeds=(0, 1),
            chain=("shard", "train", "prior", "evaluate", "sample"),
            shard="phantom --size 32 --out 'new shards'",
            prior="codes.yaml train.steps=2",
            evaluate="--split test",
        )
    )
    assert [(stage.name, stage.after, len(stage.tasks)) for stage in found] == [
        ("shard", None, 1),
        ("train", "shard", 2),
        ("prior", "train", 2),
        ("evaluate", "prior", 2),
        ("sample", "prior", 2),
    ]
    ran = commands(found)
    assert ran["shard"] == [("shard", "phantom", "--size", "32", "--out", "new shards")]
    assert "data.path=new shards" in ran["train"][1]
    prior = "runs/codes-of-tiny-seed-1"
    assert ran["prior"][1] == (
        "train",
        "codes.yaml",
        "train.steps=2",
        "model.tokenizer=runs/tiny-seed-1",
        "data.path=new shards",
        "--run-dir",
        prior,
    )
    assert ran["evaluate"][1] == ("evaluate", prior, "--split", "test")
    assert ran["sample"][1] == ("sample", prior, "--out", f"{prior}/samples.png")


def test_a_chain_may_begin_with_runs_that_are_there(plain: LaunchRequest) -> None:
    (evaluate,) = plan_stages(replace(plain, chain=("evaluate",)))
    assert (evaluate.after, evaluate.tasks[0].arguments) == (None, ("evaluate", "runs/tiny"))


def test_a_search(plain: LaunchRequest) -> None:
    (stage,) = plan_stages(
        replace(
            plain, jobs=(), space="infovae", settings=("train.steps=5",), extra_arguments=("--trials", "4")
        )
    )
    assert stage.trains
    assert stage.tasks[0].arguments == (
        *("tune", "--space", "infovae", "train.steps=5"),
        *("--run-dir", "runs/tune_infovae", "--trials", "4"),
    )


def test_a_prior_that_names_no_data_reads_those_of_its_tokenizer(
    plain: LaunchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VAEDIST_DATA", raising=False)
    Path("codes.yaml").write_text(PRIOR.replace("data: {path: DATA}\n", ""))
    wanted = replace(plain, chain=("train", "prior"), prior="codes.yaml")

    def data() -> list[str]:
        return [word for word in plan_stages(wanted)[1].tasks[0].arguments if word.startswith("data.path=")]

    assert data() == [f"data.path={tmp_path}/my shards"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").touch()
    monkeypatch.setenv("VAEDIST_DATA", str(tmp_path / "other"))
    assert data() == [f"data.path={tmp_path}/other"], "what is given counts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": ()}, "nothing to launch"),
        ({"jobs": ("no.yaml",)}, "cannot read no.yaml"),
        ({"settings": ("train.stepz=1",)}, "did you mean 'steps'"),
        ({"settings": ("model.latnt=1",)}, "did you mean 'latent'"),
        ({"grid": (("model.latent", ("4", "no")),)}, "model.latent"),
        ({"settings": ("data.path=/nowhere",)}, "there are no shards in /nowhere"),
        ({"settings": ("data.path=$NOT_SET_HERE",)}, "$NOT_SET_HERE is not set"),
        ({"chain": ("train", "shard")}, "in this order"),
        ({"chain": ("train", "train")}, "each once"),
        ({"chain": ("trian",)}, "did you mean 'train'"),
        ({"chain": ("shard", "train")}, "needs --shard"),
        ({"chain": ("train", "prior")}, "needs --prior"),
        ({"chain": ("train", "prior"), "prior": "'codes.yaml"}, "as you would in a shell"),
        ({"evaluate": "--split test"}, "no effect without --chain evaluate"),
        ({"jobs": ("tiny.yaml", "tiny.yaml")}, "two of these would train in one folder"),
        ({"extra_arguments": ("--run-dir=x",)}, "would put all runs in one folder"),
        ({"seeds": tuple(range(1001))}, "a job array holds 1000"),
        ({"space": "infovae"}, "a job file has no place beside it"),
        ({"space": "infovae", "jobs": (), "seeds": (1,)}, "--seeds has no place beside it"),
    ],
)
def test_a_mistake_is_found_before_anything_is_queued(
    plain: LaunchRequest, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as error:
        plan_stages(replace(plain, **changes))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_parse_seeds() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("7, 1-2,7") == (7, 1, 2)
    for wrong in ("", "4-0", "a", "1-", "0-5000", "-1"):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(wrong)


def test_parse_grid_axis() -> None:
    assert parse_grid_axis("model.beta=0.5,1, 4") == ("model.beta", ("0.5", "1", "4"))
    assert parse_grid_axis("model.shape=[1,2],[3,4]") == ("model.shape", ("[1,2]", "[3,4]"))
    for wrong in ("model.beta", "=1", "a b=1", "model.beta=", "model.beta=1,,2", "seed=1,2"):
        with pytest.raises(UserError, match="--grid"):
            parse_grid_axis(wrong)


def test_words_are_settings_or_files() -> None:
    assert [is_setting(word) for word in ("train.steps=1", "jobs/a=b.yaml", "a.yaml", "./x=1", "_a=")] == [
        *(True, False, False, False, True)
    ]
