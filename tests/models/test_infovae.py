"""InfoVAE: its loss by hand at every corner of (alpha, lambda), what MMD alone does to latents, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.models.contract import Variant, build
from vaedist.nets.divergences import mmd
from vaedist.nets.divergences_config import Imq, Legacy, Rbf

SPEC = Spec(1, (8, 8), classes=2)
MLP = {"kind": "mlp", "width": 16, "depth": 1}
ROWS = 12


def make(**section: Any) -> Variant:
    return build(model_config({"kind": "infovae", "encoder": MLP, "latent": 3, **section}), SPEC, 0).double()


def images(rows: int = ROWS) -> Tensor:
    shape = (rows, *SPEC.image_shape)
    return torch.randint(0, 256, shape, generator=generator("infovae"), dtype=torch.uint8)


KERNELS = [Imq(), Rbf(bandwidth=0.5), Legacy(), Imq(block=4)]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.kind}{kernel.block or ''}")
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, -1.0])
def test_the_loss_is_the_published_one(alpha: float, kernel: Any) -> None:
    weight = 20.0
    model, image = make(alpha=alpha, mmd_weight=weight, kernel=kernel.model_dump()), images()
    ctx = LaneContext(seed=2, step=1, batch_size=ROWS, lanes=4)
    terms = model({"image": image}, ctx)
    with torch.no_grad():
        q = model.encode(image)
        z = q.sample(ctx.noise("z", (ROWS, 3)))
        distance = mmd(z, ctx.noise("prior", (ROWS, 3)).double(), kernel)
        distortion = -model.decode(z).log_prob(image)
    torch.testing.assert_close(terms["mmd"], distance)
    torch.testing.assert_close(terms["distortion"], distortion)
    torch.testing.assert_close(terms["rate"], q.kl().sum(1))
    expected = distortion + (1 - alpha) * q.kl().sum(1) + (alpha + weight - 1) * distance
    torch.testing.assert_close(terms["loss"], expected)
    assert model.batch_statistics


def test_without_mmd_it_is_the_vae() -> None:
    """alpha 0 and lambda 1, and the same weights and noise."""
    model, image = make(alpha=0.0, mmd_weight=1.0), images()
    vae = build(model_config({"kind": "vae", "encoder": MLP, "latent": 3}), SPEC, 0).double()
    ctx = LaneContext(seed=2, step=1, batch_size=ROWS, lanes=4)
    mine, theirs = model({"image": image}, ctx), vae({"image": image}, ctx)
    assert model.state_dict().keys() == vae.state_dict().keys()
    torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=0, atol=0)


def test_latents_start_as_narrow_as_asked() -> None:
    narrow, wide = make(start_sigma=0.02), make()
    narrow.load_state_dict(wide.state_dict())
    q, p = narrow.encode(images()), wide.encode(images())
    torch.testing.assert_close(q.mean, p.mean)
    torch.testing.assert_close(q.std, 0.02 * p.std)  # type: ignore[union-attr]


def test_a_deterministic_encoder_is_a_point() -> None:
    model, image = make(alpha=1.0, deterministic=True), images()
    terms = model({"image": image}, LaneContext(seed=2, step=1, batch_size=ROWS, lanes=4))
    assert set(terms) == {"loss", "distortion", "mse", "mmd"}
    torch.testing.assert_close(terms["loss"], terms["distortion"] + 1000.0 * terms["mmd"])
    q = model.encode(image)
    assert q.sample(torch.ones(ROWS, 3)) is q.mean
    torch.testing.assert_close(model.encoder(model.to_network(image)), q.mean)
    for refused in (q.kl, lambda: q.log_prob(q.mean)):
        with pytest.raises(NotDefined, match="not defined, because the encoder is deterministic"):
            refused()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_mmd_alone_spreads_latents_over_the_prior(deterministic: bool) -> None:
    """MMD-VAE on 64 images: the batch's latents come to have the prior's mean and spread."""
    rows = 64
    model = make(alpha=1.0, mmd_weight=2000.0, deterministic=deterministic).float()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    image = images(rows)
    for step in range(150):
        terms = model({"image": image}, LaneContext(seed=0, step=step, batch_size=rows, lanes=16))
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        ctx = SampleContext(seed=0, samples=range(rows))
        z = model.encode(image).sample(ctx.noise("z", (rows, 3)))
    assert float(z.mean(0).abs().max()) < 0.3
    assert float(z.std(0).log().abs().max()) < 0.3
    assert model.sample(3).isfinite().all()


def test_the_prior_of_a_class_is_what_its_latents_are_compared_with() -> None:
    model, image = make(condition={"prior": "per_class"}, mmd_weight=5.0), images()
    with torch.no_grad():
        model.class_prior.mean[1] += 4.0
    ctx = SampleContext(seed=0, samples=range(ROWS))
    label = torch.arange(ROWS) % 2
    terms = model({"image": image, "label": label}, ctx)
    z = model.encode(image, label).sample(ctx.noise("z", (ROWS, 3)))
    drawn = ctx.noise("prior", (ROWS, 3)).double() + 4.0 * label[:, None]
    torch.testing.assert_close(terms["mmd"], mmd(z, drawn))


def test_one_image_has_no_mmd() -> None:
    model, image = make(), images(1)
    shown = model({"image": image}, SampleContext(seed=0, samples=[0]))
    assert float(shown["mmd"]) == 0
    with pytest.raises(UserError, match=r"train\.batch_size is 1, but MMD compares at least two"):
        model({"image": image}, LaneContext(seed=0, step=0, batch_size=1, lanes=1))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"alpha": 0.5, "mmd_weight": 0.2}, "weight alpha + mmd_weight - 1 is negative (0.5 + 0.2 - 1)"),
        ({"alpha": 1.5}, "model.alpha: input should be less than or equal to 1 (it is 1.5)"),
        ({"deterministic": True}, "a deterministic encoder has no KL term, which alpha 0 would weigh by 1"),
        (
            {"kernel": {"kind": "imq", "bandwith": 1}},
            "unknown key 'model.kernel.bandwith'; did you mean 'bandwi",
        ),
        ({"beta": 2}, "unknown key 'model.beta'"),
    ],
)
def test_weights_that_make_no_sense_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**section)
    assert message in str(caught.value)
