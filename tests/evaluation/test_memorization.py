"""A model that repeats its training images is flagged; one that does not, sharp or blurred, is not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vaedist.core.errors import UserError
from vaedist.data.sources.phantom import SLICES, PhantomSource
from vaedist.evaluation.memorization import Audit, audit, partition_patients
from vaedist.evaluation.memorization_figure import memorization_figure
from vaedist.evaluation.metrics import nearest_neighbors as neighbours
from vaedist.evaluation.metrics.features import default_extractor
from vaedist.evaluation.metrics.nearest_neighbors import nearest_two
from vaedist.evaluation.metrics.shares import share_below, wilson_interval

PATIENTS = {"train": 20, "test": 8, "other": 14}


@pytest.fixture(scope="module")
def heads() -> dict[str, np.ndarray]:
    """Phantom slices, 32x32, of three groups of patients."""
    source = PhantomSource(0, 32, {split: count * SLICES for split, count in PATIENTS.items()})
    found: dict[str, list[np.ndarray]] = {split: [] for split in PATIENTS}
    for item in source.items():
        found[item.split].append(source.load(item))
    return {split: np.stack(pictures)[:, None] for split, pictures in found.items()}


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64(len(images))).normal(0, sigma * 255, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def audited(heads: dict[str, np.ndarray], samples: np.ndarray, *, grouped: bool = True) -> Audit:
    names = [f"patient{i // SLICES:02d}" for i in range(len(heads["train"]))]
    keys = [f"{name}_slice_{i % SLICES}" for i, name in enumerate(names)]
    groups = names if grouped else None
    return audit(
        samples, heads["train"], heads["test"], default_extractor(), groups=groups, keys=keys, seed=0
    )


@pytest.mark.parametrize("grouped", [True, False])
def test_a_model_that_repeats_its_training_images_is_flagged(
    heads: dict[str, np.ndarray], grouped: bool
) -> None:
    found = audited(heads, noisy(heads["train"][::2], 0.02), grouped=grouped)
    assert found.flagged and found.verdict.startswith("flagged: ")
    assert all(space.flagged for space in found.spaces.values())
    pixels = found.spaces["pixels"]
    assert pixels.close.share == 1 and pixels.close.interval[0] > 0.97
    assert (pixels.nearest == np.arange(0, len(heads["train"]), 2)).all()


def test_one_sample_in_eight_that_is_a_copy_is_enough(heads: dict[str, np.ndarray]) -> None:
    samples = heads["other"].copy()
    samples[::8] = noisy(heads["train"][: len(samples[::8])], 0.02)
    found = audited(heads, samples)
    assert found.flagged
    close = found.spaces["pixels"].close
    assert close.interval[0] < 0.125 < close.interval[1]
    copies = [pair for pair in found.pairs if pair.space == "pixels"]
    assert all(pair.sample % 8 == 0 and pair.train == pair.sample // 8 for pair in copies)
    assert copies[0].key == f"patient{copies[0].train // SLICES:02d}_slice_{copies[0].train % SLICES}"


@pytest.mark.parametrize("grouped", [True, False])
def test_images_of_other_patients_are_not_flagged(heads: dict[str, np.ndarray], grouped: bool) -> None:
    found = audited(heads, heads["other"], grouped=grouped)
    assert not found.flagged
    for space in found.spaces.values():
        assert space.close.interval[0] <= 0.01 < space.close.interval[1] < 0.1


def test_smooth_samples_are_close_to_many_and_not_flagged(heads: dict[str, np.ndarray]) -> None:
    """Real images with noise, samples without: nearer to every training image than held-out ones are."""
    real = {split: noisy(images, 0.1) for split, images in heads.items()}
    found = audited(real, heads["other"])
    pixels = found.spaces["pixels"]
    assert pixels.close.share > 0.2 and pixels.close.exceeds
    assert pixels.close_to_one is not None and not pixels.close_to_one.exceeds
    assert not found.flagged
    assert found.verdict.startswith("not flagged: ") and "not to single ones" in found.verdict


def test_odd_held_out_patients_do_not_accuse(heads: dict[str, np.ndarray]) -> None:
    """Held-out images far from all others put the level too high; whole training patients show it."""
    odd = {**heads, "test": 255 - heads["test"]}
    pixels = audited(odd, heads["other"]).spaces["pixels"]
    assert pixels.close.share > 0.9
    assert (
        pixels.whole_patients is not None and len(pixels.whole_patients.parts) == 3
    )  # of 8, 8 and 4 patients
    assert not pixels.whole_patients.exceeds and not pixels.flagged


def test_the_document_and_the_picture(heads: dict[str, np.ndarray]) -> None:
    samples = noisy(heads["train"][:40], 0.02)
    found = audited(heads, samples)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["flagged"] is True
    assert document["counts"] == {"samples": 40, "train": 320, "held_out": 128, "patients": 20}
    assert set(document["spaces"]) == {"pixels", default_extractor().label}
    assert len(document["pairs"]) == 8
    assert memorization_figure(found, samples, heads["train"]).startswith(b"\x89PNG")


def test_one_patient_alone_has_no_ratio_and_no_parts(heads: dict[str, np.ndarray]) -> None:
    train = heads["train"][:SLICES]
    found = audit(noisy(train, 0.02), train, heads["test"], default_extractor(), groups=["me"] * SLICES)
    pixels = found.spaces["pixels"]
    assert pixels.close_to_one is None and pixels.whole_patients is None and pixels.flagged
    json.dumps(found.document(), allow_nan=False)


def test_too_few_images(heads: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match="needs at least 2 held-out images, not 1"):
        audit(heads["other"], heads["train"], heads["test"][:1], default_extractor())


# Its parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 24, 64, 8])
def test_the_nearest_two_are_the_brute_force_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK_VALUES", chunk)
    generator = np.random.Generator(np.random.PCG64(1))
    queries = generator.integers(0, 256, (13, 6), dtype=np.uint8)
    train = generator.integers(0, 256, (29, 6), dtype=np.uint8)
    queries[3] = train[7]
    groups = generator.integers(-1, 4, 29)
    (near, at), (other, other_at) = nearest_two(queries, train, groups)
    gaps = np.sqrt((((queries[:, None].astype(float) - train) / 255) ** 2).mean(2))
    assert (at == gaps.argmin(1)).all()
    np.testing.assert_allclose(near, gaps.min(1), atol=1e-12)
    rest = np.where(groups[None] == groups[at][:, None], np.inf, gaps)
    assert (other_at == rest.argmin(1)).all()
    np.testing.assert_allclose(other, rest.min(1), atol=1e-12)
    assert near[3] == 0


def test_with_one_group_there_is_no_other() -> None:
    train = np.eye(4, dtype=np.float32)
    (near, _), (other, _) = nearest_two(train[:2], train, np.zeros(4, int))
    assert near.tolist() == [0, 0] and np.isinf(other).all()


def test_parts_are_whole_patients_of_about_the_size() -> None:
    patients = np.repeat(np.arange(30), np.random.Generator(np.random.PCG64(2)).integers(5, 40, 30))
    parts = partition_patients(patients, 100, seed=0)
    for patient in range(30):
        assert len(set(parts[patients == patient])) == 1
    sizes = np.bincount(parts[parts >= 0])
    assert len(sizes) >= 5 and sizes.min() >= 70 and sizes.max() <= 130
    assert (partition_patients(patients, 100, seed=1) != parts).any()
    few = partition_patients(np.arange(1000), 10, seed=0)
    assert np.bincount(few + 1).tolist() == [900, *[10] * 10]
    assert set(partition_patients(patients, 10_000, seed=0)) == {-1}  # too few for one part


def test_wilson_against_published_values() -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion (1998), table I: method 3."""
    for (successes, count), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(successes, count) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("samples", "held_out"), [(500, 60), (500, 300), (80, 3000)])
def test_the_limit_is_passed_by_chance_once_in_a_hundred(samples: int, held_out: int) -> None:
    rng = np.random.Generator(np.random.PCG64(samples))
    shares = [
        share_below(rng.exponential(size=samples), rng.exponential(size=held_out), rng) for _ in range(600)
    ]
    assert np.mean([share.exceeds for share in shares]) <= 0.01 + 3 * math.sqrt(0.01 / 600)
    assert np.mean([share.share for share in shares]) == pytest.approx(
        max(0.01, 1 / (held_out + 1)), rel=0.25
    )
