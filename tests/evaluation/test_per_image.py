"""Models built and run for real, on batches made here; the doors' tests read packed data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import vaedist.models
from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import Batch, SampleContext
from vaedist.core.errors import UserError
from vaedist.core.imaging import to_uint8
from vaedist.evaluation.metrics.baselines import Baselines
from vaedist.evaluation.metrics.image_quality import pair_metrics
from vaedist.evaluation.metrics.per_image import evaluate_images, pairs, pick_evenly, training_images
from vaedist.models.contract import Variant, build

SPEC = Spec(1, (16, 16))
VAE = {"kind": "vae", "encoder": {"kind": "mlp", "width": 16, "depth": 1}, "latent": 3, "beta": 2.0}
VQVAE = {
    "kind": "vqvae",
    "encoder": {"kind": "conv", "width": 16, "depth": 0, "downsample": 4},
    "codebook": {"kind": "ema", "codes": 8, "dim": 4},
}


def make(section: dict[str, object], spec: Spec = SPEC) -> Variant:
    """An untrained model in fp64, its codebook started from the images."""
    model = build(model_config(section), spec, seed=1).double()
    ctx = SampleContext(seed=0, samples=range(len(images())))
    with torch.no_grad():
        model.prepare([Batch(image=torch.from_numpy(images(spec)))], ctx)
    return model.eval().requires_grad_(False)


def images(spec: Spec = SPEC, count: int = 33) -> np.ndarray:
    """Blobs, each elsewhere, so that an SSIM means something."""
    generator = np.random.Generator(np.random.PCG64(2))
    height, width = spec.shape
    y, x = np.mgrid[:height, :width]
    centres = generator.uniform(3, height - 3, (count, spec.channels, 2, 1, 1))
    distance = (y - centres[:, :, 0]) ** 2 + (x - centres[:, :, 1]) ** 2
    return np.rint(255 * np.exp(-distance / 12)).astype(np.uint8)


def batches(pixels: np.ndarray, size: int, padded: bool = True) -> Iterator[Batch]:
    """As `EvaluationStream` yields them: the last batch repeats the last sample and masks it."""
    count = len(pixels)
    for start in range(0, count, size):
        rows = np.arange(start, start + size if padded else min(start + size, count))
        held = np.minimum(rows, count - 1)
        yield Batch(
            image=torch.from_numpy(pixels[held]),
            label=torch.from_numpy(held % 2),
            key=[f"case_{i // 4}_slice_{i}" for i in held],
            sample=held.tolist(),
            mask=torch.from_numpy(rows < count),
        )


@pytest.mark.parametrize("section", [VAE, VQVAE], ids=["vae", "vqvae"])
def test_the_numbers_do_not_depend_on_the_batch_size(section: dict[str, object]) -> None:
    model, pixels = make(section), images()
    fitted = Baselines(images(count=50))
    documents = [
        evaluate_images(model, batches(pixels, size, padded), seed=3, baselines=fitted).document()
        for size, padded in ((7, True), (32, True), (33, False), (1, False))
    ]
    for other in documents[1:]:
        assert_close(documents[0], other)
    assert documents[0]["images"] == 33


def assert_close(a: object, b: object, where: str = "") -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-12, abs=1e-12), where
    else:
        assert a == b, where


def test_reconstructions_are_measured_as_uint8() -> None:
    model, pixels = make(VAE), images()
    found = evaluate_images(model, batches(pixels, 8))
    shown = to_uint8(model.reconstruct(torch.from_numpy(pixels)))
    for row, original, other in zip(found.rows, pixels, shown, strict=True):
        assert row.metrics == pytest.approx(pair_metrics(original, other), nan_ok=True, abs=1e-12)
    unrounded = float(((model.reconstruct(torch.from_numpy(pixels)).numpy() - pixels / 255) ** 2).mean())
    mean = found.document()["metrics"]["mse"]["mean"]
    assert mean != unrounded
    assert mean == pytest.approx(unrounded, rel=0.01)


def test_the_terms_are_those_of_forward_and_the_bound_is_theirs() -> None:
    model, pixels = make(VAE), images()
    document = evaluate_images(model, batches(pixels, 7), seed=5, step=9).document()
    (batch,) = batches(pixels, 33)
    terms = model(batch, SampleContext(seed=5, samples=range(33)))
    for name, value in terms.items():
        assert document["terms"][name]["mean"] == pytest.approx(float(value.mean()), rel=1e-12)
        assert document["terms"][name]["std"] == pytest.approx(float(value.std(correction=0)), rel=1e-9)
    bound = -(terms["distortion"] + terms["rate"]).mean()
    assert document["terms"]["elbo"]["mean"] == pytest.approx(float(bound), rel=1e-12)
    assert document["terms"]["elbo"]["mean"] != pytest.approx(-document["terms"]["loss"]["mean"])  # beta is 2
    assert document["units"]["elbo"] == document["units"]["rate"] == "nats"


def test_codes_are_counted_over_the_split() -> None:
    model, pixels = make(VQVAE), images()
    found = evaluate_images(model, batches(pixels, 5))
    counts = np.bincount(model.codes(torch.from_numpy(pixels)).flatten().numpy(), minlength=8)
    share = counts[counts > 0] / counts.sum()
    assert found.codes == {
        "codes": 8,
        "used": int((counts > 0).sum()),
        "used_share": (counts > 0).mean(),
        "perplexity": pytest.approx(math.exp(-(share * np.log(share)).sum())),
        "vectors": 33 * 16,
    }
    assert "codes" not in found.not_defined


def test_what_is_not_defined_says_why() -> None:
    found = evaluate_images(make(VAE), batches(images(), 8))
    assert found.codes is None
    assert "codes is not defined, because " in found.not_defined["codes"]
    small = Spec(3, (8, 8))
    model = make({**VAE, "encoder": {"kind": "mlp", "width": 8}}, small)
    document = evaluate_images(model, batches(images(small), 8)).document()
    assert "smaller than the 11x11 window" in document["not_defined"]["ssim"]
    assert document["metrics"]["ssim"] == {"mean": None, "std": None, "count": 0}
    assert document["metrics"]["ssim_default"]["count"] == 33
    json.dumps(document, allow_nan=False)


def test_baselines_are_scored_on_the_same_images() -> None:
    model, pixels = make(VAE), images()
    fitted = Baselines(pixels, 3)
    found = evaluate_images(model, batches(pixels, 8), baselines=fitted)
    document = found.document()
    assert tuple(document["baselines"]) == fitted.names
    assert fitted.names[-1] == "PCA-3"
    assert (
        document["baselines"]["nearest training image"]["ssim"]["mean"] == 1
    )  # they are the training images
    black = pair_metrics(pixels[4], np.zeros_like(pixels[4]))
    assert found.rows[4].baselines["black"] == pytest.approx(black, nan_ok=True, abs=1e-12)
    assert "baselines" not in document["metrics"]


def test_groups_are_means_of_their_rows() -> None:
    found = evaluate_images(make(VAE), batches(images(), 8))
    groups = found.by(lambda row: row.key.split("_slice")[0] if row.sample < 32 else None)
    assert list(groups) == sorted(f"case_{i}" for i in range(8))
    assert all(group["images"] == 4 for group in groups.values())
    mean = np.mean([row.metrics["ssim"] for row in found.rows[4:8]])
    assert groups["case_1"]["metrics"]["ssim"]["mean"] == pytest.approx(mean, rel=1e-12)


def test_pairs_span_the_range_and_show_what_was_measured() -> None:
    model, pixels = make(VAE), images()
    found = evaluate_images(model, batches(pixels, 8))
    rows = pick_evenly(found.rows, 5)
    values = [row.metrics["ssim"] for row in rows]
    everything = sorted(row.metrics["ssim"] for row in found.rows)
    assert values == [everything[i] for i in (0, 8, 16, 24, 32)]
    assert [r.sample for r in pick_evenly(found.rows, 99)] == [
        r.sample for r in sorted(found.rows, key=lambda r: r.metrics["ssim"])
    ]
    assert pick_evenly(found.rows, 1) == rows[:1]
    originals, others = pairs(model, batches(pixels, 6), [row.sample for row in rows])
    assert (originals == pixels[[row.sample for row in rows]]).all()
    for row, original, other in zip(rows, originals, others, strict=True):
        assert pair_metrics(original, other)["ssim"] == pytest.approx(row.metrics["ssim"], abs=1e-12)


def test_images_without_an_ssim_are_ranked_by_their_error() -> None:
    small = Spec(1, (6, 6))
    model = make({**VAE, "encoder": {"kind": "mlp", "width": 8}}, small)
    rows = pick_evenly(evaluate_images(model, batches(images(small), 8)).rows, 33)
    errors = [row.metrics["mse"] for row in rows]
    assert errors == sorted(errors, reverse=True)


def test_every_nth_training_image() -> None:
    pixels = images()
    assert (training_images(batches(pixels, 8)) == pixels).all()
    assert (training_images(batches(pixels, 8), every=4) == pixels[::4]).all()


def test_a_reconstruction_that_is_not_finite_is_named() -> None:
    model, pixels = make(VAE), images()
    for parameter in model.decoder.parameters():
        parameter.fill_(math.nan)
    with pytest.raises(UserError, match="case_0_slice_0 is not finite"):
        evaluate_images(model, batches(pixels, 8))


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(UserError, match="no image"):
        evaluate_images(make(VAE), [])


def test_lines_are_json_one_per_image() -> None:
    found = evaluate_images(make(VAE), batches(images(), 8))
    lines = [json.loads(json.dumps(line, allow_nan=False)) for line in found.lines()]
    assert [line["key"] for line in lines] == [row.key for row in found.rows]
    assert lines[3]["metrics"]["mse"] == found.rows[3].metrics["mse"]


def test_a_variant_that_does_not_reconstruct_and_has_two_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = Path(__file__).parents[1] / "models" / "variants"
    monkeypatch.setattr(vaedist.models, "__path__", [*vaedist.models.__path__, str(variants)])
    model = make({"kind": "toy_duel"})
    found = evaluate_images(model, batches(images(), 8))
    document = found.document()
    assert document["terms"].keys() == {"loss/critic", "loss/maker"}
    assert document["metrics"] == {}
    assert document["not_defined"]["reconstruct"].startswith("reconstruct is not defined, because ")
    json.dumps(document, allow_nan=False)
