"""Every variant keeps the contract: terms, units, hooks, capabilities, state. A new file in models/ is tested here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.config.model_section import kind_module, kinds, model_config
from vaedist.config.settings import resume_policy
from vaedist.core.context import Batch, Context, LaneContext, SampleContext, generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.models.contract import Variant, build
from vaedist.training.step import cut

SPEC = Spec(1, (16, 16), classes=3)
ROWS = 6

CODES = 8

SMALL = {"kind": "conv", "width": 8, "depth": 0, "downsample": 4}
TOKENIZER = {
    "run": "runs/tokenizer",
    "sha256": "0" * 64,
    "model": {"kind": "vqvae", "encoder": SMALL, "codebook": {"kind": "ema", "codes": CODES, "dim": 3}},
    "codes": CODES,
    "grid": [4, 4],
}
SECTIONS: dict[str, list[dict[str, Any]]] = {
    "vae": [
        {"encoder": SMALL, "latent": 4},
        {"encoder": SMALL, "decoder": {"kind": "mlp", "width": 16, "depth": 1}, "latent": 4, "dssim": 1.0},
        {"encoder": {"kind": "mlp", "width": 16}, "latent": 4, "likelihood": {"kind": "gaussian"}},
        {"encoder": SMALL, "latent": 4, "likelihood": {"kind": "gaussian", "sigma": "learned"}},
        {"encoder": SMALL, "latent": 4, "likelihood": {"kind": "logistic", "scale": "learned"}},
        {"encoder": SMALL, "latent": 4, "beta": {"end": 2.0, "steps": 7}, "likelihood": {"kind": "laplace"}},
        {"encoder": SMALL, "latent": {"kind": "map", "channels": 2}, "free_bits": 0.1},
        {
            "encoder": SMALL,
            "latent": 4,
            "condition": {"dropout": 0.3, "prior": "per_class"},
            "num_importance": 3,
        },
        {
            "encoder": {"kind": "mlp", "width": 16, "grid": 2, "activation": "relu"},
            "latent": {"kind": "map", "channels": 2},
            "condition": {"label": "one_hot", "how": "concat"},
        },
    ],
    "infovae": [
        {"encoder": SMALL, "latent": 4, "mmd_weight": 50.0, "dssim": 1.0},
        {"encoder": SMALL, "latent": 4, "alpha": 1.0, "deterministic": True, "kernel": {"kind": "rbf"}},
        {
            "encoder": SMALL,
            "latent": {"kind": "map", "channels": 2},
            "alpha": 0.5,
            "kernel": {"kind": "imq", "block": 2},
            "condition": {"dropout": 0.3, "prior": "per_class"},
        },
    ],
    "vqvae": [
        {
            "encoder": SMALL,
            "codebook": {
                "kind": "gradient",
                "codes": 4,
                "dim": 3,
                "residual_levels": 2,
                "estimator": "rotation",
            },
            "likelihood": {"kind": "logistic", "components": 2},
        },
        {
            "encoder": SMALL,
            "codebook": {"kind": "ema", "codes": 8, "dim": 3, "cosine": True},
            "likelihood": {"kind": "gaussian", "sigma": "optimal"},
        },
        {
            "encoder": SMALL,
            "codebook": {"kind": "ema", "codes": 4, "dim": 3, "residual_levels": 3},
            "likelihood": {"kind": "gaussian", "sigma": "predicted"},
        },
        {"encoder": SMALL, "codebook": {"kind": "ema", "codes": 8, "dim": 3}},
        {"encoder": SMALL, "codebook": {"kind": "gradient", "codes": 8, "dim": 3}, "dssim": 0.5},
        {
            "encoder": SMALL,
            "codebook": {"kind": "fsq", "levels": [4, 3]},
            "likelihood": {"kind": "bernoulli"},
        },
        {
            "encoder": {"kind": "mlp", "width": 16, "grid": 2},
            "codebook": {"kind": "ema", "codes": 8, "dim": 3},
        },
    ],
    "pixelcnn": [
        {"tokenizer": TOKENIZER, "net": {"width": 8, "layers": 3, "first": 3, "hidden": 8}},
        {"tokenizer": TOKENIZER, "net": {"width": 8, "layers": 2, "hidden": 8}, "conditional": True},
    ],
    "transformer": [
        {"tokenizer": TOKENIZER, "net": {"width": 16, "layers": 2, "heads": 2}},
        {"tokenizer": TOKENIZER, "net": {"width": 16, "layers": 1, "heads": 2}, "conditional": True},
    ],
    "gan": [
        {"generator": SMALL, "discriminator": SMALL, "latent": 4, "r1_every": 2},
        {"generator": SMALL, "discriminator": SMALL, "latent": 4, "gan_loss": "wgan_clip", "r1": 0},
        {
            "generator": SMALL,
            "discriminator": {"kind": "resnet", "width": 8, "depth": 1, "norm": "none"},
            "latent": {"kind": "map", "channels": 2},
            "gan_loss": "relativistic",
            "r1_every": 1,
            "spectral_norm": True,
            "diffaugment": ["color", "translation", "cutout"],
            "output": "sigmoid_logits",
        },
        {
            "generator": {"kind": "mlp", "width": 16},
            "discriminator": {"kind": "mlp", "width": 16},
            "gan_loss": "bce",
            "label_smoothing": 0.1,
            "output": "linear",
        },
    ],
    "vaegan": [
        {"encoder": SMALL, "discriminator": SMALL, "latent": 4},
        {
            "encoder": SMALL,
            "discriminator": {"kind": "mlp", "width": 16},
            "latent": {"kind": "map", "channels": 2},
            "condition": {"dropout": 0.3, "prior": "per_class"},
            "likelihood": {"kind": "gaussian"},
            "gan_loss": "relativistic",
            "diffaugment": ["translation"],
            "pixel": 0.1,
            "dssim": 1.0,
        },
    ],
}
"""Small ones of each kind; a kind that is missing here is tested with its defaults."""
NEEDED: dict[str, dict[str, Any]] = {kind: {"tokenizer": TOKENIZER} for kind in ("pixelcnn", "transformer")}
"""Settings without a default."""
CASES = [{"kind": kind, **section} for kind in kinds() for section in SECTIONS.get(kind, [{}])]
case = pytest.mark.parametrize("section", CASES, ids=lambda s: f"{s['kind']}{CASES.index(s)}")


def make(section: dict[str, Any], spec: Spec = SPEC) -> Variant:
    return build(model_config(section), spec, seed=1)


def batch(number: int = 0, spec: Spec = SPEC, rows: int = ROWS) -> Batch:
    """Images and, for variants that read them instead, codes; both, so that each takes what it reads."""
    draw = generator("batch", number)
    image = torch.randint(0, 256, (rows, *spec.image_shape), generator=draw)
    return {
        "image": image.to(torch.uint8),
        "label": torch.randint(0, spec.classes or 1, (rows,), generator=draw),
        "codes": torch.randint(0, CODES, (rows, 4, 4), generator=draw),
        "key": [f"{number}-{row}" for row in range(rows)],
        "sample": list(range(rows)),
    }


def lanes(step: int, phase: str = "main") -> LaneContext:
    return LaneContext(seed=5, step=step, batch_size=ROWS, lanes=3, phase=phase)


def evaluation(phase: str = "main", samples: Sequence[int] = range(ROWS)) -> Context:
    ctx = SampleContext(seed=5, samples=samples)
    ctx.phase = phase
    return ctx


def train(model: Variant, steps: int = 2) -> list[dict[str, Tensor]]:
    """A hand-written loop; the terms of each step."""
    with torch.no_grad():
        model.prepare([batch(number) for number in range(model.prepare_batches)], lanes(0))
    optimizers = {phase: torch.optim.Adam(model.parameters_of(phase), 1e-2) for phase in model.phases}
    seen = []
    for step in range(steps):
        for phase in model.phases:
            ctx = lanes(step, phase)
            terms = model(batch(step), ctx)
            optimizers[phase].zero_grad()
            terms["loss"].mean().backward()
            optimizers[phase].step()
            with torch.no_grad():
                shown = model.after_step(ctx)
            assert all(value.ndim == 0 and value.isfinite() for value in shown.values())
            seen.append(terms)
    return seen


@case
def test_two_steps_change_every_trained_weight(section: dict[str, Any]) -> None:
    model = make(section)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, *_, last = train(model)
    assert float(last["loss"].detach().mean()) != float(first["loss"].detach().mean())
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    borrowed = {name for name, p in model.named_parameters() if name.partition(".")[0] in model.pretrained}
    assert still == borrowed, "all are trained but what is borrowed, which is never"


@case
def test_terms_are_per_example_finite_and_declare_their_unit(section: dict[str, Any]) -> None:
    model = make(section)
    for terms in train(model):
        assert "loss" in terms
        for name, value in terms.items():
            assert value.shape in ((ROWS,), ()), f"{name} is {tuple(value.shape)}"
            assert value.dtype == torch.float32 and value.isfinite().all(), name
            assert name in model.units, f"{name} declares no unit"


@case
def test_rows_are_independent_of_their_neighbours(section: dict[str, Any]) -> None:
    """Terms of a sample are the same alone and in a batch, unless the model says it has batch statistics."""
    model = make(section)
    if model.batch_statistics:
        pytest.skip("declares batch statistics")
    train(model)
    model.eval()
    rows = batch(9)
    for phase in model.phases:
        with torch.no_grad():
            together = model(rows, evaluation(phase))
        for row in range(ROWS):
            with torch.no_grad():
                alone = model(cut(rows, row, row + 1), evaluation(phase, [row]))
            for name, value in alone.items():
                torch.testing.assert_close(value[0], together[name][row], rtol=1e-4, atol=1e-4)


@case
def test_forward_writes_no_state(section: dict[str, Any]) -> None:
    model = make(section)
    train(model)
    before = copy.deepcopy(model.state_dict())
    for phase in model.phases:
        model(batch(3), lanes(3, phase))  # a step that is then refused
        model(batch(3), evaluation(phase))
    with torch.no_grad():
        if model.reconstructs:
            model.reconstruct(batch(3)["image"], batch(3)["label"])
        if model.samples:
            model.sample(2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@case
def test_state_dict_round_trip(section: dict[str, Any]) -> None:
    model, other = make(section), build(model_config(section), SPEC, seed=2)
    train(model)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        for phase in model.phases:
            mine, theirs = model(batch(4), lanes(4, phase)), other(batch(4), lanes(4, phase))
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@case
def test_same_seed_same_model(section: dict[str, Any]) -> None:
    one, two = make(section), make(section)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@case
def test_capabilities(section: dict[str, Any]) -> None:
    model, rows = make(section), batch(2)
    train(model)
    image, label = rows["image"], rows["label"]
    with torch.no_grad():
        pictures = [(model.reconstructs, "reconstruct", lambda: model.reconstruct(image, label), ROWS)]
        pictures += [(model.samples, "sample", lambda: model.sample(3, seed=1, label=label[:3]), 3)]
        for able, name, make_them, count in pictures:
            if not able:
                with pytest.raises(NotDefined, match=f"{name} is not defined, because "):
                    make_them()
                continue
            out = make_them()
            assert out.shape == (count, *image.shape[1:])
            assert float(out.min()) >= 0 and float(out.max()) <= 1
            assert torch.equal(out, make_them())
        if model.samples:
            more = model.sample(5, seed=1)
            torch.testing.assert_close(model.sample(2, seed=1), more[:2], rtol=1e-4, atol=1e-5)
            assert not torch.equal(model.sample(2, seed=2), more[:2])
        if model.latent in ("vector", "map"):
            posterior = model.encode(image, label)
            assert posterior.mean.shape == (ROWS, *model.latent_shape)
            if section.get("deterministic"):
                with pytest.raises(NotDefined, match="not defined, because the encoder is deterministic"):
                    posterior.kl()
            else:
                assert posterior.kl().shape == posterior.mean.shape
                assert posterior.log_prob(posterior.mean).shape == (ROWS,)
            assert model.prior(label).log_prob(posterior.mean).shape == (ROWS,)
            decoded = model.decode(posterior.sample(torch.zeros_like(posterior.mean)), label)
            assert decoded.log_prob(image).shape == (ROWS,) and decoded.mean.shape == image.shape
            noise = torch.rand(image.shape, generator=generator("uniform"))
            sampled = decoded.sample(noise)
            assert float(sampled.min()) >= 0 and float(sampled.max()) <= 1
        if model.latent == "codes":
            codes = model.codes(image)
            assert codes.dtype == torch.int64 and codes.ndim == 3
            assert 0 <= int(codes.min()) <= int(codes.max()) < model.num_codes
            assert torch.equal(model.decode_codes(codes).mean, model.reconstruct(image, label))
        if model.latent == "codes" and model.samples:
            drawn = model.decode_codes(model.sample_codes(3, seed=1, label=label[:3])).mean
            torch.testing.assert_close(drawn, model.sample(3, seed=1, label=label[:3]))
        if model.latent in ("vector", "map") and model.samples:
            classes = label[:3] if model.conditional else None
            z = torch.stack(
                [torch.randn(model.latent_shape, generator=generator("sample", 1, i)) for i in range(3)]
            )
            drawn = model.decode(model.prior(classes).sample(0.5 * z), classes).mean
            torch.testing.assert_close(drawn, model.sample(3, seed=1, label=classes, temperature=0.5))


@case
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_other_precisions(section: dict[str, Any], precision: str) -> None:
    model = make(section)
    if precision == "fp64":
        model = model.double()
        assert all(value.dtype == torch.float64 for value in train(model)[-1].values())
        return
    train(model)
    for phase in model.phases:
        exact = model(batch(3), evaluation(phase))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(batch(3), evaluation(phase))
        for name, value in rough.items():
            assert value.dtype == torch.float32, f"{name} stayed in half precision"
        torch.testing.assert_close(rough["loss"].mean(), exact["loss"].mean(), rtol=0.1, atol=1.0)


@case
def test_noise_belongs_to_the_sample(section: dict[str, Any]) -> None:
    """Two processes that hold half of the batch each compute the same terms as one that holds all."""
    model = make(section)
    if model.batch_statistics:
        pytest.skip("declares batch statistics")
    train(model)
    rows = batch(3)
    for phase in model.phases:
        with torch.no_grad():
            whole = model(rows, lanes(3, phase))
            parts = []
            for start, stop in [(0, 2), (2, ROWS)]:
                ctx = LaneContext(seed=5, step=3, phase=phase, batch_size=ROWS, lanes=3, rows=(start, stop))
                parts.append(model(cut(rows, start, stop), ctx))
        for name, value in whole.items():
            if value.ndim:
                joined = torch.cat([part[name] for part in parts])
                torch.testing.assert_close(joined, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", kinds())
def test_the_kind_is_the_file_name(kind: str) -> None:
    module = kind_module(kind)
    assert module.Config.model_fields["kind"].default == kind
    assert issubclass(module.Model, Variant)
    by_key = dict(resume_policy(module.Config))
    assert by_key.pop("kind") == "fixed"
    assert "fixed" in by_key.values(), "a model's shape may not change on resume"


@pytest.mark.parametrize("kind", kinds())
def test_defaults_build_on_the_usual_sizes(kind: str) -> None:
    model = build(model_config({"kind": kind, **NEEDED.get(kind, {})}), Spec(1, (28, 28), 10), seed=0)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_unknown_kind_and_unknown_key() -> None:
    with pytest.raises(UserError, match=r"unknown model kind 'vqave'; did you mean 'vqvae'. Valid: .*vae"):
        model_config({"kind": "vqave"})
    with pytest.raises(UserError, match=r"unknown key 'model\.latnet'; did you mean 'latent'"):
        model_config({"kind": "vae", "latnet": 3})
