"""The `model` section of a job: found by its kind, checked once, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.run_commands import MODELS
from vaedist.config.job import Job
from vaedist.config.model_section import kind_module, kinds, model_config
from vaedist.config.settings import parse
from vaedist.core.errors import UserError

TRAIN = {"steps": 1}


def job(section: object) -> Job:
    return parse(Job, {"model": section, "train": TRAIN}, where="job.yaml")


def test_shipped_kinds_are_checked_without_torch() -> None:
    code = (
        "import sys; from vaedist.config.model_section import kind_module, kinds\n"
        "print(*[kind_module(kind, settings=True).Config.model_fields['kind'].default for kind in kinds()])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [" ".join(kinds()), "False"]
    assert all(kind_module(kind).Config is kind_module(kind, settings=True).Config for kind in kinds())


@pytest.mark.parametrize("section", MODELS.values(), ids=MODELS)
def test_a_job_holds_its_kinds_config_and_writes_every_default(section: dict[str, object]) -> None:
    parsed = job(section)
    assert parsed.model == model_config(section) and parsed.kind == section["kind"]
    assert type(parsed.model) is kind_module(parsed.kind).Config
    written = json.loads(json.dumps(parsed.model_dump(mode="json")))
    assert written["model"] == parsed.model.model_dump(mode="json")
    assert parse(Job, written, where="again") == parsed, "what is written is read as the same job"
    assert parsed.model_copy(update={"seed": 1}).model is parsed.model


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"latent": 2}, "job.yaml: model.kind is missing: name the variant, for example `kind: vqvae`"),
        ({"kind": "vqave"}, r"unknown model kind 'vqave'; did you mean 'vqvae'\? Valid: gan, .*vqvae"),
        ({"kind": "vae_config"}, "unknown model kind 'vae_config'; did you mean"),
        ({"kind": "vae", "latnet": 3}, "^job.yaml: unknown key 'model.latnet'; did you mean 'latent'"),
        (
            {"kind": "vqvae", "codebook": {"codes": "many"}},
            "^job.yaml: model.codebook: ",
        ),
        (
            {"kind": "vqvae", "codebook": {"kind": "ema", "codes": "many"}},
            r"^job.yaml: model.codebook.codes: input should be a whole number \(it is 'many'\)",
        ),
        (3, r"^job.yaml: model: input should be a section of `key: value` lines \(it is 3\)"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_dotted_key(section: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        job(section)
    assert "\n" not in str(raised.value)
