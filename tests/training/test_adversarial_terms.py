"""What the loop owes a model with adversarial phases: own parameters, turns, late starts, ranks, an honest monitor."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.run_commands import curve
from tests.training.steps import BATCH, SPEC, new_train_step
from vaedist.config.job import Job
from vaedist.config.model_section import model_config
from vaedist.config.settings import parse
from vaedist.core.context import Batch, LaneContext, generator
from vaedist.core.errors import UserError
from vaedist.data.loading.inputs import Inputs
from vaedist.distributed.process_group import Group
from vaedist.models.contract import build
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit
from vaedist.training.progress import Progress
from vaedist.training.step import Phase, TrainStep
from vaedist.training.validation import check_monitor

BODY = {"kind": "conv", "width": 8, "depth": 0, "downsample": 2}
GAN = {"kind": "gan", "generator": BODY, "discriminator": BODY, "latent": 3}
VAEGAN = {"kind": "vaegan", "encoder": BODY, "discriminator": BODY, "latent": 3}


def job(model: dict[str, Any] = GAN, monitor: str = "kid", **optim: Any) -> Job:
    phases = {"gan": ("discriminator", "generator"), "vaegan": ("discriminator", "encoder", "decoder")}
    train = {
        "steps": 40,
        "batch_size": BATCH,
        "precision": "fp64",
        "optim": {phase: optim.get(phase, {}) for phase in phases[model["kind"]]},
        "monitor": {"metric": monitor},
    }
    return parse(Job, {"model": model, "train": train}, "test")


def batch(step: int) -> Batch:
    draw = generator("rivals", step)
    image = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=draw).to(torch.uint8)
    return {"image": image, "label": torch.zeros(BATCH, dtype=torch.int64), "key": [""] * BATCH}


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# Steps ----------------------------------------------------------------------------------------------------------


def test_the_generator_rests_while_the_discriminator_warms_up() -> None:
    one, model = new_train_step(job(generator={"start": 3, "schedule": {"kind": "cosine", "warmup": 1}}))
    rates = []
    for step in range(6):
        before = copied(model.generator), copied(model.discriminator)
        result = one(batch(step), step, 40, stop_requested=False)
        rates.append(one.phases[1].learning_rate)
        moved = [
            any(not torch.equal(value, old[name]) for name, value in net.state_dict().items())
            for net, old in zip((model.generator, model.discriminator), before, strict=True)
        ]
        assert moved == [step >= 3, True]
        assert ("loss/generator" in result.terms) == (step >= 3)
    # Its schedule begins when it does.
    assert rates[:5] == pytest.approx([0, 0, 0, 0.5e-3, 1e-3])


def test_a_phase_computes_no_gradient_for_its_rival() -> None:
    one, model = new_train_step(job())
    seen: dict[str, list[bool]] = {}

    def look(module: torch.nn.Module, *_: Any) -> None:
        seen.setdefault(module.turn_of, []).append(all(p.requires_grad for p in module.parameters()))

    model.generator.turn_of, model.discriminator.turn_of = "generator", "discriminator"
    model.generator.register_forward_hook(look)
    model.discriminator.body.turn_of = "discriminator"
    model.discriminator.body.register_forward_hook(look)
    one(batch(0), 0, 40, stop_requested=False)
    assert seen == {"generator": [False, True], "discriminator": [True, True, False]}
    assert all(p.requires_grad for p in model.parameters()), "afterwards all are as they were"


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 3), (2, 1), (2, 3)])
def test_turns_count_the_steps_that_trained_the_phase(start: int, every: int) -> None:
    optim = parse(
        Job,
        {"model": GAN, "train": {"steps": 1, "optim": {"main": {"start": start, "every": every}}}},
        "test",
    )
    phase = Phase("main", optim.train.optim["main"], [torch.nn.Parameter(torch.zeros(1))], optim)
    trained = 0
    for step in range(20):
        if phase.active(step):
            assert phase.turn(step) == trained
            trained += 1


def test_a_lazy_penalty_counts_turns_not_steps() -> None:
    """Trained at every third step with R1 at every second turn: at steps 0, 6, 12, not at the multiples of both."""
    one, _ = new_train_step(job({**GAN, "r1_every": 2}, discriminator={"every": 3}))
    due = []
    for step in range(13):
        result = one(batch(step), step, 40, stop_requested=False)
        if result.terms.get("r1/discriminator", torch.zeros(())) > 0:
            due.append(step)
    assert due == [0, 6, 12]


def test_a_context_of_its_own_has_a_turn_at_every_step() -> None:
    assert LaneContext(seed=0, step=5, batch_size=2, lanes=1).turn == 5
    assert LaneContext(seed=0, step=5, turn=2, batch_size=2, lanes=1).micro_batch(0, 1).turn == 2


def test_a_window_averages_each_term_over_the_steps_that_had_it() -> None:
    progress = Progress(Group(torch.device("cpu")))

    def step(**terms: float) -> None:
        progress.accepted({name: torch.tensor(4 * value).double() for name, value in terms.items()}, rows=4)

    for number in range(6):
        step(a=float(number), **({"b": 10.0 + number} if number % 3 == 2 else {}))
    again = Progress(Group(torch.device("cpu")), progress.state())
    for one in (progress, again):
        assert one.row() == {"a": 2.5, "b": 13.5, "skipped": 0.0}
        assert one.row() == {"skipped": 0.0}


# Processes ------------------------------------------------------------------------------------------------------

STEPS = 7
GAMES: dict[str, dict[str, Any]] = {
    "gan": {**GAN, "r1_every": 2, "spectral_norm": True, "diffaugment": ["color", "translation", "cutout"]},
    "wgan": {**GAN, "r1": 0, "gan_loss": "wgan_clip"},
    "relativistic": {**GAN, "r1_every": 3, "gan_loss": "relativistic"},
    "vaegan": {**VAEGAN, "r1_every": 2, "diffaugment": ["translation"]},
}


def run(group: Group, name: str, micro: int | None) -> dict[str, torch.Tensor]:
    """A few steps of one process of a group; its weights."""
    from vaedist.data.loading.order import slice_bounds

    # Adam divides by the gradient's size: with its usual eps, rounding noise in gradients that are zero would show.
    late = {"start": 2, "every": 2, "clip": 0.5, "eps": 1e-3}
    content = job(
        GAMES[name], generator=late, discriminator={"eps": 1e-3}, encoder={"eps": 1e-3}, decoder=late
    )
    content = content.model_copy(
        update={"train": content.train.model_copy(update={"micro_batch_size": micro})}
    )
    model = build(content.model, SPEC, 0).double()
    bounds = slice_bounds(BATCH, group.rank, group.world)
    one = TrainStep(content, group, model, 8, bounds, Inputs(content))
    for step in range(STEPS):
        rows = batch(step)
        cut: Batch = {"image": rows["image"][slice(*bounds)], "label": rows["label"][slice(*bounds)]}
        result = one(cut, step, 40, stop_requested=False)
        assert result.accepted
    return {key: value.clone() for key, value in model.state_dict().items()}


RANK = """
import sys, torch
from tests.training.test_adversarial_terms import run
from vaedist.distributed.process_group import Group
torch.set_num_threads(1)
group = Group.join("cpu")
found = {}
for name, micro in [("gan", None), ("gan", 3), ("wgan", None), ("relativistic", 2), ("vaegan", None)]:
    for key, value in run(group, name, micro).items():
        found[f"{name}{micro}/{key}"] = value
torch.save(found, f"{sys.argv[1]}/{group.rank}.pt")
group.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_their_share_play_the_game_of_one(world: int, tmp_path: Path) -> None:
    """In fp64: the gradient of R1 crosses DDP, parameters of the resting rival do not; 3 ranks have unequal shares."""
    alone = {name: run(Group(torch.device("cpu")), name, None) for name in GAMES}
    start = {name: build(model_config(model), SPEC, 0).double().state_dict() for name, model in GAMES.items()}
    run_ranks(RANK, world, str(tmp_path), timeout=400)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for place, value in ranks[0].items():
        name, _, key = place.partition("/")
        expected = alone[name.removesuffix("None").rstrip("0123456789")]
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-12, msg=place)
        for other in ranks[1:]:
            assert torch.equal(other[place], value), f"{place} differs between ranks"
    for name, weights in alone.items():
        networks = {
            key.partition(".")[0]
            for key, value in weights.items()
            if not torch.equal(value, start[name][key])
        }
        assert networks >= ({"encoder", "decoder"} if name == "vaegan" else {"generator"}) | {"discriminator"}


# Runs -----------------------------------------------------------------------------------------------------------


def faces(data: Path, monitor: str = "kid", **train: Any) -> Job:
    settings = {
        "batch_size": 8,
        "threads": 1,
        "log_every": 4,
        "validate_every": 8,
        "save_every": 3,
        "ema_half_life": 100,
        "monitor": {"metric": monitor, "images": 16},
        "optim": {"discriminator": {}, "generator": {"start": 1, "every": 3, "schedule": {"kind": "cosine"}}},
    }
    model = {**GAN, "r1_every": 2, "spectral_norm": True, "diffaugment": ["color"]}
    return parse(Job, {"data": {"path": str(data)}, "model": model, "train": settings | train}, "test")


def test_a_game_that_was_interrupted_goes_on_digit_for_digit(phantom: Path, tmp_path: Path) -> None:
    """Between two turns of the generator and in the middle of a window of the log."""

    def interrupt(_: dict[str, float]) -> None:
        raise KeyboardInterrupt

    quiet = FitOptions(quiet=True)
    whole = fit(faces(phantom, steps=8), tmp_path / "whole", options=quiet)
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        fit(faces(phantom, steps=8), half, options=quiet, report=interrupt)  # at step 4; step 3 was saved
    resumed = fit(faces(phantom, steps=8), half, options=quiet)
    assert resumed.metrics == whole.metrics
    assert curve(half) == curve(tmp_path / "whole")
    rows = curve(half)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 8]
    assert all("loss/generator" in row for row in rows), "trained at steps 1, 4 and 7, and yet in every row"
    judged = [name for name in whole.metrics if name.startswith("kid")]
    assert judged and all(math.isfinite(whole.metrics[name]) for name in judged)


def test_a_run_judged_by_a_game_ends_before_it_begins(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.monitor\.metric=kid"):
        fit(faces(phantom, monitor="loss", steps=8), tmp_path / "run", options=FitOptions(quiet=True))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_penalised_discriminator_stays_uncompiled(phantom: Path, tmp_path: Path, capsys: Any) -> None:
    torch.compiler.reset()
    job = faces(phantom, steps=2, compile=True, validate_every=2)
    outcome = fit(job, tmp_path / "run", options=FitOptions())
    assert outcome.step == 2
    told = capsys.readouterr().out
    assert re.search(r"^compile +generator; not discriminator: its R1 penalty needs", told, re.MULTILINE)


# Monitor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "loss/generator", "real_accuracy/discriminator"])
def test_a_loss_is_no_monitor_of_a_game(metric: str) -> None:
    with pytest.raises(
        UserError, match=r"which of this model's networks is ahead.*train\.monitor\.metric=kid"
    ):
        check_monitor(job(monitor=metric), new_train_step(job())[1])


def test_measures_of_samples_and_pixels_may_be_monitors() -> None:
    check_monitor(job(monitor="kid"), new_train_step(job())[1])
    check_monitor(job(VAEGAN, monitor="mse/encoder"), new_train_step(job(VAEGAN))[1])
    assert math.isfinite(job().train.monitor.images)
