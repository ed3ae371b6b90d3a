"""A run begins from nothing, from another run's weights, or where it was; each is told apart and written down."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.run_commands import curve, small_job
from vaedist.config.job import InitFrom, Job
from vaedist.config.settings import parse
from vaedist.core.errors import UserError
from vaedist.distributed.process_group import Group
from vaedist.runs.checkpoint_paths import resolve_checkpoint
from vaedist.runs.fit_options import FitOptions
from vaedist.training.initialization import transfer
from vaedist.training.loop import fit

STEPS = 6


def train(job: Job, run: Path, *overrides: Any, quiet: bool = True, **settings: Any) -> str:
    """Train, and what was printed."""
    content = job.model_dump(mode="json")
    for section, values in settings.items():
        content[section] = content[section] | values if isinstance(content[section], dict) else values
    told = io.StringIO()
    with redirect_stdout(told):
        fit(parse(Job, content, "test"), run, group=Group.join("cpu"), options=FitOptions(quiet=quiet))
    return told.getvalue()


def saved(run: Path, step: int | None = None) -> dict[str, Any]:
    """The state of a run's newest checkpoint, or of one step."""
    folders = sorted((run / "checkpoints").glob("step-*" if step is None else f"step-{step:09d}"))
    state: dict[str, Any] = torch.load(folders[-1] / "state.pt", weights_only=True)
    return state


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def still(steps: int = 1) -> dict[str, Any]:
    """A `train` section that moves no weight: what is saved after it is what was imported."""
    return {
        "steps": steps,
        "optim": {"main": {"learning_rate": 1e-30}},
        "ema_half_life": None,
        "weights": None,
    }


@pytest.fixture(scope="module")
def vae(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained VAE with an average, whose best checkpoint is its last."""
    run = tmp_path_factory.mktemp("start") / "vae"
    train(small_job(phantom, steps=STEPS, validate_every=STEPS, save_every=3), run)
    return run


# The whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "which"), [(None, "ema"), ("ema", "ema"), ("raw", "model")])
def test_a_new_run_takes_the_weights_that_it_was_told_to(
    given: str | None, which: str, vae: Path, phantom: Path, tmp_path: Path
) -> None:
    section = {"run": str(vae), "weights": given}
    train(small_job(phantom, steps=1), tmp_path / "run", init_from=section, train=still())
    assert equal(saved(tmp_path / "run")["model"], saved(vae)[which])
    assert saved(tmp_path / "run")["step"] == 1


def test_just_a_run_is_a_section_too(vae: Path, phantom: Path) -> None:
    content = small_job(phantom, steps=1).model_dump(mode="json") | {"init_from": str(vae)}
    assert parse(Job, content, "test").init_from == InitFrom(run=str(vae))


def test_a_checkpoint_is_a_source_as_well(vae: Path, phantom: Path, tmp_path: Path) -> None:
    earlier = vae / "checkpoints" / "step-000000003"
    train(small_job(phantom, steps=1), tmp_path / "run", init_from=str(earlier), train=still())
    assert equal(saved(tmp_path / "run")["model"], saved(vae, 3)["ema"])


def test_it_counts_at_step_0_only(vae: Path, phantom: Path, tmp_path: Path) -> None:
    """A run that was stopped goes on from its own checkpoint, also where the source has gone meanwhile."""
    constant = {"main": {"learning_rate": 2e-3}}
    job = small_job(phantom, steps=4, save_every=2, validate_every=2, optim=constant)
    train(job, tmp_path / "whole", init_from=str(vae))
    train(job, tmp_path / "cut", init_from=str(vae), train={"steps": 2})
    train(job, tmp_path / "cut", init_from=str(tmp_path / "nowhere"))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert equal(saved(tmp_path / "cut")["model"], saved(tmp_path / "whole")["model"])


def test_each_way_of_starting_is_told_and_recorded(vae: Path, phantom: Path, tmp_path: Path) -> None:
    job = small_job(phantom, steps=2, save_every=2, validate_every=2)
    fresh = train(job, tmp_path / "fresh", quiet=False)
    imported = train(job, tmp_path / "imported", quiet=False, init_from=str(vae))
    resumed = train(job, tmp_path / "imported", quiet=False, train={"steps": 3}, init_from=str(vae))
    lines = [
        next(line for line in told.splitlines() if line.startswith("start "))
        for told in (fresh, imported, resumed)
    ]
    checkpoint = resolve_checkpoint(vae)
    digest = hashlib.sha256((checkpoint / "state.pt").read_bytes()).hexdigest()
    tensors = len(saved(vae)["model"])
    assert lines[0].split(maxsplit=1)[1] == "from nothing, seed 3"
    assert lines[1].split(maxsplit=1)[1] == (
        f"imported from {vae} ({checkpoint.name}, ema weights, sha256 {digest[:12]}): {tensors} of {tensors} tensors; "
        "optimizer new"
    )
    assert lines[2].split(maxsplit=1)[1] == "resumed after step 2 from step-000000002"
    assert sum(line.startswith("  copied ") for line in imported.splitlines()) == tensors
    assert "  copied " not in fresh + resumed

    record = [entry["start"] for entry in json.loads((tmp_path / "imported" / "provenance.json").read_text())]
    assert [entry["how"] for entry in record] == ["import", "resume"]
    source = record[0]["source"]
    assert source == {"checkpoint": str(checkpoint), "step": STEPS, "weights": "ema", "sha256": digest}
    assert record[0]["settings"]["run"] == str(vae)


def test_all_ranks_take_what_only_rank_0_can_see(vae: Path, phantom: Path, tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
from vaedist.config.job import Job
from vaedist.runs.fit_options import FitOptions
from vaedist.training import initialization as start
from vaedist.distributed.process_group import Group
from vaedist.training.loop import fit
group = Group.join("cpu", 60)
job = Job.model_validate_json(sys.argv[1])
if not group.leads:
    job = job.model_copy(update={"init_from": job.init_from.model_copy(update={"run": "/proc/no-such-run"})})
outcome = fit(job, Path(sys.argv[2]), group=group, options=FitOptions(quiet=True))
print(outcome.metrics["loss"].hex())
group.close()
"""
    content = small_job(phantom, steps=3, validate_every=3).model_dump(mode="json") | {"init_from": str(vae)}
    job = parse(Job, content, "test")
    one, two = run_ranks(source, 2, job.model_dump_json(), str(tmp_path / "two"))
    train(job, tmp_path / "one")
    alone = [row["loss"] for row in curve(tmp_path / "one") if row["kind"] == "validate"]
    assert one == two and float.fromhex(one) == pytest.approx(alone[0], rel=1e-5)


# Optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "optimizer", "taken"),
    [
        ("on_import", None, False),
        ("on_import", True, True),
        ("never", None, True),
        ("never", False, False),
        ("always", None, False),
    ],
)
def test_an_import_takes_the_optimizer_if_told_to(
    reset: str, optimizer: bool | None, taken: bool, vae: Path, phantom: Path, tmp_path: Path
) -> None:
    section = {"run": str(vae), "weights": "raw", "optimizer": optimizer}
    told = train(
        small_job(phantom, steps=1),
        tmp_path / "run",
        quiet=False,
        init_from=section,
        train=still() | {"reset_optimizer": reset},
    )
    steps = {float(one["step"]) for one in saved(tmp_path / "run")["optim"]["main"]["state"].values()}
    assert steps == ({STEPS + 1.0} if taken else {1.0})
    assert f"optimizer {'as there' if taken else 'new'}" in told


@pytest.mark.parametrize(("reset", "steps"), [("on_import", 4.0), ("never", 4.0), ("always", 2.0)])
def test_a_resumed_run_keeps_its_optimizer_unless_always(
    reset: str, steps: float, phantom: Path, tmp_path: Path
) -> None:
    job = small_job(phantom, steps=2, save_every=2, validate_every=4, reset_optimizer=reset)
    train(job, tmp_path / "run")
    told = train(job, tmp_path / "run", quiet=False, train={"steps": 4})
    state = saved(tmp_path / "run")["optim"]["main"]["state"]
    assert {float(one["step"]) for one in state.values()} == {steps}
    assert ("optimizer new" in told) == (reset == "always")


@pytest.mark.parametrize(
    ("init", "reset", "told"),
    [
        ({"optimizer": True}, "always", "init_from.optimizer: true takes the optimizer's state over"),
        ({"optimizer": True, "map": {"decoder": "decoder"}}, "never", "belongs to a whole model"),
        ({"optimiser": True}, "never", "unknown key 'init_from.optimiser'; did you mean 'optimizer'"),
        ({"weights": "best"}, "never", "init_from.weights: input should be 'ema' or 'raw'"),
    ],
)
def test_contradictions_are_refused(init: dict[str, Any], reset: str, told: str, phantom: Path) -> None:
    content = small_job(phantom, steps=1, reset_optimizer=reset).model_dump(mode="json")
    with pytest.raises(UserError) as caught:
        parse(Job, content | {"init_from": {"run": "runs/vae", **init}}, "job.yaml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_an_optimizer_of_other_weights_is_refused(vae: Path, phantom: Path, tmp_path: Path) -> None:
    section = {"run": str(vae), "strict": False, "optimizer": True}
    with pytest.raises(UserError, match=r"optimizer of phase 'main' there belongs to other weights"):
        train(small_job(phantom, steps=1), tmp_path / "run", init_from=section, model={"latent": 5})


# Parts of a model ------------------------------------------------------------------------------------------------


def test_a_decoder_becomes_another_models_decoder(vae: Path, phantom: Path, tmp_path: Path) -> None:
    """The encoder differs, so that only the mapped part can be copied; the rest starts as the seed says."""
    section = {"run": str(vae), "map": {"decoder": "decoder"}}
    mlp = {"encoder": {"kind": "mlp", "width": 8}, "decoder": small_job(phantom, steps=1).model.encoder}
    job = small_job(phantom, steps=1)
    told = train(job, tmp_path / "run", quiet=False, init_from=section, train=still(), model=mlp)
    new, old = saved(tmp_path / "run")["model"], saved(vae)["ema"]
    inside = {name for name in old if name.startswith("decoder.")}
    assert inside and all(torch.equal(new[name], old[name]) for name in inside)
    train(job, tmp_path / "fresh", train=still(), model=mlp)
    fresh = saved(tmp_path / "fresh")["model"]
    rest = {name: value for name, value in new.items() if name not in inside}
    assert equal(rest, {name: fresh[name] for name in rest})
    rows = [line.split()[0] for line in told.splitlines() if line.startswith("  ")]
    assert rows.count("copied") == len(inside)
    assert rows.count("own") == len(rest) and rows.count("not") == len(old) - len(inside)


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


THERE = tensors(
    encoder__0__w=(3, 4), decoder__0__w=(4, 3), decoder__0__b=(4,), decoder__1__w=(2, 4), scale=()
)
HERE = tensors(generator__0__w=(4, 3), generator__0__b=(4,), generator__1__w=(2, 4), critic__w=(5, 2))


def test_every_tensor_of_both_sides_has_its_row() -> None:
    rows = transfer(THERE, HERE, InitFrom(run="there", map={"decoder": "generator"}))
    assert [tuple(row) for row in rows] == [
        ("copied", "decoder.0.w", "generator.0.w", "4x3"),
        ("copied", "decoder.0.b", "generator.0.b", "4"),
        ("copied", "decoder.1.w", "generator.1.w", "2x4"),
        ("own start", "", "critic.w", "5x2"),
        ("not used", "encoder.0.w", "", "3x4"),
        ("not used", "scale", "", "scalar"),
    ]
    assert str(rows[0]) == "  copied       decoder.0.w -> generator.0.w  4x3"


def test_a_part_may_go_to_the_top_and_a_tensor_to_a_tensor() -> None:
    rows = transfer(
        THERE,
        tensors(**{"0__w": (4, 3), "0__b": (4,), "1__w": (2, 4)}),
        InitFrom(run="x", map={"decoder": ""}),
    )
    assert [row.target for row in rows if row.what == "copied"] == ["0.w", "0.b", "1.w"]
    (row, *_) = transfer(THERE, tensors(gain=()), InitFrom(run="x", map={"scale": "gain"}))
    assert (row.what, row.source, row.target) == ("copied", "scale", "gain")


def test_borrowed_modules_are_neither_asked_for_nor_copied() -> None:
    both = tensors(net__w=(2,), tokenizer__w=(3,))
    rows = transfer(both, tensors(net__w=(2,), tokenizer__w=(9,)), InitFrom(run="x"), ("tokenizer",))
    assert [row.what for row in rows] == ["copied", "borrowed", "not used"]


@pytest.mark.parametrize(
    ("change", "mapping", "told"),
    [
        ({}, {"decodr": "generator"}, r"there has no weights in 'decodr'; did you mean 'decoder'"),
        (
            {},
            {"decoder": "genrator"},
            r"this job's model has no weights in 'genrator'; did you mean 'generator'",
        ),
        (
            {"generator.0.b": (5,)},
            {"decoder": "generator"},
            r"decoder\.0\.b is 4 there and generator\.0\.b is 5 here",
        ),
        ({"generator.2.w": (5,)}, {"decoder": "generator"}, r"generator\.2\.w is not there"),
        ({"generator.1.w": None}, {"decoder": "generator"}, r"decoder\.1\.w has no place here"),
        ({}, {}, r"generator\.0\.w is not there; .* and 6 more\. Map what fits"),
        ({}, {"decoder": "generator", "decoder.0": "generator.0"}, r"would become 'generator\.0\.w'"),
    ],
)
def test_strict_refuses_what_does_not_fit(
    change: dict[str, tuple[int, ...] | None], mapping: dict[str, str], told: str
) -> None:
    here = dict(HERE)
    for name, shape in change.items():
        if shape is None:
            del here[name]
        else:
            here[name] = torch.zeros(shape)
    with pytest.raises(UserError, match=told) as caught:
        transfer(THERE, here, InitFrom(run="there", map=mapping))
    assert "\n" not in str(caught.value)


def test_without_strict_what_fits_is_copied_and_the_rest_is_told() -> None:
    here = {**HERE, "generator.0.b": torch.zeros(5)}
    rows = transfer(THERE, here, InitFrom(run="x", map={"decoder": "generator"}, strict=False))
    found = {row.source or row.target: row.what for row in rows}
    assert found["decoder.0.w"] == "copied" and found["decoder.0.b"] == "other shape"
    with pytest.raises(UserError, match="none of its weights fits"):
        transfer(THERE, tensors(other=(9,)), InitFrom(run="x", strict=False))


def test_weights_that_fit_but_mean_something_else_are_the_variants_to_refuse(
    vae: Path, phantom: Path, tmp_path: Path
) -> None:
    """`Variant.check_source`: a Bernoulli decoder's logits are no picture that a `tanh` generator paints."""
    gan = {
        "kind": "gan",
        "latent": small_job(phantom, steps=1).model.latent,
        "generator": small_job(phantom, steps=1).model.encoder,
        "output": "tanh",
    }
    content = small_job(phantom, steps=1).model_dump(mode="json")
    content |= {"model": gan, "init_from": {"run": str(vae), "map": {"decoder": "generator"}}}
    content["train"] |= {"optim": {"discriminator": {}, "generator": {}}, "monitor": {"metric": "kid"}}
    with pytest.raises(UserError, match=r"set model\.output=sigmoid_logits"):
        fit(parse(Job, content, "test"), tmp_path / "run", options=FitOptions(quiet=True))
