"""Conditional VAEs, latent maps and free bits: what each setting of `kind: vae` changes in the loss and the samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, distributions

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (8, 8), classes=3)
MLP = {"kind": "mlp", "width": 16, "depth": 1}
CONV = {"kind": "conv", "width": 16, "depth": 0, "downsample": 4}
ROWS = 12


def make(spec: Spec = SPEC, **section: Any) -> Variant:
    model = build(model_config({"kind": "vae", "encoder": MLP, "latent": 3, **section}), spec, 0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.abs().max() == 0:  # what starts at 0 would hide what it does
                parameter.copy_(torch.randn(parameter.shape, generator=generator(name)) / 3)
    return model


def images(rows: int = ROWS) -> Tensor:
    shape = (rows, *SPEC.image_shape)
    return torch.randint(0, 256, shape, generator=generator("cvae"), dtype=torch.uint8)


LABEL = torch.arange(ROWS) % 3
HOW = [{"how": "film"}, {"how": "concat"}, {"label": "one_hot", "how": "concat"}, {"prior": "per_class"}]


@pytest.mark.parametrize("condition", HOW, ids=str)
@pytest.mark.parametrize("latent", [3, {"kind": "map", "channels": 2}], ids=["vector", "map"])
def test_the_label_is_seen_by_encoder_and_decoder(condition: dict[str, Any], latent: Any) -> None:
    model = make(condition=condition, encoder=CONV, latent=latent)
    assert model.conditional and model.latent_shape == ((3,) if latent == 3 else (2, 2, 2))
    image, other = images(), (LABEL + 1) % 3
    with torch.no_grad():
        z = model.encode(image, LABEL).mean
        assert z.shape == (ROWS, *model.latent_shape)
        assert float((model.encode(image, other).mean - z).abs().min(1).values.max()) > 1e-6
        assert float((model.decode(z, other).mean - model.decode(z, LABEL).mean).abs().max()) > 1e-4
        terms = model({"image": image, "label": LABEL}, SampleContext(seed=0, samples=range(ROWS)))
        prior = model.prior(LABEL)
        noise = SampleContext(seed=0, samples=range(ROWS)).noise("z", z.shape)
        q = model.encode(image, LABEL)
        theirs = distributions.kl_divergence(
            distributions.Normal(q.mean, q.std),
            distributions.Normal(prior.mean.expand_as(z), (prior.log_variance / 2).exp().expand_as(z)),
        )
        decoded = model.decode(q.sample(noise), LABEL)
    torch.testing.assert_close(terms["rate"], theirs.flatten(1).sum(1))
    torch.testing.assert_close(terms["distortion"], -decoded.log_prob(image))
    torch.testing.assert_close(terms["loss"], terms["distortion"] + terms["rate"])


def test_dropped_labels_are_the_unconditional_model() -> None:
    model = make(condition={"dropout": 0.5, "prior": "per_class"})
    image, ctx = images(), LaneContext(seed=3, step=5, batch_size=ROWS, lanes=4)
    dropped = ctx.uniform("label", (ROWS,)) < 0.5
    assert 0 < int(dropped.sum()) < ROWS
    with torch.no_grad():
        terms = model({"image": image, "label": LABEL}, ctx)
        known, unknown = model.encode(image, LABEL).kl().sum(1), model.encode(image).kl().sum(1)
        shown = model({"image": image, "label": LABEL}, SampleContext(seed=0, samples=range(ROWS)))
    assert float((known - unknown).abs().min()) > 1e-3
    torch.testing.assert_close(terms["rate"], torch.where(dropped, unknown, known))
    torch.testing.assert_close(shown["rate"], known)  # validation drops none


def test_without_dropout_a_label_must_be_given() -> None:
    model = make(condition={})
    for refused in (
        lambda: model.encode(images()),
        lambda: model.reconstruct(images()),
        lambda: model.sample(2, label=torch.tensor([-1, 0])),
    ):
        with pytest.raises(UserError, match="saw the label of every training image: name a class"):
            refused()
    with pytest.raises(UserError, match="there is no class 3: the model knows 0 to 2"):
        model.sample(1, label=torch.tensor([3]))
    with pytest.raises(UserError, match="these data carry no labels"):
        make(Spec(1, (8, 8)), condition={})


def test_samples_of_a_class() -> None:
    model = make(condition={"dropout": 0.1, "prior": "per_class"})
    zeros, ones = torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.int64)
    each = [model.sample(200, seed=4, label=label) for label in (zeros, ones, ones + 1, zeros - 1)]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.pairwise(each))
    # Without a label, sample i is that of the class drawn for it: one of them, and about as often each.
    free = model.sample(200, seed=4)
    same = torch.stack([(free - one).abs().flatten(1).amax(1) < 1e-9 for one in each])
    assert same.sum(0).tolist() == [1] * 200
    assert same.sum(1)[:3].min() >= 45 and int(same[3].sum()) == 0
    torch.testing.assert_close(model.sample(70, seed=4, first=30), free[30:100])
    torch.testing.assert_close(model.sample(2, seed=4, first=7, label=ones[:2]), each[1][7:9])
    # At temperature 0 what is left is the prior's mean of the class.
    cold = model.sample(2, label=ones[:2], temperature=0.0)
    with torch.no_grad():
        expected = model.decode(model.prior(ones[:2]).mean, ones[:2]).mean
    torch.testing.assert_close(cold, expected)


def test_training_learns_what_a_class_looks_like() -> None:
    """Three bars, one per class: samples of a class show its bar, and z has nothing left to say."""
    model = make(condition={"dropout": 0.25}, latent=2).float()
    pictures = torch.zeros(3, *SPEC.image_shape, dtype=torch.uint8)
    for bar in range(3):
        pictures[bar, :, 3 * bar : 3 * bar + 2] = 255
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(500):
        ctx = LaneContext(seed=0, step=step, batch_size=ROWS, lanes=4)
        terms = model({"image": pictures[LABEL], "label": LABEL}, ctx)
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    drawn = model.sample(ROWS, label=LABEL)
    assert float((drawn - pictures[LABEL] / 255).abs().mean()) < 0.05
    with torch.no_grad():
        known = model.encode(pictures, torch.arange(3)).kl().sum(1)
        unknown = model.encode(pictures).kl().sum(1)
    assert float(known.max()) < 0.3 < float(unknown.min())
    # Without a label each sample is still one of the bars.
    drawn = model.sample(30, label=torch.full((30,), -1))
    nearest = (drawn[:, None] - pictures / 255).abs().flatten(2).mean(2).min(1).values
    assert float(nearest.median()) < 0.1


def test_maps_need_one_grid() -> None:
    with pytest.raises(UserError, match=r"encoder emits a 2x2 map and model\.decoder reads 4x4"):
        make(encoder=CONV, decoder={**CONV, "downsample": 2}, latent={"kind": "map", "channels": 2})
    with pytest.raises(UserError, match=r"the key 'model\.latent\.channels' is missing"):
        make(latent={"kind": "map"})
    with pytest.raises(UserError, match=r"model\.latent: input should be greater than or equal to 1"):
        make(latent=0)


@pytest.mark.parametrize("latent", [3, {"kind": "map", "channels": 2}], ids=["vector", "map"])
def test_free_bits_are_nats_per_dimension_of_the_batch_mean(latent: Any) -> None:
    free, beta = 0.2 if latent == 3 else 0.8, 1.5
    model, image = make(free_bits=free, beta=beta, latent=latent, encoder=CONV), images()
    assert model.batch_statistics
    ctx = LaneContext(seed=0, step=0, batch_size=ROWS, lanes=2)
    terms = model({"image": image}, ctx)
    kl = model.encode(image).kl().flatten(1)
    mean = kl.mean(0)
    assert 0 < int((mean < free).sum()) < len(mean), "some dimensions on each side"
    paid = torch.maximum(mean, torch.tensor(free)).sum()
    torch.testing.assert_close(terms["rate"], kl.sum(1))
    torch.testing.assert_close(terms["loss"], terms["distortion"] + beta * paid)
    # A dimension below the free nats feels no pull from the rate.
    pull = torch.autograd.grad((terms["loss"] - terms["distortion"]).mean(), model.encoder.parameters())
    by_hand = torch.autograd.grad(beta * mean[mean > free].sum(), model.encoder.parameters())
    for mine, theirs in zip(pull, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs)
    shown = model({"image": image}, SampleContext(seed=0, samples=range(ROWS)))
    torch.testing.assert_close(shown["loss"], shown["distortion"] + beta * shown["rate"])


def test_free_bits_have_no_place_in_the_importance_bound() -> None:
    with pytest.raises(
        UserError, match="free_bits change the KL term, and the bound of num_importance has none"
    ):
        make(free_bits=0.1, num_importance=5)
