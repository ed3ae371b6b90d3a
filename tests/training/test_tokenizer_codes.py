"""A prior's tokenizer: described once, frozen in the prior's checkpoint, its codes made once by all ranks."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import pack_phantom
from tests.ranks import ROOT, run_ranks
from tests.run_commands import curve, small_job
from vaedist.config.job import Job, Spec
from vaedist.config.model_section import model_config
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import Inputs
from vaedist.data.loading.stream import (
    EvaluationStream,
    EvaluationStreamConfig,
    TrainingStream,
    TrainingStreamConfig,
)
from vaedist.data.packing.code_shards import CodeWriter, codes_folder, open_codes
from vaedist.distributed.process_group import Group
from vaedist.models.bases.code_prior_config import Tokenizer
from vaedist.models.contract import build
from vaedist.runs.checkpoint import Best, Checkpoints, load_checkpoint
from vaedist.runs.checkpoint_paths import resolve_checkpoint
from vaedist.runs.fit_options import FitOptions, Outcome
from vaedist.runs.open_run import open_run
from vaedist.runs.weights import weights_digest
from vaedist.training.ema import WeightAverage
from vaedist.training.loop import fit
from vaedist.training.session import model_summary
from vaedist.training.tokenizer_codes import resolve_tokenizer

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("variants")]


def train(job: Job, run: Path, *, quiet: bool = True) -> tuple[Outcome, str]:
    told = io.StringIO()
    with redirect_stdout(told):
        outcome = fit(job, run, group=Group.join("cpu"), options=FitOptions(quiet=quiet))
    return outcome, told.getvalue()


def prior_job(data: Path, tokenizer: Path | dict[str, Any], **train: Any) -> Job:
    settings: dict[str, Any] = {"validate_every": 5, "optim": {"main": {"learning_rate": 0.05}}}
    content = small_job(data, "vqvae", **settings | train).model_dump(mode="json")
    named = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    content["model"] = {"kind": "toy_prior", "tokenizer": named, "jitter": 0.5}
    return parse(Job, content, "the prior's job")


@pytest.fixture(scope="module")
def trained(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tokens") / "vqvae"
    train(small_job(phantom, "vqvae", steps=12, validate_every=6), run)
    return run


@pytest.fixture
def tokenizer(trained: Path, tmp_path: Path) -> Path:
    """A run of a VQ-VAE of one's own, without codes yet."""
    return Path(shutil.copytree(trained, tmp_path / "tokenizer"))


def codes_of(run: Path) -> Path:
    (folder,) = (run / "codes").iterdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


# Training -----------------------------------------------------------------------------------------------------


def test_a_prior_learns_from_the_codes_that_its_tokenizer_gives(
    tokenizer: Path, phantom: Path, tmp_path: Path
) -> None:
    outcome, told = train(
        prior_job(phantom, tokenizer, steps=40, validate_every=20), tmp_path / "prior", quiet=False
    )
    assert outcome.status == "finished"
    rows = [row for row in curve(tmp_path / "prior") if row["kind"] == "validate"]
    assert rows[1]["nats_per_token"] < rows[0]["nats_per_token"] < np.log(16)
    assert "of them frozen" in told and f"tokenizer frozen, from {tokenizer}" in told

    # The shards hold what the tokenizer says, for every image of every split.
    images, run = Index.open(phantom), open_run(tokenizer)
    stamp = json.loads((codes_of(tokenizer) / "index.json").read_text())["source"]
    codes = open_codes(codes_of(tokenizer), stamp, images)
    assert codes.shape == (1, 4, 4) and codes.dtype == np.uint16 and codes.classes == images.classes
    for split in images.splits:
        streams = (
            EvaluationStream(one, split, EvaluationStreamConfig(batch_size=24)) for one in (images, codes)
        )
        for shown, held in zip(*streams, strict=True):
            assert torch.equal(held["codes"], run.model.codes(shown["image"]))
            assert held["codes"].dtype == torch.int64 and "image" not in held
            for same in ("key", "sample"):
                assert held[same] == shown[same]  # type: ignore[literal-required]
            assert torch.equal(held["label"], shown["label"]) and torch.equal(held["mask"], shown["mask"])

    # The tokenizer came along as it was, and stayed so; the optimizer never had it.
    state = load_checkpoint(resolve_checkpoint(tmp_path / "prior")).state
    for weights in (state["model"], state["ema"]):
        frozen = {
            name.removeprefix("tokenizer."): value for name, value in weights.items() if name != "logits"
        }
        assert weights_digest(frozen) == weights_digest(run.model.state_dict())
    assert len(state["optim"]["main"]["state"]) == 1


def test_the_order_of_training_is_that_of_the_images(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    train(prior_job(phantom, tokenizer, steps=1), tmp_path / "prior")
    run = open_run(tokenizer)
    both = Index.open(phantom), Index.open(codes_of(tokenizer), "codes")
    for cache in ("none", "memory", "device"):
        streams = [
            TrainingStream(one, "train", TrainingStreamConfig(batch_size=8, lanes=8, seed=3, cache=cache))  # type: ignore[arg-type]
            for one in both
        ]
        for _, shown, held in zip(range(10), streams[0].batches(5), streams[1].batches(5), strict=False):
            assert held["sample"] == shown["sample"]
            assert held["codes"].shape == (8, 4, 4) and torch.equal(
                held["codes"], run.model.codes(shown["image"])
            )
        for stream in streams:
            stream.close()


def test_codes_are_made_once(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    _, first = train(prior_job(phantom, tokenizer, steps=1), tmp_path / "one", quiet=False)
    before = {path: path.stat().st_mtime_ns for path in codes_of(tokenizer).iterdir() if path.name != "lock"}
    _, second = train(prior_job(phantom, tokenizer, steps=1, precision="fp64"), tmp_path / "two", quiet=False)
    assert "codes: encoding" in first and "codes:" not in second
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (codes_of(tokenizer) / "lock").exists() and not (codes_of(tokenizer) / ".making").exists()
    assert oct(codes_of(tokenizer).stat().st_mode & 0o777) == "0o700"


def test_a_finished_prior_needs_no_codes(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    job = prior_job(phantom, tokenizer, steps=1)
    train(job, tmp_path / "prior")
    shutil.rmtree(tokenizer / "codes")
    assert train(job, tmp_path / "prior")[0].status == "already finished"
    assert not (tokenizer / "codes").exists()


def test_a_prior_goes_on_bit_for_bit(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    train(prior_job(phantom, tokenizer, steps=10), tmp_path / "whole")
    train(prior_job(phantom, tokenizer, steps=5), tmp_path / "cut")
    train(prior_job(phantom, tokenizer, steps=10), tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    one, other = (load_checkpoint(resolve_checkpoint(tmp_path / name)).state for name in ("cut", "whole"))
    for which in ("model", "ema"):
        assert all(torch.equal(one[which][name], other[which][name]) for name in one[which])


# Ranks --------------------------------------------------------------------------------------------------------

FIT = """
import sys
from pathlib import Path
import vaedist.models
vaedist.models.__path__.append(sys.argv[3])
from vaedist.config.job import Job
from vaedist.runs.fit_options import FitOptions
from vaedist.distributed.process_group import Group
from vaedist.data.loading.inputs import Inputs
from vaedist.training.loop import fit
group = Group.join("cpu", 60)
outcome = fit(Job.model_validate_json(sys.argv[1]), Path(sys.argv[2]), group=group)
print(outcome.status, outcome.metrics["loss"].hex())
group.close()
"""


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_make_the_codes_that_one_makes(
    world: int, tokenizer: Path, variants: Path, phantom: Path, tmp_path: Path
) -> None:
    """Byte for byte; three ranks share batches of images unevenly. And they train as one does."""
    other = Path(shutil.copytree(tokenizer, tmp_path / "other"))
    settings = {"steps": 6, "validate_every": 6, "precision": "fp64"}
    train(prior_job(phantom, tokenizer, **settings), tmp_path / "one")
    job = prior_job(phantom, other, **settings).model_dump_json()
    answers = [
        out.splitlines()[-1] for out in run_ranks(FIT, world, job, str(tmp_path / "many"), str(variants))
    ]
    assert len(set(answers)) == 1 and answers[0].startswith("finished")
    assert files(codes_of(tokenizer)) == files(codes_of(other))
    for mine, theirs in zip(curve(tmp_path / "one"), curve(tmp_path / "many"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-9)


@pytest.mark.slow
def test_two_jobs_that_need_the_same_codes_make_them_once(
    tokenizer: Path, variants: Path, phantom: Path, tmp_path: Path
) -> None:
    """Started together: the one that comes second waits, or finds them finished."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = prior_job(phantom, tokenizer, steps=2).model_dump_json()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FIT, job, str(tmp_path / name), str(variants)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    told = ""
    try:
        for process in both:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            told += out
    finally:
        for process in both:
            process.kill()
    assert told.count("codes: encoding") == 1
    assert curve(tmp_path / "one") == curve(tmp_path / "two")


# Stopping and going on ----------------------------------------------------------------------------------------


def test_a_stop_while_codes_are_made_is_heard(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    job, run = prior_job(phantom, tokenizer, steps=2), tmp_path / "prior"
    run.mkdir()
    (run / "stop").write_text("any\n")
    outcome, told = train(job, run, quiet=False)
    assert (outcome.status, outcome.step) == ("stopped", 0) and "the same command continues" in told
    assert not (run / "stop").exists() and not (codes_of(tokenizer) / "index.json").exists()
    assert train(job, run)[0].status == "finished"
    straight = Path(shutil.copytree(tokenizer, tmp_path / "again", ignore=shutil.ignore_patterns("codes")))
    train(prior_job(phantom, straight, steps=2), tmp_path / "straight")
    assert files(codes_of(tokenizer)) == files(codes_of(straight))
    assert curve(run) == curve(tmp_path / "straight")


def test_whole_shards_of_a_killed_attempt_are_kept(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    """Nothing but the missing ones is made: a shard that is there is taken as it is, which another code shows."""
    job = prior_job(phantom, tokenizer, steps=1)
    images = Index.open(phantom)
    described = resolve_tokenizer(job, images, Group.join("cpu")).model.tokenizer.model_dump(mode="json")
    stamp = {
        "made_by": "vaedist-train",
        "tokenizer": {name: value for name, value in described.items() if name != "run"},
        "images": images.identity,
    }
    folder = codes_folder(tokenizer, stamp)
    folder.mkdir(parents=True)
    writer = CodeWriter(folder, images, 16, stamp)
    (first, *_) = writer.missing()
    writer.write(*first, np.full((int(images.split(first[0]).counts[first[1]]), 4, 4), 7))
    (folder / ".making" / "validate-000000.tar.tmp").write_bytes(b"torn")
    train(job, tmp_path / "prior")
    codes = Index.open(folder, "codes")
    assert codes.source == stamp
    for split in codes.splits:
        values = torch.cat(
            [
                batch["codes"]
                for batch in EvaluationStream(codes, split, EvaluationStreamConfig(batch_size=64))
            ]
        )
        assert bool((values == 7).all()) == (split == first[0])


# Another tokenizer --------------------------------------------------------------------------------------------


def retrain(run: Path) -> None:
    """What more training does to a run: another best checkpoint."""
    store = Checkpoints(run)
    state = load_checkpoint(resolve_checkpoint(run)).state
    state["ema"] = {
        name: value + 1e-3 if value.is_floating_point() else value for name, value in state["ema"].items()
    }
    store.mark_best(store.commit(state, 99, guard=lambda: None), Best("loss", 0.0))


def refusal(job: Job, run: Path) -> str:
    with pytest.raises(UserError) as caught:
        train(job, run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_moved_tokenizer_is_refused_until_its_new_place_is_given(
    tokenizer: Path, phantom: Path, tmp_path: Path
) -> None:
    run = tmp_path / "prior"
    train(prior_job(phantom, tokenizer, steps=5), run)
    moved = tokenizer.rename(tmp_path / "moved")
    told = refusal(prior_job(phantom, tokenizer, steps=10), run)
    assert told.startswith("model.tokenizer: ") and str(tokenizer) in told
    train(prior_job(phantom, moved, steps=10), run)
    straight = Path(shutil.copytree(moved, tmp_path / "straight", ignore=shutil.ignore_patterns("codes")))
    train(prior_job(phantom, straight, steps=10), tmp_path / "whole")
    assert curve(run) == curve(tmp_path / "whole")


def test_a_changed_tokenizer_is_refused(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    run = tmp_path / "prior"
    before = resolve_checkpoint(tokenizer)
    train(prior_job(phantom, tokenizer, steps=5), run)
    saved = json.loads(json.dumps(load_checkpoint(resolve_checkpoint(run)).state["job"]))["model"][
        "tokenizer"
    ]
    retrain(tokenizer)
    told = refusal(prior_job(phantom, tokenizer, steps=10), run)
    assert f"model.tokenizer.sha256 was {saved['sha256']}" in told and "--new-run" in told
    # The saved job, which describes the tokenizer, says it more directly.
    told = refusal(prior_job(phantom, saved, steps=10), run)
    assert f"the tokenizer {tokenizer} has changed" in told and saved["sha256"][:12] in told
    # The checkpoint with the old weights is still there, and may be named.
    assert train(prior_job(phantom, before, steps=10), run)[0].status == "finished"
    # A new run takes the new weights, and codes of its own.
    train(prior_job(phantom, tokenizer, steps=1), tmp_path / "new")
    assert len(list((tokenizer / "codes").iterdir())) == 2


def test_codes_of_another_tokenizer_or_other_images_are_refused(
    tokenizer: Path, phantom: Path, tmp_path: Path
) -> None:
    train(prior_job(phantom, tokenizer, steps=1), tmp_path / "one")
    path = codes_of(tokenizer) / "index.json"
    path.chmod(0o644)
    content = json.loads(path.read_text())
    content["source"]["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    told = refusal(prior_job(phantom, tokenizer, steps=1), tmp_path / "two")
    assert "do not come from this tokenizer" in told and "remove that folder" in told
    with pytest.raises(UserError, match="holds codes of images, which only a prior's training reads"):
        Index.open(codes_of(tokenizer))
    with pytest.raises(UserError, match="holds images, not codes"):
        Index.open(phantom, "codes")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", r"model\.tokenizer: no run at .*nothing"),
        ("vae", r"model\.tokenizer: .* is a run of 'vae', whose latent is not a map of codes"),
        ("size", r"takes images of shape \(1, 16, 16\).* and .* has \(1, 32, 32\)"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_sentence(
    kind: str, told: str, tokenizer: Path, phantom: Path, tmp_path: Path
) -> None:
    data, run = phantom, tokenizer
    if kind == "missing":
        run = tmp_path / "nothing"
    elif kind == "vae":
        run = tmp_path / "vae"
        train(small_job(phantom, steps=1), run)
    else:
        data = pack_phantom(tmp_path / "larger", size=32)
    with pytest.raises(UserError, match=told) as caught:
        train(prior_job(data, run, steps=1), tmp_path / "prior")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "prior" / "job.yaml").exists()


# Afterwards ---------------------------------------------------------------------------------------------------


def test_one_folder_is_enough_to_sample(tokenizer: Path, phantom: Path, tmp_path: Path) -> None:
    train(prior_job(phantom, tokenizer, steps=5), tmp_path / "prior")
    beside = open_run(tmp_path / "prior").model.sample(4, seed=1)
    image = torch.randint(0, 256, (2, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = open_run(tokenizer).model.reconstruct(image)
    shutil.rmtree(tokenizer)
    alone = open_run((tmp_path / "prior").rename(tmp_path / "elsewhere"))
    assert torch.equal(alone.model.sample(4, seed=1), beside)
    assert torch.equal(alone.model.reconstruct(image), expected)


def test_a_binarised_tokenizer_codes_binarised_images(phantom: Path, tmp_path: Path) -> None:
    content = small_job(phantom, "vqvae", steps=4).model_dump(mode="json")
    content["data"]["binarise"], content["seed"] = "static", 11
    train(parse(Job, content, "test"), tmp_path / "tokenizer")
    train(prior_job(phantom, tmp_path / "tokenizer", steps=1), tmp_path / "prior")
    run = open_run(tmp_path / "tokenizer")
    inputs = Inputs(run.job)
    streams = (
        EvaluationStream(Index.open(phantom), "test", EvaluationStreamConfig(batch_size=32)),
        EvaluationStream(
            Index.open(codes_of(tmp_path / "tokenizer"), "codes"),
            "test",
            EvaluationStreamConfig(batch_size=32),
        ),
    )
    for shown, held in zip(*streams, strict=True):
        seen = inputs.binarize(shown["image"], shown["key"])
        assert torch.equal(held["codes"], run.model.codes(seen)) and set(seen.unique().tolist()) <= {0, 255}
        assert torch.equal(
            Inputs(open_run(tmp_path / "prior").job).binarize(shown["image"], shown["key"]), seen
        )
    prior = open_run(tmp_path / "prior")
    assert (prior.job.model.tokenizer.binarise, prior.job.model.tokenizer.seed) == ("static", 11)


def test_the_layer_table_describes_the_tokenizer_first(tokenizer: Path, phantom: Path) -> None:
    assert "of them frozen" in model_summary(prior_job(phantom, tokenizer, steps=1))


# The module ---------------------------------------------------------------------------------------------------


def section(**change: Any) -> dict[str, Any]:
    body = {"kind": "conv", "width": 4, "depth": 0, "downsample": 4}
    known = {
        "run": "runs/vqvae",
        "sha256": "0" * 64,
        "model": {"kind": "vqvae", "encoder": body, "codebook": {"kind": "gradient", "codes": 8, "dim": 2}},
        "codes": 8,
        "grid": [4, 4],
    }
    return {"kind": "toy_prior", "tokenizer": known | change}


def test_what_is_borrowed_is_frozen_stays_in_evaluation_mode_and_is_not_averaged() -> None:
    model = build(model_config(section()), Spec(1, (16, 16)), seed=0)
    model.train()
    assert model.training and not model.get_submodule("tokenizer.encoder").training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["logits"]
    average = WeightAverage(model, half_life=100)
    assert average.model.get_submodule("tokenizer") is model.get_submodule("tokenizer")
    with torch.no_grad():
        model.get_parameter("logits").add_(1)
    average.update(images=10**6, batch_size=100)
    torch.testing.assert_close(average.model.get_parameter("logits"), model.get_parameter("logits") / 2)


def test_a_tokenizers_section_is_checked_and_compares_equal_to_itself() -> None:
    short, full = (Tokenizer.model_validate(section()["tokenizer"]) for _ in range(2))
    assert short == full and short.model.commitment == 0.25
    with pytest.raises(UserError, match=r"unknown key 'model\.codebok'"):
        Tokenizer.model_validate(section(model={"kind": "vqvae", "codebok": {}})["tokenizer"])
    with pytest.raises(UserError, match="what that run is has not been read"):
        build(model_config(section() | {"tokenizer": "runs/vqvae"}), Spec(1, (16, 16)), seed=0)
