"""Adding a variant touches one file: the README's example, in a temporary folder, is trained, evaluated and sampled."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vaedist.evaluate
import vaedist.models
import vaedist.sample
import vaedist.train
from vaedist.config.model_section import kinds, model_config
from vaedist.core.errors import UserError

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(CAPACITY,) = re.findall(
    r"^```python\n(# vaedist/models/capacity_vae\.py\n.*?)^```", README, re.MULTILINE | re.DOTALL
)

JOB = """
name: capacity
data: {{path: {data}}}
model:
  kind: capacity_vae
  encoder: {{kind: mlp, width: 32, depth: 1}}
  latent: 4
  capacity: 3.0
train:
  steps: 60
  batch_size: 16
  threads: 1
  validate_every: 60
  save_every: 60
  optim: {{main: {{learning_rate: 3e-3}}}}
"""


@pytest.fixture
def with_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one file, where Python looks for variants."""
    folder = tmp_path / "variants"
    folder.mkdir()
    (folder / "capacity_vae.py").write_text(CAPACITY)
    monkeypatch.setattr(vaedist.models, "__path__", [*vaedist.models.__path__, str(folder)])
    yield
    sys.modules.pop("vaedist.models.capacity_vae", None)


def test_one_file_is_a_variant_everywhere(
    with_capacity: None,
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "capacity_vae" in kinds()
    Path("job.yaml").write_text(JOB.format(data=phantom))
    assert vaedist.train.main(["job.yaml", "--run-dir", "run", "-q"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    [last] = [row for row in rows if row["kind"] == "validate"]
    assert abs(last["rate"] - 3.0) < 1.0, "it learned what its own loss asks for"
    # A setting of its own is checked like any other, and a run goes on like any other.
    with pytest.raises(UserError, match=r"unknown key 'model\.capcity'; did you mean 'capacity'"):
        model_config({"kind": "capacity_vae", "capcity": 1})
    assert vaedist.train.main(["job.yaml", "train.steps=62", "--run-dir", "run", "-q"]) == 0
    # The other doors open its run.
    assert vaedist.evaluate.main(["run"]) == 0
    assert vaedist.sample.main(["run", "--num-samples", "4", "--npz", "s.npz"]) == 0
    assert np.load("s.npz")["images"].shape == (4, 1, 16, 16)
    assert "capacity_vae" in capsys.readouterr().out


def test_it_is_gone_with_its_file() -> None:
    assert "capacity_vae" not in kinds()
    with pytest.raises(UserError, match="unknown model kind 'capacity_vae'"):
        model_config({"kind": "capacity_vae"})
