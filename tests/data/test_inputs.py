"""What a model is shown: each law against its moments, and the same images for every number of processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.run_commands import curve, small_job
from tests.training.test_equality import furthest
from vaedist.config.job import Job, Spec
from vaedist.config.model_section import model_config
from vaedist.config.settings import parse
from vaedist.core.context import Batch, LaneContext, SampleContext, generator
from vaedist.core.errors import UserError
from vaedist.data.format.index import Index
from vaedist.data.loading.inputs import EvaluationInputs, Inputs, poisson, poisson_table, static_bits
from vaedist.data.loading.stream import EvaluationStream, EvaluationStreamConfig
from vaedist.models.contract import build
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit

ROWS = 8
MODEL = {"kind": "vae", "encoder": {"kind": "mlp", "width": 8}, "latent": 2}


def job(binarise: str = "none", seed: int = 4, **augment: Any) -> Job:
    content = {
        "seed": seed,
        "data": {"binarise": binarise},
        "augment": augment,
        "model": MODEL,
        "train": {"steps": 1},
    }
    return parse(Job, content, "test")


def lanes(step: int = 0, start: int = 0, stop: int = ROWS) -> LaneContext:
    return LaneContext(seed=4, step=step, batch_size=ROWS, lanes=4, rows=(start, stop))


def measured(samples: range = range(ROWS)) -> SampleContext:
    return SampleContext(seed=4, samples=samples)


def batch(image: Tensor) -> Batch:
    return {
        "image": image,
        "label": torch.zeros(len(image), dtype=torch.int64),
        "key": [f"image-{number}" for number in range(len(image))],
        "sample": list(range(len(image))),
    }


def random_images(channels: int = 1, side: int = 12) -> Tensor:
    draw = generator("images")
    return torch.randint(0, 256, (ROWS, channels, side, side), generator=draw).to(torch.uint8)


def grey(value: int, side: int = 64) -> Tensor:
    return torch.full((ROWS, 1, side, side), value, dtype=torch.uint8)


def test_nothing_asked_for_changes_nothing_and_draws_nothing() -> None:
    image = random_images()
    shown = Inputs(job())(batch(image), lanes())
    assert shown["image"] is image and "target" not in shown


# Binarise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["static", "dynamic"])
def test_white_has_the_probability_of_the_grey_value(law: str) -> None:
    values = torch.arange(256).to(torch.uint8).repeat(ROWS, 1, 64, 1)
    image = Inputs(job(law))(batch(values), lanes())["image"]
    assert set(image.unique().tolist()) == {0, 255}
    share = (image == 255).double().mean(dim=(0, 1, 2))
    wanted = torch.arange(256, dtype=torch.float64) / 255
    deviation = (wanted * (1 - wanted) / (ROWS * 64)).sqrt()
    assert (share[0], share[-1]) == (0, 1), "black stays black and white stays white"
    assert ((share - wanted).abs()[1:-1] < 4.5 * deviation[1:-1]).all()


def test_numbers_of_a_static_draw_are_even_and_uncorrelated() -> None:
    bits = static_bits(0, [f"k{number}" for number in range(64)], 4096, "cpu").double() / 2**24
    assert float(bits.min()) >= 0 and float(bits.max()) < 1
    n = bits.numel()
    assert bits.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))
    counts = torch.histc(bits.flatten().float(), 64, 0, 1).double()
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 5 * math.sqrt(2 * 63), (
        "chi square of 63 degrees"
    )
    for one, other in (
        (bits[:, :-1], bits[:, 1:]),
        (bits[:-1], bits[1:]),
    ):  # neighbours in an image, and images
        pairs = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(n)


def test_the_generator_is_splitmix64() -> None:
    """Against the published algorithm in Python's own integers."""
    import hashlib

    state = int.from_bytes(hashlib.blake2b(b"binarise\x1f9\x1fkey", digest_size=8).digest(), "little")
    wanted = []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        wanted.append((z ^ (z >> 31)) >> 40)
    assert static_bits(9, ["key"], 5, "cpu").tolist() == [wanted]


def test_static_belongs_to_seed_and_key_and_dynamic_to_the_step() -> None:
    rows = batch(grey(128, side=12))
    static, dynamic = Inputs(job("static")), Inputs(job("dynamic"))
    first = static(rows, lanes(0))["image"]
    assert torch.equal(static(rows, lanes(7))["image"], first)
    assert torch.equal(static(rows, measured())["image"], first)
    assert not torch.equal(Inputs(job("static", seed=5))(rows, lanes(0))["image"], first)
    backwards: Batch = {**rows, "image": rows["image"].flip(0), "key": rows["key"][::-1]}
    assert torch.equal(static(backwards, lanes(0))["image"].flip(0), first)
    assert not torch.equal(first[0], first[1]), "every image has its own draw"

    assert not torch.equal(dynamic(rows, lanes(0))["image"], dynamic(rows, lanes(1))["image"])
    assert torch.equal(dynamic(rows, measured())["image"], first), "what is measured is always static"


@pytest.mark.parametrize("law", ["static", "threshold"])
def test_a_cache_holds_binarised_images_and_nothing_draws_for_them_again(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = batch(random_images())
    shown = Inputs(job(law, flip=0.5))(rows, lanes())["image"]
    held = rows["image"].clone().numpy()
    transform = Inputs(job(law)).static_transform
    assert transform is not None
    transform(held, rows["key"])
    assert set(np.unique(held)) == {0, 255}
    monkeypatch.setattr(Inputs, "binarize", None)
    again = Inputs(job(law, flip=0.5), transformed=True)({**rows, "image": torch.from_numpy(held)}, lanes())
    assert torch.equal(again["image"], shown)


def test_what_differs_from_step_to_step_is_not_held() -> None:
    assert (
        Inputs(job("none", flip=0.5)).static_transform is None
        and Inputs(job("dynamic")).static_transform is None
    )


def test_threshold() -> None:
    image = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2).repeat(ROWS, 1, 1, 1)
    shown = Inputs(job("threshold"))(batch(image), lanes())["image"]
    assert shown[0].flatten().tolist() == [0, 0, 255, 255]


# Augment ------------------------------------------------------------------------------------------------------


def test_flip_mirrors_about_the_asked_share_whole() -> None:
    image = random_images(channels=3)
    flipped = 0
    for step in range(100):
        shown = Inputs(job(flip=0.25))(batch(image), lanes(step))["image"]
        for one, other in zip(shown, image, strict=True):
            mirrored = torch.equal(one, other.flip(-1))
            assert mirrored or torch.equal(one, other)
            flipped += mirrored
    assert abs(flipped / (100 * ROWS) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / (100 * ROWS))


def test_shift_moves_whole_images_evenly_and_repeats_the_edge() -> None:
    image = random_images(channels=3)
    padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    seen: dict[tuple[int, int], int] = {}
    for step in range(100):
        shown = Inputs(job(shift=2))(batch(image), lanes(step))["image"]
        for row in range(ROWS):
            fits = [
                (down, right)
                for down in range(-2, 3)
                for right in range(-2, 3)
                if torch.equal(shown[row], padded[row, :, 2 - down : 14 - down, 2 - right : 14 - right])
            ]
            assert len(fits) == 1
            seen[fits[0]] = seen.get(fits[0], 0) + 1
    assert len(seen) == 25, "every move of up to 2 pixels happens"
    assert max(seen.values()) < 32 + 5 * math.sqrt(32), "and none more often than chance"


def test_gaussian_and_speckle_have_their_moments() -> None:
    for level in (100, 150):
        added = Inputs(job(gaussian=0.05))(batch(grey(level)), lanes())["image"].double()
        assert added.mean().item() == pytest.approx(level, abs=0.4)
        assert added.std().item() == pytest.approx(math.hypot(255 * 0.05, 1 / math.sqrt(12)), rel=0.03)
        times = Inputs(job(speckle=0.1))(batch(grey(level)), lanes())["image"].double()
        assert times.mean().item() == pytest.approx(level, abs=0.4)
        assert times.std().item() == pytest.approx(math.hypot(0.1 * level, 1 / math.sqrt(12)), rel=0.03)
    assert Inputs(job(speckle=0.5))(batch(grey(0)), lanes())["image"].max() == 0, "speckle leaves black black"


def test_salt_and_pepper_take_all_channels_of_a_pixel() -> None:
    image = torch.full((ROWS, 3, 64, 64), 77, dtype=torch.uint8)
    shown = Inputs(job(salt_pepper=0.2))(batch(image), lanes())["image"]
    assert set(shown.unique().tolist()) == {0, 77, 255}
    assert torch.equal(shown[:, 0], shown[:, 1]) and torch.equal(shown[:, 0], shown[:, 2])
    for value in (0, 255):
        assert (shown == value).double().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("photons", [1.5, 20.0, 1000.0])
def test_poisson_has_the_law_of_counted_photons(photons: float) -> None:
    table = poisson_table(photons)
    assert (table.flatten().diff() >= 0).all()
    uniform = torch.rand((1, 1, 200, 200), generator=generator("photons"))
    for level in (0, 1, 60, 255):
        mean = level / 255 * photons
        count = poisson(torch.full(uniform.shape, level, dtype=torch.uint8), uniform, table).double()
        assert torch.equal(count, count.round())
        error = math.sqrt(max(mean, 1e-12) / count.numel())
        assert abs(count.mean().item() - mean) <= 5 * error
        if level:
            assert count.var().item() == pytest.approx(mean, rel=0.05, abs=5e-3)
        law = torch.distributions.Poisson(torch.tensor(mean, dtype=torch.float64) + 1e-300)
        for k in range(int(mean), int(mean) + 3):
            wanted = law.log_prob(torch.tensor(float(k), dtype=torch.float64)).exp().item()
            share = (count == k).double().mean().item()
            assert abs(share - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / count.numel()) + 1e-9


def test_poisson_noise_of_images_keeps_their_mean() -> None:
    shown = Inputs(job(poisson=50))(batch(grey(120)), lanes())["image"].double() / 255
    assert shown.mean().item() == pytest.approx(120 / 255, abs=0.003)
    assert shown.var().item() == pytest.approx(120 / 255 / 50, rel=0.05)


# Denoise ------------------------------------------------------------------------------------------------------

EVERYTHING = {"flip": 0.5, "shift": 2, "gaussian": 0.1, "salt_pepper": 0.1, "poisson": 30, "speckle": 0.1}


def test_a_denoiser_keeps_the_image_without_noise_moved_alike() -> None:
    rows = batch(random_images())
    moved = Inputs(job(flip=0.5, shift=2))(rows, lanes())["image"]
    shown = Inputs(job(denoise=True, **EVERYTHING))(rows, lanes())
    assert torch.equal(shown["target"], moved), "flip and shift are no noise: the target moves with the input"
    assert (shown["image"] != moved).double().mean() > 0.5
    binary = Inputs(job("dynamic", denoise=True, gaussian=0.3))(rows, lanes())
    assert set(binary["target"].unique().tolist()) == {0, 255} and len(binary["image"].unique()) > 20


def test_nothing_is_augmented_where_it_is_measured_but_a_denoiser_has_its_noise() -> None:
    rows = batch(random_images())
    assert torch.equal(Inputs(job(**EVERYTHING))(rows, measured())["image"], rows["image"])
    inputs = Inputs(job(denoise=True, **EVERYTHING))
    shown = inputs(rows, measured())
    assert torch.equal(shown["target"], rows["image"]) and not torch.equal(shown["image"], rows["image"])
    again = inputs({name: value[5:] for name, value in rows.items()}, measured(range(5, ROWS)))  # type: ignore[index, arg-type]
    assert torch.equal(again["image"], shown["image"][5:]), "noise belongs to the sample, not to the batch"


@pytest.mark.parametrize("settings", [EVERYTHING, {"denoise": True, **EVERYTHING}])
def test_parts_of_a_batch_see_what_the_whole_sees(settings: dict[str, Any]) -> None:
    rows = batch(random_images(channels=3))
    inputs = Inputs(job(**settings))
    whole = inputs(rows, lanes(3))
    for start, stop in [(0, 3), (3, ROWS)]:
        part = inputs({name: value[start:stop] for name, value in rows.items()}, lanes(3, start, stop))  # type: ignore[index, arg-type]
        for name in part.keys() - {"key", "sample"}:
            assert torch.equal(part[name], whole[name][start:stop]), name  # type: ignore[literal-required]
    assert not torch.equal(inputs(rows, lanes(4))["image"], whole["image"]), "each step draws anew"


# Settings -----------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match=r"augment\.denoise: there is no noise to remove"):
        job(denoise=True, flip=0.5)
    with pytest.raises(UserError, match=r"augment\.speckle would make the binarised images grey again"):
        job("static", speckle=0.1)
    assert job("static", salt_pepper=0.1).augment.noisy == ("salt_pepper",)


def test_codes_are_not_pixels() -> None:
    codes: Batch = {"codes": torch.zeros((ROWS, 2, 2), dtype=torch.int64)}
    assert Inputs(job())(codes, lanes()) is codes
    with pytest.raises(UserError, match="this model reads the codes of its tokenizer"):
        Inputs(job("static"))(codes, lanes())


# In a run -----------------------------------------------------------------------------------------------------


def test_a_split_is_presented_the_same_again(phantom: Path) -> None:
    stream = EvaluationStream(
        Index.open(phantom), "validate", EvaluationStreamConfig(batch_size=5, workers=0)
    )
    shown = EvaluationInputs(stream, job("static", denoise=True, gaussian=0.2))
    first, second = list(shown), list(shown)
    assert shown.count == 32 and len(first) == 7
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    assert all(set(one["target"].unique().tolist()) <= {0, 255} for one in first)


def with_inputs(data: Path, **train: Any) -> Job:
    content = small_job(data, **train).model_dump(mode="json")
    content["data"]["binarise"] = "dynamic"
    content["augment"] = {"flip": 0.5, "shift": 1, "gaussian": 0.2, "denoise": True}
    return parse(Job, content, "test")


RUN = """
import sys
from pathlib import Path
from vaedist.config.job import Job
from vaedist.config.model_section import model_config
from vaedist.models.contract import build
from vaedist.runs.fit_options import FitOptions
from vaedist.training.loop import fit
fit(Job.model_validate_json(sys.argv[1]), Path(sys.argv[2]), options=FitOptions(quiet=True))
"""


@pytest.mark.slow
def test_runs_with_inputs_agree_on_two_processes_and_resume_exactly(phantom: Path, tmp_path: Path) -> None:
    settings = {"precision": "fp64", "validate_every": 4, "save_every": 4, "optim": {"main": {}}}
    one, two, cut, plain = (tmp_path / name for name in ("one", "two", "cut", "plain"))
    job = with_inputs(phantom, steps=8, **settings)
    fit(job, one, options=FitOptions(quiet=True))
    run_ranks(RUN, 2, job.model_dump_json(), str(two))
    worst, place = furthest(curve(one), curve(two))
    assert worst < 1e-9, place
    fit(with_inputs(phantom, steps=4, **settings), cut, options=FitOptions(quiet=True))
    fit(job, cut, options=FitOptions(quiet=True))
    assert curve(cut) == curve(one)
    fit(small_job(phantom, steps=8, **settings), plain, options=FitOptions(quiet=True))
    for mine, theirs in zip(curve(one), curve(plain), strict=True):
        assert mine["loss"] != theirs["loss"], "the settings reach training and validation"


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_a_likelihood_scores_the_target_and_the_encoder_sees_the_input(kind: str) -> None:
    """The whole of what a denoiser asks of a variant: the loss is another one if either picture is."""
    body = {"kind": "conv", "width": 4, "downsample": 4}
    model = build(model_config({"kind": kind, "encoder": body}), Spec(1, (12, 12)), seed=0).double()
    clean, noisy = random_images(), Inputs(job(gaussian=0.3))(batch(random_images()), lanes())["image"]
    rows = batch(noisy)

    def distortion(**images: Tensor) -> Tensor:
        terms: dict[str, Tensor] = model({**rows, **images}, measured())
        return terms["distortion"].detach()

    wanted = distortion(image=noisy, target=clean)
    assert not torch.equal(wanted, distortion(image=noisy))
    assert not torch.equal(wanted, distortion(image=clean))
    assert torch.equal(distortion(image=noisy, target=noisy), distortion(image=noisy))
