"""The VQ-VAE: scale of its terms, its codebook through real steps, its codes."""

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

SPEC = Spec(1, (16, 16))
BODY = {"kind": "resnet", "width": 8, "depth": 1, "downsample": 4}
CODEBOOKS: dict[str, dict[str, Any]] = {
    "ema": {"kind": "ema", "codes": 8, "dim": 4},
    "gradient": {"kind": "gradient", "codes": 8, "dim": 4},
    "fsq": {"kind": "fsq", "levels": [4, 3]},
    "residual": {"kind": "ema", "codes": 4, "dim": 4, "residual_levels": 2},
    "cosine": {"kind": "gradient", "codes": 8, "dim": 4, "cosine": True},
    "rotation": {"kind": "ema", "codes": 8, "dim": 4, "estimator": "rotation"},
}
CLOSED_FORM = ["ema", "gradient", "fsq", "rotation"]
"""Where what is left over after quantising is one subtraction."""


def make(codebook: str = "ema", **section: Any) -> Variant:
    content = {"kind": "vqvae", "encoder": BODY, "codebook": CODEBOOKS[codebook], **section}
    return build(model_config(content), SPEC, 0).double()


def images(rows: int = 8, seed: int = 0) -> Tensor:
    """Blurred noise: patches that differ, with something to learn."""
    noise = torch.rand((rows, 1, 20, 20), generator=generator("vq", seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1)
    return ((smooth - 0.3) / 0.4 * 255).clamp(0, 255).to(torch.uint8)


def lanes(step: int) -> LaneContext:
    return LaneContext(seed=0, step=step, batch_size=8, lanes=4)


def prepare(model: Variant) -> None:
    with torch.no_grad():
        model.prepare([{"image": images(seed=-1 - i)} for i in range(model.prepare_batches)], lanes(0))


@pytest.mark.parametrize("codebook", CLOSED_FORM)
def test_loss_is_the_sum_of_its_terms_times_pixels(codebook: str) -> None:
    model = make(codebook, commitment=0.3, dssim=0.5, likelihood={"kind": "gaussian", "sigma": 0.2})
    prepare(model)
    image = images()
    terms = model({"image": image}, SampleContext(seed=0, samples=range(8)))
    expected = terms["distortion"] + 0.5 * terms["dssim"]
    assert (
        set(terms) - {"loss", "distortion", "dssim", "mse"}
        == {
            "ema": {"commitment"},
            "gradient": {"commitment", "codebook"},
            "fsq": set(),
            "rotation": {"commitment"},
        }[codebook]
    )
    if codebook != "fsq":
        z = model.encoder(model.to_network(image))
        q = model.quantizer.embed(model.codes(image))
        torch.testing.assert_close(terms["commitment"], (z - q).square().mean((1, 2, 3)))
        expected = expected + 0.3 * SPEC.pixels * terms["commitment"]
    if codebook == "gradient":
        expected = expected + SPEC.pixels * terms["codebook"]
    torch.testing.assert_close(terms["loss"], expected)


def test_commitment_keeps_its_published_balance() -> None:
    """Per pixel, with sigma = data: half the normalised squared error + 0.25 * mean commitment + a constant."""
    model = make()
    prepare(model)
    terms = model({"image": images()}, SampleContext(seed=0, samples=range(8)))
    sigma = model.observation.scale
    constant = sigma.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    z = model.quantizer(model.encoder(model.to_network(images())), SampleContext(seed=0, samples=range(8)))
    error = (model.decoder(z.values) + 1) / 2 - images().double() / 255
    per_pixel = error.square().mean((1, 2, 3)) / sigma**2 / 2 + 0.25 * terms["commitment"] + constant
    torch.testing.assert_close(terms["loss"] / SPEC.pixels, per_pixel, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codebook", list(CODEBOOKS))
def test_training_learns_and_uses_the_codes(codebook: str) -> None:
    model = make(codebook, likelihood={"kind": "gaussian", "sigma": 0.1}).float()
    prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for step in range(120):
        ctx = lanes(step)
        terms = model({"image": images(seed=step % 10)}, ctx)
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
        with torch.no_grad():
            shown = model.after_step(ctx)
        errors.append(float(terms["mse"].mean()))
    assert errors[-1] < 0.5 * errors[0]
    assert int(shown["codes_used"]) >= 0.6 * model.num_codes
    assert 1 < float(shown["perplexity"]) <= int(shown["codes_used"])


def test_a_refused_step_and_an_evaluation_leave_the_codebook_and_accumulation_counts_once() -> None:
    whole, parts = make(), make()
    for model in (whole, parts):
        prepare(model)
    before = {name: value.clone() for name, value in whole.quantizer.state_dict().items()}
    poisoned = whole({"image": images()}, lanes(0))["loss"] * float("nan")
    assert poisoned.isnan().all()  # refused: no after_step
    whole({"image": images()}, SampleContext(seed=0, samples=range(8)))
    assert all(torch.equal(before[name], value) for name, value in whole.quantizer.state_dict().items())

    for step in range(3):
        image, once, twice = images(seed=step), lanes(step), lanes(step)
        with torch.no_grad():
            whole({"image": image}, once)
            reported = whole.after_step(once)
            for start, stop in [(0, 3), (3, 8)]:
                parts({"image": image[start:stop]}, twice.micro_batch(start, stop))
            torch.testing.assert_close(parts.after_step(twice), reported)
        torch.testing.assert_close(
            parts.quantizer.state_dict(), whole.quantizer.state_dict(), rtol=1e-10, atol=1e-12
        )
    assert not torch.equal(whole.quantizer.embedding, before["embedding"])


@pytest.mark.parametrize("codebook", list(CODEBOOKS))
def test_codes_and_back(codebook: str) -> None:
    model, image = make(codebook), images()
    prepare(model)
    with torch.no_grad():
        codes = model.codes(image)
        levels = 2 if codebook == "residual" else 1
        assert codes.shape == (8, 4 * levels, 4) and model.grid == (4, 4)
        assert model.latent_shape == codes.shape[1:]
        torch.testing.assert_close(model.decode_codes(codes).mean, model.reconstruct(image))
        seen = model({"image": image}, SampleContext(seed=0, samples=range(8)))
        x = image.double() / 255
        torch.testing.assert_close(seen["mse"], (model.reconstruct(image) - x).square().mean((1, 2, 3)))


def test_the_start_is_from_the_data() -> None:
    model = make()
    prepare(model)
    with torch.no_grad():
        assert len(model.codes(images(seed=7)).unique()) >= 6
    sigma = float(torch.cat([images(seed=-1 - i) for i in range(4)]).double().div(255).std(correction=0))
    assert float(model.observation.scale) == pytest.approx(sigma, rel=1e-6)


def test_codebooks_are_copied_never_averaged() -> None:
    for codebook in CODEBOOKS:
        model = make(codebook)
        copied = {name for name, _ in model.named_parameters() if not model.averaged(name)}
        trained = CODEBOOKS[codebook]["kind"] == "gradient"
        assert copied == ({"quantizer.embedding"} if trained else set())


def test_a_likelihood_with_more_channels_and_one_with_the_sigma_of_the_batch() -> None:
    image = images()
    model = make(likelihood={"kind": "logistic", "components": 3})
    prepare(model)
    assert model.decoder(torch.zeros(1, 4, 4, 4).double()).shape == (1, 9, 16, 16)
    with torch.no_grad():
        decoded = model.decode_codes(model.codes(image))
        assert decoded.evidence == "discrete" and decoded.mean.shape == image.shape
        terms = model({"image": image}, SampleContext(seed=0, samples=range(8)))
        torch.testing.assert_close(terms["distortion"], -decoded.log_prob(image))
    model = make(likelihood={"kind": "gaussian", "sigma": "optimal"})
    assert model.batch_statistics
    prepare(model)
    ctx = lanes(0)
    model({"image": image}, ctx)
    with torch.no_grad():
        shown = model.after_step(ctx)
    assert {"perplexity", "codes_used", "sigma"} == set(shown)


def test_a_denoiser_is_scored_on_its_target() -> None:
    model, clean, noisy = make(), images(), images(seed=1)
    ctx = SampleContext(seed=0, samples=range(8))
    with torch.no_grad():
        terms = model({"image": noisy, "target": clean}, ctx)
        decoded = model.decode_codes(model.codes(noisy))
        torch.testing.assert_close(terms["distortion"], -decoded.log_prob(clean))
        torch.testing.assert_close(terms["mse"], decoded.mse(clean))


def test_no_prior_no_samples() -> None:
    with pytest.raises(NotDefined, match=r"this run has no prior over its codes: .* with model\.tokenizer"):
        make().sample(4)
    with pytest.raises(NotDefined, match="map of codes"):
        make().encode(images())


def test_encoder_and_decoder_must_meet_on_one_grid() -> None:
    with pytest.raises(UserError, match=r"emits a 4x4 map and model\.decoder reads 8x8"):
        make(decoder={**BODY, "downsample": 2})
    make(decoder={"kind": "conv", "downsample": 4, "patch": 2, "upsample": "shuffle"})
