"""The VAE-GAN: what each of its three networks minimises, and whom that reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (8, 8))
BODY = {"kind": "conv", "width": 8, "depth": 1, "downsample": 2}


def make(**section: Any) -> Variant:
    given = {"kind": "vaegan", "encoder": BODY, "discriminator": BODY, "latent": 3, **section}
    return build(model_config(given), SPEC, 0).double()


def images(rows: int = 4) -> Tensor:
    return torch.randint(0, 256, (rows, 1, 8, 8), generator=generator("vaegan"), dtype=torch.uint8)


def lanes(phase: str, step: int = 1) -> LaneContext:
    return LaneContext(seed=0, step=step, phase=phase, batch_size=4, lanes=2)


@torch.no_grad()
def expected(model: Variant, image: Tensor, phase: str) -> dict[str, Tensor]:
    """The pieces of every loss, put together by hand."""
    ctx = lanes(phase)
    posterior = model.encode(image)
    rebuilt = 2 * model.decode(posterior.sample(ctx.noise("z", (4, 3)))).mean - 1
    painted = 2 * model.decode(ctx.noise("prior", (4, 3)).double()).mean - 1
    score, wanted = model.discriminator.features(model.to_network(image))
    _, found = model.discriminator.features(rebuilt)
    return {
        "rate": posterior.kl().sum(1),
        "similarity": 0.5 * (wanted - found).square().sum(1),
        "real": score,
        "rebuilt": model.discriminator(rebuilt),
        "painted": model.discriminator(painted),
    }


def test_each_phase_minimises_what_the_paper_says() -> None:
    model, batch = make(beta=2.0, style=0.3), {"image": images()}
    by_hand = expected(model, batch["image"], "discriminator")
    terms = model(batch, lanes("discriminator"))
    fake = 0.5 * (softplus(by_hand["rebuilt"]) + softplus(by_hand["painted"]))
    torch.testing.assert_close(terms["loss"], softplus(-by_hand["real"]) + fake, rtol=1e-6, atol=0)

    by_hand = expected(model, batch["image"], "encoder")
    terms = model(batch, lanes("encoder"))
    torch.testing.assert_close(terms["loss"], 2 * by_hand["rate"] + by_hand["similarity"], rtol=1e-6, atol=0)

    by_hand = expected(model, batch["image"], "decoder")
    terms = model(batch, lanes("decoder"))
    game = 0.5 * (softplus(-by_hand["rebuilt"]) + softplus(-by_hand["painted"]))
    torch.testing.assert_close(terms["loss"], 0.3 * by_hand["similarity"] + game, rtol=1e-6, atol=0)


def test_phases_share_the_parameters_out() -> None:
    model = make(likelihood={"kind": "gaussian", "sigma": "learned"}, condition=None)
    owners: dict[int, list[str]] = {}
    for phase in model.phases:
        for parameter in model.parameters_of(phase):
            owners.setdefault(id(parameter), []).append(phase)
    named = {name: owners[id(parameter)] for name, parameter in model.named_parameters()}
    assert all(len(phases) == 1 for phases in named.values())
    assert named["observation.raw_sigma"] == ["decoder"]
    assert {name.partition(".")[0] for name, phases in named.items() if phases == ["encoder"]} == {"encoder"}


def test_the_discriminator_does_not_train_on_the_similarity() -> None:
    model = make()
    model({"image": images()}, lanes("discriminator"))["loss"].mean().backward()
    assert all(p.grad is None for phase in ("encoder", "decoder") for p in model.parameters_of(phase))


def test_both_pictures_are_augmented_alike() -> None:
    """A perfect reconstruction has similarity 0 whatever the augmentation."""
    model, image = (
        make(diffaugment=["color", "translation", "cutout"], likelihood={"kind": "laplace"}),
        images(),
    )

    class Copy(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return image.double() / 127.5 - 1

    model.decoder = Copy()
    terms = model({"image": image}, lanes("encoder"))
    torch.testing.assert_close(terms["similarity"], torch.zeros(4, dtype=torch.float64))
    assert float(make()({"image": image}, lanes("encoder"))["similarity"].detach().min()) > 0


def test_pixel_terms_are_added_to_both() -> None:
    for phase, style in [("encoder", 1.0), ("decoder", 0.01)]:
        with torch.no_grad():
            plain = make()({"image": images()}, lanes(phase))
            both = make(pixel=0.5)({"image": images()}, lanes(phase))
        torch.testing.assert_close(both["loss"], plain["loss"] + 0.5 * both["distortion"])
        torch.testing.assert_close(both["similarity"], plain["similarity"])
        assert style * float(plain["similarity"].min()) < float(plain["loss"].min())


def test_an_optimal_sigma_is_measured_in_the_decoders_turn_alone() -> None:
    model = make(likelihood={"kind": "gaussian", "sigma": "optimal"}, pixel=1.0)
    assert model.batch_statistics
    moved = []
    for phase in model.phases:
        before, ctx = float(model.observation.scale), lanes(phase)
        model({"image": images()}, ctx)
        with torch.no_grad():
            model.after_step(ctx)
        moved.append(float(model.observation.scale) != before)
    assert moved == [False, False, True]


def test_it_starts_from_a_vae_that_reads_its_decoder_alike() -> None:
    vae = build(model_config({"kind": "vae", "encoder": BODY, "latent": 3}), SPEC, 3).double()
    model, mapping = make(), {"encoder": "encoder", "decoder": "decoder"}
    model.check_source(vae.config, mapping, "init_from=vae")
    for name in mapping:
        getattr(model, name).load_state_dict(getattr(vae, name).state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model.reconstruct(images()), vae.reconstruct(images()))
        torch.testing.assert_close(model.sample(3), vae.sample(3))
    other = model_config({"kind": "vae", "encoder": BODY, "latent": 3, "likelihood": {"kind": "laplace"}})
    with pytest.raises(UserError, match=r"^init_from=vae: .*laplace.*bernoulli.*: give both the same"):
        model.check_source(other, mapping, "init_from=vae")


def test_numbers_of_pixels_may_judge_a_run_and_those_of_the_game_may_not() -> None:
    model = make()
    assert {"mse", "distortion", "rate"} <= model.units.keys() - model.adversarial_terms
    assert {"loss", "similarity", "real_accuracy"} <= model.adversarial_terms
    ctx = SampleContext(seed=0, samples=range(4))
    for phase in model.phases:
        ctx.phase = phase
        with torch.no_grad():
            assert model({"image": images()}, ctx).keys() <= model.units.keys()
