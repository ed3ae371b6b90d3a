"""One optimizer step: phases, accumulation, refused steps. The two-phase toy lives in tests/models/variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vaedist.models
from tests.training.steps import BATCH, SPEC, new_train_step
from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.core.context import Batch
from vaedist.core.errors import UserError
from vaedist.models.contract import Variant, build
from vaedist.training.step import micro_batches


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the variants in tests/models/variants known, as a file in vaedist/models would be."""
    folder = str(Path(__file__).parents[1] / "models" / "variants")
    monkeypatch.setattr(vaedist.models, "__path__", [*vaedist.models.__path__, folder])


def job(model: dict[str, Any], **train: Any) -> Job:
    content = {"model": model, "train": {"steps": 10, "batch_size": BATCH, "precision": "fp64", **train}}
    return parse(Job, content, "test")


def batch(number: int = 0) -> Batch:
    image = torch.randint(0, 256, (BATCH, 1, 8, 8), generator=torch.Generator().manual_seed(number))
    return {
        "image": image.to(torch.uint8),
        "label": torch.zeros(BATCH, dtype=torch.int64),
        "key": [""] * BATCH,
    }


def weights(model: Variant) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


DUEL = {
    "critic": {"learning_rate": 1e-2, "every": 1},
    "maker": {"learning_rate": 1e-2, "start": 2, "every": 2, "clip": 0.5},
}


def test_each_phase_trains_its_own_parameters_when_it_is_due(toys: None) -> None:
    one, model = new_train_step(job({"kind": "toy_duel"}, optim=DUEL))
    moved = []
    for step in range(5):
        before = weights(model)
        result = one(batch(step), step, 10, stop_requested=False)
        assert result.accepted and not result.stop
        after = weights(model)
        moved.append({name.split(".")[0] for name in after if not torch.equal(before[name], after[name])})
    critic = {"critic", "brightness", "updates"}
    assert moved == [critic, critic, critic | {"maker"}, critic, critic | {"maker"}]
    assert set(result.terms) == {"loss/critic", "loss/maker"}
    expected = (batch(4)["image"].double() / 127.5 - 1).mean()
    assert model.brightness == pytest.approx(expected.item())
    assert int(model.updates) == 5


def test_a_phase_without_an_optimizer_of_that_name_is_refused(toys: None) -> None:
    from vaedist.training.session import check_phases

    wrong = job({"kind": "toy_duel"}, optim={"critic": {}, "makr": {}})
    with pytest.raises(UserError, match=r"unknown phase 'makr'; did you mean 'maker'"):
        check_phases(wrong, build(wrong.model, SPEC, 0))


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_accumulated_micro_batches_make_the_same_step(kind: str) -> None:
    body = {"kind": "conv", "width": 4, "downsample": 2}
    model = {"kind": kind, "encoder": body}
    results = []
    # Adam divides by the gradient's size: with its usual eps, rounding noise in gradients that are zero would show.
    optim = {"main": {"eps": 1e-3}}
    for micro in (None, 4, 3):
        one, net = new_train_step(job(model, micro_batch_size=micro, optim=optim))
        for step in range(3):
            one(batch(step), step, 10, stop_requested=False)
        results.append(weights(net))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_a_non_finite_step_changes_nothing_and_names_the_term(kind: str) -> None:
    one, model = new_train_step(job({"kind": kind, "encoder": {"kind": "conv", "width": 4, "downsample": 2}}))
    one(batch(0), 0, 10, stop_requested=False)
    poison = next(model.parameters())
    kept = poison.detach().clone()
    with torch.no_grad():
        poison[0] = float("nan")
    before, optimizer = weights(model), str(one.phases[0].optimizer.state_dict())
    result = one(batch(1), 1, 10, stop_requested=True)
    assert not result.accepted and "loss" in result.refused_because and "gradient" in result.refused_because
    assert result.stop, "a stop request is heard in a refused step too"
    for name, value in weights(model).items():
        assert torch.equal(value.nan_to_num(7e77), before[name].nan_to_num(7e77)), name
    assert str(one.phases[0].optimizer.state_dict()) == optimizer
    with torch.no_grad():
        poison.copy_(kept)
    assert one(batch(1), 1, 10, stop_requested=False).accepted


def test_clipping_bounds_the_gradient_norm(toys: None) -> None:
    settings = {"critic": {"learning_rate": 1.0, "clip": 1e-3}, "maker": {}}
    one, model = new_train_step(job({"kind": "toy_duel"}, optim=settings))
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.critic.parameters()]))

    one.phases[0].optimizer.register_step_pre_hook(look)
    result = one(batch(), 0, 1, stop_requested=False)  # the last step is logged
    assert result.scalars["gradient_norm/critic"] > 1e-3, "what is logged is the norm before clipping"
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_over_the_whole_batch_refuses_accumulation() -> None:
    whole = Variant()
    whole.batch_statistics = True
    assert micro_batches(job({"kind": "vae"}), whole, 8) == [(0, 8)]
    with pytest.raises(
        UserError, match=r"set train\.micro_batch_size to 8 or more, or train\.batch_size to 4 times"
    ):
        micro_batches(job({"kind": "vae"}, micro_batch_size=4), whole, 8)


def test_settings_overridden_on_resume_win_over_the_checkpoint() -> None:
    first, _ = new_train_step(job({"kind": "vae", "latent": 2}))
    first(batch(), 0, 10, stop_requested=False)
    optimizer, plateau = first.phases[0].state()
    second, _ = new_train_step(
        job({"kind": "vae", "latent": 2}, optim={"main": {"weight_decay": 0.5, "betas": [0.5, 0.9]}})
    )
    second.phases[0].load(optimizer, plateau)
    group = second.phases[0].optimizer.param_groups[0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.9))
