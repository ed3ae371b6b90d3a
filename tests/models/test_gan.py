"""The GAN: whom each phase trains, what a VAE's decoder becomes in it, and that the game converges on a toy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vaedist.config.job import Job, Spec
from vaedist.config.model_section import model_config
from vaedist.config.settings import parse
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.data.loading.inputs import Inputs
from vaedist.distributed.process_group import Group
from vaedist.models.contract import Variant, build
from vaedist.models.gan import OUTPUTS, reading
from vaedist.nets.likelihoods import ObservationModel
from vaedist.training.ema import WeightAverage
from vaedist.training.step import TrainStep

SPEC = Spec(1, (8, 8))
BODY = {"kind": "conv", "width": 8, "depth": 1, "downsample": 2}
MLP = {"kind": "mlp", "width": 16, "depth": 2}
GAN = {"kind": "gan", "generator": BODY, "discriminator": BODY, "latent": 3}


def make(spec: Spec = SPEC, **section: Any) -> Variant:
    return build(model_config({**GAN, **section}), spec, 0).double()


def images(rows: int = 4, spec: Spec = SPEC) -> Tensor:
    shape = (rows, *spec.image_shape)
    return torch.randint(0, 256, shape, generator=generator("gan"), dtype=torch.uint8)


def lanes(phase: str, step: int = 1) -> LaneContext:
    return LaneContext(seed=0, step=step, phase=phase, batch_size=4, lanes=2)


# Phases -------------------------------------------------------------------------------------------------------


def test_a_phase_sends_gradients_to_its_own_network() -> None:
    model = make()
    model({"image": images()}, lanes("discriminator", 0))["loss"].mean().backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.discriminator.parameters())
    both = {id(p) for phase in model.phases for p in model.parameters_of(phase)}
    assert both == {id(p) for p in model.parameters()}


def test_the_generator_is_paid_for_what_the_discriminator_believes() -> None:
    model, batch = make(), {"image": images()}
    before = model(batch, lanes("generator"))
    torch.testing.assert_close(before["loss"], torch.nn.functional.softplus(-before["fake_score"]))
    optimizer = torch.optim.SGD(model.generator.parameters(), 1e-2)
    before["loss"].mean().backward()
    optimizer.step()
    assert float(model(batch, lanes("generator"))["fake_score"].mean()) > float(before["fake_score"].mean())


def test_real_images_are_the_clean_ones() -> None:
    model, image = make(), images()
    noisy = {"image": 255 - image, "target": image}
    one, other = model(noisy, lanes("discriminator")), model({"image": image}, lanes("discriminator"))
    assert torch.equal(one["real_score"], other["real_score"])


def test_outside_training_there_is_no_penalty() -> None:
    ctx = SampleContext(seed=0, samples=range(4))
    ctx.phase = "discriminator"
    with torch.no_grad():
        terms = make()({"image": images()}, ctx)
    assert "r1" not in terms
    torch.testing.assert_close(
        terms["loss"],
        torch.nn.functional.softplus(-terms["real_score"])
        + torch.nn.functional.softplus(terms["fake_score"]),
    )


def test_the_average_is_of_the_generator_alone() -> None:
    model = make(spectral_norm=True)
    average = WeightAverage(model, half_life=100)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            parameter.add_(1)
    average.update(images=10**6, batch_size=50)
    for name, value in average.model.state_dict().items():
        moved = 1 - 0.5**0.5 if name.startswith("generator.") else 1
        torch.testing.assert_close(value, before[name] + moved)


def test_what_is_compiled_and_why_not() -> None:
    assert make(r1=0).compiled == ("generator", "discriminator") and make(r1=0).uncompiled == {}
    assert make().compiled == ("generator",) and "R1" in make().uncompiled["discriminator"]


# From a VAE -----------------------------------------------------------------------------------------------------

EXACT = [
    ({"kind": "bernoulli"}, "sigmoid_logits"),
    ({"kind": "gaussian", "sigma": 0.3}, "linear"),
    ({"kind": "gaussian", "sigma": "learned"}, "linear"),
    ({"kind": "gaussian", "sigma": "optimal"}, "linear"),
    ({"kind": "laplace"}, "linear"),
]


def vae(likelihood: dict[str, Any], spec: Spec = SPEC) -> Variant:
    section = {"kind": "vae", "encoder": BODY, "latent": 3, "likelihood": likelihood}
    return build(model_config(section), spec, 5).double()


@pytest.mark.parametrize(("likelihood", "output"), EXACT, ids=str)
@pytest.mark.parametrize("spec", [SPEC, Spec(3, (8, 8))], ids=str)
def test_the_first_samples_are_the_vaes_own(likelihood: dict[str, Any], output: str, spec: Spec) -> None:
    source, model = vae(likelihood, spec), make(spec, output=output)
    with torch.no_grad():
        source.decoder[-1][-2].weight.mul_(5)  # reach beyond black and white
    mapping = {"decoder": "generator"}
    model.check_source(source.config, mapping, "init_from=vae")
    model.generator.load_state_dict(source.decoder.state_dict(), strict=True)
    mine, theirs = model.sample(6, seed=3), source.sample(6, seed=3)
    assert float(theirs.std()) > 0.05
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_map_latent_starts_from_a_vae_with_one() -> None:
    latent = {"kind": "map", "channels": 2}
    section = {"kind": "vae", "encoder": BODY, "latent": latent}
    source, model = (
        build(model_config(section), SPEC, 5).double(),
        make(latent=latent, output="sigmoid_logits"),
    )
    model.generator.load_state_dict(source.decoder.state_dict(), strict=True)
    torch.testing.assert_close(model.sample(6), source.sample(6), rtol=1e-5, atol=1e-6)


def test_a_logistic_with_one_output_is_read_as_its_mean_nearly() -> None:
    likelihood = {"kind": "logistic", "scale": "learned"}
    source, model = vae(likelihood), make(output="linear")
    model.check_source(source.config, {"decoder": "generator"}, "init_from=vae")
    model.generator.load_state_dict(source.decoder.state_dict(), strict=True)
    torch.testing.assert_close(model.sample(6), source.sample(6), rtol=0, atol=0.15)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("likelihood", "fitting"), EXACT[:2], ids=str)
def test_another_reading_is_refused(likelihood: dict[str, Any], fitting: str, output: str) -> None:
    source = vae(likelihood)
    assert reading(ObservationModel(source.config.likelihood, SPEC)) == fitting
    if output == fitting:
        return
    with pytest.raises(UserError, match=rf"^init_from=vae: .* set model\.output={fitting}$"):
        make(output=output).check_source(source.config, {"decoder": "generator"}, "init_from=vae")


@pytest.mark.parametrize(
    "likelihood",
    [{"kind": "gaussian", "sigma": "predicted"}, {"kind": "logistic"}, {"kind": "logistic", "components": 3}],
    ids=str,
)
def test_a_decoder_with_more_than_one_output_per_channel_is_refused(likelihood: dict[str, Any]) -> None:
    source = vae(likelihood)
    with pytest.raises(UserError, match=r"its decoder emits \d+ numbers for the 1 of each pixel"):
        make().check_source(source.config, {"decoder": "generator"}, "init_from=vae")
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().generator.load_state_dict(source.decoder.state_dict(), strict=True)


def test_another_gan_must_read_its_generator_alike() -> None:
    source = make(output="linear").config
    make(output="linear").check_source(source, {}, "init_from=gan")
    with pytest.raises(UserError, match=r"set model\.output=linear"):
        make(output="tanh").check_source(source, {}, "init_from=gan")
    make(output="tanh").check_source(source, {"discriminator": "discriminator"}, "init_from=gan")


# The game -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gan_loss", ["ns", "relativistic"])
def test_the_game_converges_to_the_law_of_the_data(gan_loss: str) -> None:
    """Pictures of one pixel, grey 80 +- 25: what is painted starts at 144 +- 5 and gets there."""
    steps, rows = 800, 32
    optim = {"betas": [0.0, 0.99], "schedule": {"kind": "cosine"}}
    content = {
        "model": {
            **GAN,
            "generator": MLP,
            "discriminator": MLP,
            "latent": 2,
            "gan_loss": gan_loss,
            "r1_every": 4,
        },
        "train": {
            "steps": steps,
            "batch_size": rows,
            "optim": {
                "discriminator": {"learning_rate": 1e-2, **optim},
                "generator": {"learning_rate": 5e-3, "start": 20, **optim},
            },
        },
    }
    job = parse(Job, content, "test")
    net = build(job.model, Spec(1, (1, 1)), 0)
    one = TrainStep(job, Group(torch.device("cpu")), net, 16, (0, rows), Inputs(job))
    average = WeightAverage(net, half_life=2000)

    def law() -> tuple[float, float]:
        grey = 255 * average.model.sample(500, seed=1)
        return float(grey.mean()), float(grey.std())

    mean, std = law()
    assert mean > 120 and std < 10
    for step in range(steps):
        noise = torch.randn((rows, 1, 1, 1), generator=generator("toy", step))
        image = (80 + 25 * noise).clamp(0, 255).to(torch.uint8)
        assert one({"image": image}, step, steps, stop_requested=False).accepted
        average.update((step + 1) * rows, rows)
    mean, std = law()
    assert mean == pytest.approx(80, abs=12)
    assert std == pytest.approx(25, abs=8)
