"""Job files: every mistake is one sentence that names the key and what is valid; nothing is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from vaedist.config import job as config
from vaedist.config.job import Job, Spec, Train, load_job
from vaedist.config.settings import apply_overrides, expand, read_yaml, resume_policy
from vaedist.core.errors import UserError
from vaedist.nets.bodies_config import Conv

JOB = "model: {kind: vae}\ntrain: {steps: 10}\n"


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


MISTAKES = [
    (
        "trian.steps=3",
        "unknown key 'trian'; did you mean 'train'? Valid: augment, data, init_from, model, name, seed, train",
    ),
    ("train.step=3", "unknown key 'train.step'; did you mean 'steps'? Valid: batch_size, "),
    (
        "train.optim.main.learnig_rate=1",
        "unknown key 'train.optim.main.learnig_rate'; did you mean 'learning_rate'?",
    ),
    (
        "train.optim.main.schedule={kind: cosine, warmpu: 3}",
        "unknown key 'train.optim.main.schedule.warmpu'; did you mean 'warmup'? Valid: final, kind, warmup",
    ),
    (
        "train.optim.main.schedule={kind: multistep}",
        "the key 'train.optim.main.schedule.milestones' is missing",
    ),
    (
        "train.optim.main.schedule.kind=cosin",
        "did you mean 'cosine'? Valid: constant, cosine, multistep, plateau",
    ),
    ("train.steps=null", "give exactly one of train.steps and train.epochs"),
    ("train.steps=0", "train.steps: input should be greater than or equal to 1 (it is 0)"),
    ("train.steps=abc", "train.steps: input should be a whole number"),
    ("train.batch_size=1.5", "train.batch_size: input should be a whole number"),
    ("train.weights=ema", "train.weights: ema needs train.ema_half_life (in images)"),
    (
        "train.optim.main.learning_rate=-1",
        "train.optim.main.learning_rate: input should be greater than 0 (it is -1)",
    ),
    (
        "train.optim.main.learning_rate=.inf",
        "train.optim.main.learning_rate: input should be a finite number",
    ),
    ("train.optim.main.betas=[0.9]", "train.optim.main.betas.1"),
    ("train.monitor.mode=best", "train.monitor.mode: input should be 'min' or 'max' (it is 'best')"),
    ("train=3", "train: input should be a section of `key: value` lines"),
    ("data.cache=disk", "data.cache: input should be 'auto', 'none', 'memory' or 'device' (it is 'disk')"),
    ("data.lanes=0", "data.lanes: input should be greater than or equal to 1 (it is 0)"),
    ("model.kind=null", "model.kind is missing: name the variant, for example `kind: vqvae`"),
    ("model=vae", "model: input should be a section of `key: value` lines (it is 'vae')"),
    ("name=a/b", "name: input should be letters, digits and . _ - only"),
    ("seed=-1", "seed: input should be greater than or equal to 0 (it is -1)"),
]


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        (["train.epochs=3"], None, 3),
        (["train.epochs=3", "train.steps=null"], None, 3),
        (["train.steps=7", "train.epochs=null"], 7, None),
    ],
)
def test_a_length_on_the_command_line_replaces_the_files(
    job_file: Path, overrides: list[str], steps: int | None, epochs: float | None
) -> None:
    """Whichever of the two the file has: nobody should have to look it up to shorten a job."""
    job = load_job(job_file, overrides)
    assert (job.train.steps, job.train.epochs) == (steps, epochs)
    counts_epochs = job_file.with_name("epochs.yaml")
    counts_epochs.write_text(job_file.read_text().replace("steps:", "epochs:"))
    assert "epochs:" in counts_epochs.read_text()
    job = load_job(counts_epochs, overrides)
    assert (job.train.steps, job.train.epochs) == (steps, epochs)
    with pytest.raises(UserError, match="give exactly one"):
        load_job(job_file, ["train.steps=7", "train.epochs=3"])


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_wrong_setting_is_one_sentence(job_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_job(job_file, [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{job_file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "'x' is not a setting: write key.sub=value"),
        ("=3", "'=3' is not a setting"),
        ("train.steps.a=3", "train.steps is a value, not a section"),
        ("train.steps=[1", "the value is not valid YAML"),
    ],
)
def test_a_malformed_override_is_named(job_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_job(job_file, [override])
    assert message in str(caught.value)
    assert repr(override) in str(caught.value)


def test_several_mistakes_are_reported_at_once(job_file: Path) -> None:
    with pytest.raises(UserError, match=r"seed: .*; data\.lanes: "):
        load_job(job_file, ["data.lanes=0", "seed=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {kind: vae}\ntrain: {steps: 1, steps: 2}\n",
            "line 2: not valid YAML: the key 'steps' is given twice",
        ),
        (
            "model: {kind: vae}\nmodel: {kind: vae}\n",
            "line 2: not valid YAML: the key 'model' is given twice",
        ),
        ("model: [\n", "not valid YAML"),
        ("- a\n- b\n", "expected `key: value` lines at the top level"),
        ("", "expected `key: value` lines at the top level"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("train: {steps: 10}\n", "the key 'model' is missing"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_job(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: No such file or directory"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(tmp_path / "bytes.yaml")


def test_overrides_are_yaml_and_reach_new_sections(job_file: Path) -> None:
    job = load_job(
        job_file,
        [
            "train.optim.main.learning_rate=1e-3",
            "train.optim.discriminator.learning_rate=2e-4",
            "train.optim.main.schedule={kind: cosine, warmup: 5}",
            "train.ema_half_life=500",
            "data.path=/somewhere/else=strange",
            "model.encoder.kind=conv",
            "model.encoder.width=[8, 16, 16]",
        ],
    )
    assert job.train.optim["main"].learning_rate == 1e-3  # PyYAML reads 1e-3 as text
    assert job.train.optim["discriminator"].learning_rate == 2e-4
    assert job.train.optim["main"].schedule == config.Cosine(warmup=5)
    assert job.train.ema_half_life == 500
    assert job.data.path == "/somewhere/else=strange"
    assert job.kind == "vae" and job.model.encoder == Conv(width=(8, 16, 16))


def test_a_later_override_wins_and_the_source_stays() -> None:
    content = {"train": {"steps": 1, "optim": {"main": {"betas": [0.9, 0.99]}}}}
    changed = apply_overrides(
        content, ["train.steps=2", "train.steps=3", "train.optim.main.betas=[0.5, 0.9]"]
    )
    assert changed == {"train": {"steps": 3, "optim": {"main": {"betas": [0.5, 0.9]}}}}
    assert content == {"train": {"steps": 1, "optim": {"main": {"betas": [0.9, 0.99]}}}}


def test_a_resolved_job_reads_back_as_itself(job_file: Path, tmp_path: Path) -> None:
    import yaml

    job = load_job(
        job_file, ["train.optim.main.schedule={kind: plateau, patience: 3}", "train.ema_half_life=100"]
    )
    saved = tmp_path / "resolved.yaml"
    saved.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert load_job(saved) == job


def test_settings_are_frozen(job_file: Path) -> None:
    job = load_job(job_file)
    with pytest.raises(ValidationError, match="frozen"):
        job.seed = 3  # type: ignore[misc]


def test_which_weights_everything_downstream_uses() -> None:
    assert Train(steps=1).chosen_weights == "raw"
    assert Train(steps=1, ema_half_life=10).chosen_weights == "ema"
    assert Train(steps=1, ema_half_life=10, weights="raw").chosen_weights == "raw"


def test_resume_policies_cover_every_field_and_the_contract_of_resume() -> None:
    policies = dict(resume_policy(Job))
    by_policy = {
        policy: {key for key, held in policies.items() if held == policy}
        for policy in ("free", "override", "fixed")
    }
    # What may never differ, exactly: this set may only change together with the resume rules in the README.
    assert by_policy["fixed"] == {
        "seed",
        "model",
        "data.binarise",
        "data.train_split",
        "data.validation_split",
        "data.lanes",
        "train.batch_size",
    }
    assert {"train.optim.*.learning_rate", "train.weights", "train.precision"} <= by_policy["override"]
    assert {"train.steps", "data.path", "data.cache", "train.save_every", "train.log_every"} <= by_policy[
        "free"
    ]
    sections = {"data": config.Data, "train": config.Train}
    for name, section in sections.items():
        for field in section.model_fields:
            assert any(key == f"{name}.{field}" or key.startswith(f"{name}.{field}.") for key in policies), (
                field
            )


def test_expand_names_the_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAEDIST_DATA", "/data/oasis")
    assert expand("${VAEDIST_DATA}/x", "data.path") == Path("/data/oasis/x")
    monkeypatch.delenv("VAEDIST_DATA")
    with pytest.raises(UserError, match=r"data\.path is '\$\{VAEDIST_DATA\}', but \$VAEDIST_DATA is not set"):
        expand("${VAEDIST_DATA}", "data.path")
    assert expand("~", "x") == Path.home()


def test_spec_counts_the_terms_of_a_likelihood() -> None:
    assert Spec(3, (32, 32)).pixels == 3072
