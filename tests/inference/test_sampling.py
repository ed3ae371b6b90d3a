"""Samples in parts, and pictures of a latent space: what is decoded is what the module says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.errors import NotDefined, UserError
from vaedist.core.imaging import to_uint8
from vaedist.inference.latent_space import traversal
from vaedist.inference.mixture import Mixture, MixtureParameters
from vaedist.inference.sampling import Sampler, finite_pixels
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (8, 8), classes=3)
BODY = {"kind": "mlp", "width": 16, "depth": 1}


def small(**settings: object) -> Variant:
    section = {"kind": "vae", "encoder": BODY, "latent": 2, **settings}
    return build(model_config(section), SPEC, seed=1).eval().requires_grad_(False)


def test_samples_in_parts_are_the_models_own() -> None:
    model = small(condition={"dropout": 0.2, "prior": "per_class"})
    label = [0, 2, -1, 1, 0]
    whole = to_uint8(model.sample(5, seed=3, label=torch.tensor(label), temperature=0.6))
    sampler = Sampler(model, seed=3, temperature=0.6)
    parts = [sampler.draw(2, 0, label[:2]), sampler.draw(3, 2, label[2:])]
    assert (np.concatenate([part.images for part in parts]) == whole).all()
    assert all(part.codes is None for part in parts)


@pytest.mark.parametrize("settings", [{}, {"condition": {"prior": "per_class"}}, {"latent": 5}])
def test_the_latents_of_samples_are_those_that_samples_are_decoded_from(settings: dict[str, object]) -> None:
    model = small(**settings)
    if settings.get("condition"):  # at the start every class has the same prior
        model.class_prior.mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    label = [2, 0, 1] if model.conditional else None
    labels = None if label is None else torch.tensor(label)
    z = Sampler(model, seed=7, temperature=0.8).latents(3, 4, label)
    assert (
        to_uint8(model.decode(z, labels).mean)
        == to_uint8(model.sample(3, seed=7, first=4, label=labels, temperature=0.8))
    ).all()


def test_a_mixture_takes_the_place_of_the_prior() -> None:
    model = small()
    mixture = Mixture((MixtureParameters(np.ones(1), np.array([[2.0, -1.0]]), np.zeros((1, 2))),), (2,), 9)
    images = Sampler(model, mixture=mixture).draw(3).images
    assert (images == to_uint8(model.decode(torch.tensor([[2.0, -1.0]])).mean)).all()


def test_prior_and_decoder_take_the_class() -> None:
    model = small(condition={"prior": "per_class", "how": "concat"})
    model.class_prior.mean[2] = torch.tensor([0.5, -0.5])  # type: ignore[union-attr]
    [image] = traversal(model, [0], 3, label=2)[1:2]
    z = torch.tensor([[0.5, -0.5]])
    assert (image == to_uint8(model.decode(z, torch.tensor([2])).mean)).all()
    with pytest.raises(UserError, match="name a class"):
        traversal(model, [0], 3)


def test_what_a_variant_cannot_do_is_not_defined() -> None:
    codes = build(
        model_config(
            {
                "kind": "vqvae",
                "encoder": {"kind": "conv", "width": 8, "depth": 0, "downsample": 4},
                "codebook": {"kind": "ema", "codes": 4, "dim": 2},
            }
        ),
        SPEC,
        seed=0,
    )
    with pytest.raises(NotDefined, match="sample is not defined"):
        Sampler(codes)
    with pytest.raises(NotDefined, match="map of codes"):
        traversal(codes, [0], 3)
    with pytest.raises(NotDefined, match="codes is not defined, because its latent is made of numbers"):
        Sampler(small(), codes=True)
    with pytest.raises(NotDefined, match=r"top_k is not defined, because .*sampling options: none"):
        Sampler(small(), options={"top_k": 3})


def test_images_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        finite_pixels(torch.tensor([0.1, float("nan")]))
