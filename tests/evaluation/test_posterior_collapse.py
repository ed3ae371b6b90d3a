"""The alarm: what counts as used, over ranks and padding, and that it shows wherever a collapsed model goes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.run_commands import small_job
from vaedist.config.job import Job
from vaedist.config.settings import parse
from vaedist.core.context import generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.data.format.index import Index
from vaedist.distributed.process_group import Group
from vaedist.evaluate import main as evaluate
from vaedist.evaluation.metrics.posterior_collapse import Collapse, Usage, UsageCounter
from vaedist.models.contract import build
from vaedist.nets.divergences import DiagonalGaussian
from vaedist.runs.checkpoint import load_checkpoint
from vaedist.runs.checkpoint_paths import resolve_checkpoint
from vaedist.runs.fit_options import FitOptions
from vaedist.runs.open_run import open_run
from vaedist.runs.resolved_job import resolved
from vaedist.runs.run_folder import RunFolder
from vaedist.sample import main as sample
from vaedist.training.loop import fit
from vaedist.training.run_log import RunLog
from vaedist.training.validation import ValidationSamples
from vaedist.training.validation_figures import ValidationFigures

ALONE = Group(torch.device("cpu"))


def count(mean: Tensor, log_variance: Tensor, mask: Tensor | None = None) -> Usage:
    counter = UsageCounter()
    mask = torch.ones(len(mean), dtype=torch.bool) if mask is None else mask
    for part in torch.arange(len(mean)).split(7):
        counter.add(DiagonalGaussian(mean[part], log_variance[part]), mask[part])
    return counter.result(ALONE)


def test_variance_and_kl_are_those_of_the_whole_split_without_padding() -> None:
    draw = generator("posteriors")
    mean = torch.randn(50, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 0.05, 3.0])
    log_variance = -torch.rand(50, 3, generator=draw, dtype=torch.float64)
    mask = torch.arange(50) < 45
    usage = count(mean, log_variance, mask)
    assert usage.what == "dimensions" and usage.kl is not None
    assert usage.variance == pytest.approx(mean[:45].var(0, correction=0).tolist(), rel=1e-12)
    normal = torch.distributions.Normal(mean[:45], (log_variance[:45] / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean(0)
    assert usage.kl == pytest.approx(kl.tolist(), rel=1e-9)
    assert usage.active == 2 and usage.collapse(7) is not None


def test_a_channel_of_a_map_is_active_where_one_position_is() -> None:
    mean = torch.zeros(40, 2, 3, 3, dtype=torch.float64)
    mean[:, 1, 2, 0] = torch.randn(40, generator=generator("map"), dtype=torch.float64)
    usage = count(mean, torch.zeros_like(mean))
    assert usage.what == "channels" and len(usage.variance) == 2 and usage.active == 1
    assert usage.kl == pytest.approx([0, float(mean.square().sum(dim=(1, 2, 3)).mean() / 2)])


@pytest.mark.parametrize(
    ("scales", "extent", "active"),
    [([1.0, 1.0, 1.0], None, 3), ([1.0, 0.0, 0.05], "partial", 1), ([0.0, 0.0, 0.05], "total", 0)],
)
def test_total_and_partial(scales: list[float], extent: str | None, active: int) -> None:
    mean = torch.randn(200, 3, generator=generator("scales"), dtype=torch.float64) * torch.tensor(scales)
    usage = count(mean, -mean.square().clamp(max=1))
    assert usage.active == active
    alarm = usage.collapse(300)
    assert (alarm.extent if alarm else None) == extent
    if alarm:
        assert f"collapse ({extent}) at step 300" in str(alarm)
        assert Collapse.from_json(json.loads(json.dumps(alarm.to_json())), "here") == alarm


def test_a_mean_that_follows_the_class_alone_says_nothing() -> None:
    """With a prior per class, the posterior's mean varies although it is the prior's: the KL knows."""
    label = torch.arange(60) % 3
    prior = DiagonalGaussian(label.double()[:, None], torch.zeros(60, 1, dtype=torch.float64))
    counter = UsageCounter()
    posterior = DiagonalGaussian(prior.mean, prior.log_variance, prior)
    counter.add(posterior, torch.ones(60, dtype=torch.bool))
    usage = counter.result(ALONE)
    assert usage.variance[0] > 0.5 and usage.active == 0


def test_an_encoder_without_a_density_is_judged_by_its_mean() -> None:
    class Point:
        mean = torch.tensor([[0.0, 1.0], [0.0, -1.0]])

        def kl(self) -> Tensor:
            raise NotDefined("kl is not defined, because it has no density")

    counter = UsageCounter()
    counter.add(Point(), torch.tensor([True, True]))  # type: ignore[arg-type]
    usage = counter.result(ALONE)
    assert usage.kl is None and usage.active == 1
    alarm = usage.collapse(1)
    assert alarm is not None and alarm.kl is None and "nats" not in str(alarm)


def test_a_foreign_record_is_refused() -> None:
    assert Collapse.from_json(None, "x") is None
    for wrong in ("total", {"extent": "total"}, {"extent": "big", "what": "dimensions", "kl": 1}, [1]):
        with pytest.raises(UserError, match=r"^CKPT: its record of posterior collapse"):
            Collapse.from_json(wrong, "CKPT")


# In a run -----------------------------------------------------------------------------------------------------


def job(data: Path, beta: float, **train: Any) -> Job:
    settings = {"steps": 60, "validate_every": 30, "save_every": 30, "ema_half_life": None, "log_every": 30}
    content = small_job(data, **settings | train).model_dump(mode="json")
    content["train"]["weights"] = None
    content["train"]["optim"] = {"main": {"learning_rate": 5e-3}}
    content["model"] |= {"beta": beta, "encoder": {"kind": "mlp", "width": 32}}
    return parse(Job, content, "test")


@pytest.fixture(scope="module")
def collapsed(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("collapsed") / "run"
    fit(job(phantom, beta=1e4), run, options=FitOptions(quiet=True))
    return run


def test_a_collapsed_run_says_so_in_its_folder_and_its_checkpoints(
    collapsed: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((collapsed / "collapse.json").read_text())
    assert (record["extent"], record["active"], record["units"], record["step"]) == ("total", 0, 4, 60)
    assert load_checkpoint(resolve_checkpoint(collapsed)).state["collapse"] == record
    run = open_run(collapsed)
    assert run.collapse is not None and run.collapse.to_json() == record
    rows = [json.loads(line) for line in (collapsed / "latents.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [30, 60]
    assert len(rows[-1]["kl"]) == len(rows[-1]["variance"]) == 4 and max(rows[-1]["variance"]) < 0.01
    logged = [json.loads(line) for line in (collapsed / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if row["kind"] == "validate"][-1]
    assert last["active_units"] == 0 and last["rate"] == pytest.approx(
        sum(rows[-1]["kl"]), rel=1e-4, abs=1e-6
    )

    # Continued, the record comes from the checkpoint, and an alarm that was logged is not logged again.
    longer = tmp_path / "longer"
    shutil.copytree(collapsed, longer)
    (longer / "collapse.json").unlink()
    fit(job(phantom, beta=1e4, steps=70), longer)
    assert "ALARM" not in capsys.readouterr().out
    assert json.loads((longer / "collapse.json").read_text())["step"] == 70


def test_a_run_that_uses_its_latent_raises_no_alarm(phantom: Path, tmp_path: Path) -> None:
    fit(
        job(phantom, beta=1e-3, steps=160, validate_every=160),
        tmp_path / "run",
        options=FitOptions(quiet=True),
    )
    assert not (tmp_path / "run" / "collapse.json").exists()
    assert open_run(tmp_path / "run").collapse is None


def test_the_alarm_is_logged_when_it_changes_and_when_it_ends(phantom: Path, tmp_path: Path) -> None:
    settings = resolved(job(phantom, beta=1.0))
    run = RunFolder.make(tmp_path / "run")
    run.record_start(settings, step=None)
    console = io.StringIO()
    log = RunLog(run, settings, total_steps=100, console=console)
    index = Index.open(phantom)
    model = build(settings.model, index.spec, 0)
    watch = ValidationFigures(run, log, settings, index.classes, None)
    for step, variance in enumerate([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]):
        usage = Usage(variance, [one / 2 for one in variance], "dimensions")
        watch.update(step, model, ValidationSamples({}, {}, usage))
        assert run.collapse.exists() == (min(variance) == 0)
    lines = console.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ALARM", "ALARM", "step 3"]
    assert "(total) at step 0" in lines[0] and "(partial) at step 2: 1 of 2 latent dimensions" in lines[1]
    assert lines[2] == "step 3: all 2 latent dimensions are active again"
    log.close()


def test_sample_and_evaluate_repeat_the_alarm(
    collapsed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample([str(collapsed), "--num-samples", "2", "--output-path", str(tmp_path / "s.png")]) == 0
    assert "ALARM: posterior collapse (total) at step 60" in capsys.readouterr().out
    assert evaluate([str(collapsed), "--split", "validate", "--out", str(tmp_path / "out")]) == 0
    assert "ALARM  posterior collapse (total) at step 60" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["collapse"]["extent"] == "total"
