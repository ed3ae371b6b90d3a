"""Priors over frozen codes: a normalised distribution, what they learn, labels, samples and their options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vaedist.config.job import Spec
from vaedist.config.model_section import model_config
from vaedist.core.context import Batch, LaneContext, SampleContext, generator
from vaedist.core.errors import NotDefined, UserError
from vaedist.models.contract import build

SPEC = Spec(1, (8, 8), classes=2)
NETS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"width": 12, "layers": 3, "first": 3, "hidden": 16},
    "transformer": {"width": 16, "layers": 2, "heads": 2},
}
kind = pytest.mark.parametrize("kind", list(NETS))


def tokenizer(codes: int = 4, downsample: int = 2, spec: Spec = SPEC) -> dict[str, Any]:
    """What `vaedist-train` writes in the place of a run's name."""
    body = {"kind": "conv", "width": 8, "depth": 0, "downsample": downsample}
    return {
        "run": "runs/tokenizer",
        "sha256": "0" * 64,
        "model": {"kind": "vqvae", "encoder": body, "codebook": {"kind": "ema", "codes": codes, "dim": 3}},
        "codes": codes,
        "grid": [side // downsample for side in spec.shape],
    }


def make(kind: str, spec: Spec = SPEC, *, net: dict[str, Any] | None = None, **section: Any) -> Any:
    content = {"kind": kind, "tokenizer": tokenizer(), "net": NETS[kind] | (net or {}), **section}
    model = build(model_config(content), spec, seed=2).double()
    with torch.no_grad():  # labels are whispered at the start; here they are to be heard without training
        for name, table in model.net.named_parameters():
            table.mul_(50 if "label" in name else 1)
    return model


def striped(rows: int, seed: int = 0) -> Batch:
    """4x4 maps of 4 codes: a random first row, below it the same (class 0) or one more (class 1); 1 in 10 random."""
    draw = generator("striped", seed)
    label = torch.randint(0, 2, (rows,), generator=draw)
    codes = torch.randint(0, 4, (rows, 4, 4), generator=draw)
    noise = codes.clone()
    for row in range(1, 4):
        codes[:, row] = (codes[:, row - 1] + label[:, None]) % 4
        wrong = torch.rand(rows, 4, generator=draw) < 0.1
        codes[:, row] = torch.where(wrong, noise[:, row], codes[:, row])
    return {"codes": codes, "label": label}


KNOWN = (4 * math.log(4) + 12 * (-0.925 * math.log(0.925) - 3 * 0.025 * math.log(0.025))) / 16
"""Entropy in nats per code of `striped` with its label told: 4 free codes, 12 that are right with 0.9 + 0.1 / 4."""


def lanes(step: int, rows: int = 32) -> LaneContext:
    return LaneContext(seed=0, step=step, batch_size=rows, lanes=8)


def evaluation(rows: int) -> SampleContext:
    return SampleContext(seed=0, samples=range(rows))


def trained(kind: str, steps: int, **section: Any) -> Any:
    content = {"kind": kind, "tokenizer": tokenizer(), "net": NETS[kind], **section}
    model: Any = build(model_config(content), SPEC, seed=2)
    optimizer = torch.optim.Adam(model.net.parameters(), 1e-2)
    for step in range(steps):
        loss = model(striped(32, seed=step), lanes(step))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
    return model.eval()


# The loss -------------------------------------------------------------------------------------------------------


@kind
@pytest.mark.parametrize("conditional", [False, True])
def test_probabilities_of_all_maps_sum_to_one(kind: str, conditional: bool) -> None:
    spec = Spec(1, (4, 6), classes=2)
    model = make(kind, spec, tokenizer=tokenizer(codes=3, spec=spec), conditional=conditional)
    maps = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 2, 3)
    for label in (0, 1, None):
        told = None if label is None else torch.full((len(maps),), label)
        with torch.no_grad():
            total = model.code_log_prob(maps, told).logsumexp(0)
        torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-9, rtol=0)


@kind
def test_terms_are_the_log_probability(kind: str) -> None:
    model, batch = make(kind, conditional=True), striped(6)
    terms = model(batch, evaluation(6))
    assert set(terms) == {"loss", "nats_per_token"} == set(model.units)
    torch.testing.assert_close(terms["loss"], -model.code_log_prob(batch["codes"], batch["label"]))
    torch.testing.assert_close(terms["nats_per_token"], terms["loss"] / 16)


@kind
@pytest.mark.slow
def test_it_learns_what_there_is_to_learn(kind: str) -> None:
    """Told the label it comes near the entropy, and samples follow the class; without one it still knows much."""
    model, held_out = trained(kind, 250, conditional=True, label_dropout=0.2), striped(512, seed=-1)
    with torch.no_grad():
        told = float(model(held_out, evaluation(512))["nats_per_token"].mean())
        hidden = -float(model.code_log_prob(held_out["codes"]).mean()) / 16
    assert KNOWN - 0.02 < told < KNOWN + 0.06
    assert told < hidden < math.log(4) - 0.3

    def agreement(**options: Any) -> list[float]:
        """Share of samples' codes that follow the rule of the asked class, by class."""
        label = torch.arange(2).repeat_interleave(64)
        codes = model.sample_codes(128, label=label, **options)
        right = (codes[:, 1:] == (codes[:, :-1] + label[:, None, None]) % 4).float().mean((1, 2))
        return [float(part.mean()) for part in right.split(64)]

    plain = agreement()
    assert all(0.85 < share < 0.99 for share in plain)
    assert min(agreement(temperature=0.3)) > max(0.99, *plain)
    assert min(agreement(top_k=1)) > 0.99
    assert min(agreement(guidance=3.0)) > min(plain)


# The label ------------------------------------------------------------------------------------------------------


@kind
def test_labels_are_hidden_in_training_alone_and_by_sample(kind: str) -> None:
    model, batch = make(kind, conditional=True, label_dropout=0.5, net={"dropout": 0.0}), striped(32)
    with torch.no_grad():
        told = model.code_log_prob(batch["codes"], batch["label"])
        hidden = model.code_log_prob(batch["codes"])
        seen = -model(batch, lanes(3))["loss"]
        torch.testing.assert_close(-model(batch, evaluation(32))["loss"], told)
        part: Batch = {"codes": batch["codes"][8:20], "label": batch["label"][8:20]}
        here = -model(part, lanes(3).micro_batch(8, 20))["loss"]
    as_told, as_hidden = (torch.isclose(seen, one, rtol=1e-9, atol=0) for one in (told, hidden))
    assert torch.equal(as_hidden, ~as_told)
    assert 6 <= int(as_hidden.sum()) <= 26
    torch.testing.assert_close(here, seen[8:20])


@kind
def test_without_conditional_labels_are_not_read(kind: str) -> None:
    model, batch = make(kind), striped(4)
    assert not model.conditional
    with torch.no_grad():
        torch.testing.assert_close(
            model.code_log_prob(batch["codes"], batch["label"]), model.code_log_prob(batch["codes"])
        )
    assert model.sampling_options == {"top_k", "top_p"}
    with pytest.raises(
        UserError, match=r"guidance is 2\.0, but this prior never saw a hidden label: train it"
    ):
        model.sample(2, guidance=2.0)


@kind
def test_labels_that_mean_nothing_are_refused(kind: str) -> None:
    model = make(kind, conditional=True)
    with pytest.raises(UserError, match="there is no class 2: the model knows 0 to 1"):
        model.sample(2, label=torch.tensor([0, 2]))
    with pytest.raises(UserError, match="guidance is inf; give a number"):
        model.sample(2, guidance=math.inf)
    always_told = make(kind, conditional=True, label_dropout=0)
    assert always_told.sampling_options == {"top_k", "top_p"}
    with pytest.raises(UserError, match="saw the label of every training image"):
        always_told.sample(2, label=torch.tensor([0, -1]))
    with pytest.raises(UserError, match=r"model\.conditional is true, but these data carry no class"):
        make(kind, Spec(1, (8, 8)), conditional=True)


# Samples --------------------------------------------------------------------------------------------------------


@kind
def test_a_sample_depends_on_its_number_its_label_and_the_options(kind: str) -> None:
    model = make(kind, conditional=True)
    label = torch.arange(40) % 2
    codes = model.sample_codes(40, seed=1, label=label)
    assert codes.shape == (40, 4, 4) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < model.num_codes
    assert len(codes.unique(dim=0)) > 30
    assert torch.equal(model.sample_codes(7, seed=1, first=33, label=label[33:]), codes[33:])
    assert torch.equal(model.sample_codes(5, seed=1, label=label[:5], guidance=1.0), codes[:5])
    assert torch.equal(model.sample_codes(5, seed=1, label=label[:5], top_k=4, top_p=1.0), codes[:5])
    for other in ({"seed": 2}, {"seed": 1, "label": 1 - label}, {"seed": 1, "temperature": 0.2}):
        assert not torch.equal(model.sample_codes(40, **{"label": label, **other}), codes)
    same = model.sample_codes(3, seed=1, label=label[:3], temperature=0)
    assert torch.equal(same[0], same[2]), "the most probable code, whatever the noise"


@kind
def test_labels_are_drawn_where_none_are_asked_for(kind: str) -> None:
    model = make(kind, conditional=True)
    drawn = model.sample_codes(24)
    ones, zeros = (model.sample_codes(24, label=torch.full((24,), one)) for one in (1, 0))
    from_one, from_zero = ((drawn == one).flatten(1).all(1) for one in (ones, zeros))
    assert (from_one | from_zero).all() and (~from_one).any() and (~from_zero).any()
    assert torch.equal(model.sample_codes(4, first=20), drawn[20:])


@kind
def test_guidance_zero_forgets_the_label(kind: str) -> None:
    model = make(kind, conditional=True)
    label = torch.arange(12) % 2
    free = model.sample_codes(12, label=torch.full((12,), -1))
    assert torch.equal(model.sample_codes(12, label=label, guidance=0.0), free)
    assert not torch.equal(model.sample_codes(12, label=label, guidance=40.0), free)


@kind
def test_images_are_what_the_tokenizer_makes_of_the_codes(kind: str) -> None:
    model = make(kind)
    with torch.no_grad():
        expected = model.tokenizer.decode_codes(model.sample_codes(5, seed=4, top_k=3)).mean
    torch.testing.assert_close(model.sample(5, seed=4, top_k=3), expected)
    image = torch.randint(0, 256, (3, 1, 8, 8), generator=generator("image")).to(torch.uint8)
    assert torch.equal(model.codes(image), model.tokenizer.codes(image))
    torch.testing.assert_close(model.reconstruct(image), model.tokenizer.reconstruct(image))
    with pytest.raises(UserError, match="top_k is 0"):
        model.sample(1, top_k=0)


# The tokenizer --------------------------------------------------------------------------------------------------


@kind
def test_the_tokenizer_is_kept_as_it_is(kind: str) -> None:
    model = make(kind, conditional=True)
    assert model.pretrained == {"tokenizer": "runs/tokenizer"}
    assert (model.num_codes, model.latent_shape, model.reads, model.latent) == (4, (4, 4), "codes", "codes")
    before = {name: value.clone() for name, value in model.tokenizer.state_dict().items()}
    model.train()
    assert model.net.training and not model.tokenizer.training
    model(striped(8), lanes(0, 8))["loss"].sum().backward()
    trained_names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained_names == {name for name, _ in model.named_parameters() if name.startswith("net.")}
    assert trained_names == {name for name, _ in model.named_parameters() if model.averaged(name)}
    assert all(torch.equal(value, model.tokenizer.state_dict()[name]) for name, value in before.items())
    assert any(name.startswith("tokenizer.") for name in model.state_dict()), "one folder is enough to sample"


@kind
def test_a_run_that_has_not_been_read(kind: str) -> None:
    config = model_config({"kind": kind, "tokenizer": "runs/x"})
    with pytest.raises(UserError, match="names the run runs/x"):
        build(config, SPEC, 0)
    with pytest.raises(UserError, match=r"'model\.tokenizer' is missing"):
        model_config({"kind": kind})


@kind
def test_what_is_not_defined_says_why(kind: str) -> None:
    model, image = make(kind), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for call, told in ((model.encode, "map of codes"), (model.decode, "decode_codes")):
        with pytest.raises(NotDefined, match=told):
            call(image)
    with pytest.raises(NotDefined, match="prior is not defined, because it is a distribution of codes"):
        model.prior()


@kind
def test_the_network_compiles_and_sampling_still_caches(kind: str) -> None:
    """`train.compile` replaces the network's forward; a cache reads its weights."""
    model = make(kind)
    assert model.compiled == ("net",)
    codes = model.sample_codes(2, seed=1)

    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("one full forward per code")

    model.net.forward = refuse
    assert torch.equal(model.sample_codes(2, seed=1), codes)
