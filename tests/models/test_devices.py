"""Models keep to their device: run on torch's `meta`, whose tensors, like a GPU's, do not mix with those of the CPU.

A meta tensor has a shape and no numbers, so this finds what a GPU would refuse and nothing else; what looks at numbers
(codebooks, classes that are checked) cannot be run there.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.run_commands import ROOT
from vaedist.config.job import Spec, load_job
from vaedist.core.context import Batch, LaneContext
from vaedist.data.loading.inputs import static_bits
from vaedist.models.contract import build
from vaedist.nets.pixelcnn import GatedPixelCnn
from vaedist.nets.pixelcnn_config import PixelCnn
from vaedist.nets.transformer import CausalTransformer
from vaedist.nets.transformer_config import Transformer

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def test_meta_does_not_mix() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device=META) + torch.ones(3)


@pytest.mark.parametrize(
    "name", ["vae_mnist", "infovae_oasis", "mmdvae_oasis", "gan_faces", "baselines/earlier_gan_faces"]
)
def test_a_step_and_samples_stay_on_the_device(name: str) -> None:
    job = load_job(ROOT / f"jobs/{name}.yaml", ["data.path=none", "init_from=null"])
    spec = Spec(3 if "faces" in name else 1, (32, 32))
    model = build(job.model, spec, 0).to(META)
    image = torch.zeros(8, spec.channels, 32, 32, dtype=torch.uint8, device=META)
    label = torch.zeros(8, dtype=torch.int64, device=META)
    batch: Batch = {"image": image, "label": label, "key": ["a"] * 8, "sample": list(range(8))}
    for phase in model.phases:
        ctx = LaneContext(seed=0, step=0, phase=phase, batch_size=8, lanes=8, device=META)
        terms = model(batch, ctx)
        assert {value.device for value in terms.values()} == {META}
        terms["loss"].sum().backward()
    with torch.no_grad():
        model.after_step(ctx)
        assert model.sample(4).device == META
        if model.reconstructs:
            assert model.reconstruct(image).device == META


@pytest.mark.parametrize(
    ("kind", "config"), [(GatedPixelCnn, PixelCnn()), (CausalTransformer, Transformer())]
)
def test_networks_of_codes_stay_on_the_device(kind: Any, config: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        network = kind(config, 16, (4, 4)).to(META)
    codes = torch.zeros(2, 4, 4, dtype=torch.int64, device=META)
    network(codes).sum().backward()
    steps = network.start_sampling(2)
    for place in range(16):
        assert steps.logits().device == META
        steps.append(codes[:, place // 4, place % 4])


def test_static_binarisation_is_drawn_on_the_device() -> None:
    assert static_bits(0, ["a", "b"], 5, META).device == META
