"""Labels in a body: codes, how they enter, what a dropped one is, and mistakes in one sentence."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, distributions, nn

from vaedist.config.job import Spec
from vaedist.config.settings import parse
from vaedist.core.context import generator
from vaedist.core.errors import UserError
from vaedist.nets.bodies import decoder, encoder
from vaedist.nets.bodies_config import Body
from vaedist.nets.conditioning import DROPPED, ClassPrior, LabelEmbedding, conditioned, drop_labels
from vaedist.nets.conditioning_config import Condition
from vaedist.nets.divergences import DiagonalGaussian

SPEC = Spec(2, (8, 8), classes=4)
BODIES = [
    {"kind": "mlp", "width": 12, "depth": 2},
    {"kind": "conv", "width": 16, "depth": 0, "downsample": 4},
    {"kind": "resnet", "width": 16, "depth": 1, "downsample": 4, "patch": 2, "upsample": "shuffle"},
]
HOW = [Condition(how="film", size=3), Condition(how="concat", size=3), Condition(label="one_hot")]
bodies = pytest.mark.parametrize("settings", BODIES, ids=lambda s: str(s["kind"]))
conditions = pytest.mark.parametrize("condition", HOW, ids=["film", "concat", "one-hot"])


def code_of(condition: Condition, spec: Spec = SPEC) -> LabelEmbedding:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LabelEmbedding(condition, spec)


def nets(settings: dict[str, Any], condition: Condition | None, *, vector: bool) -> list[nn.Sequential]:
    adapter: TypeAdapter[Any] = TypeAdapter(Body)
    body = adapter.validate_python(
        settings | ({"grid": 2} if settings["kind"] == "mlp" and not vector else {})
    )
    size = code_of(condition).size if condition else 0
    extra = size if condition and condition.how == "concat" else 0
    with torch.random.fork_rng():
        torch.manual_seed(2)
        down = encoder(body, SPEC, 5, vector=vector, extra=extra)
        up = decoder(body, SPEC, 5, vector=vector, extra=extra)
        latent = (5,) if vector else (5, 2, 2)
        return [
            conditioned(down, condition, size, SPEC.image_shape),
            conditioned(up, condition, size, latent),
        ]


def inputs(vector: bool, rows: int = 4) -> list[Tensor]:
    draw = generator("inputs")
    latent = (rows, 5) if vector else (rows, 5, 2, 2)
    return [torch.randn(shape, generator=draw) for shape in ((rows, *SPEC.image_shape), latent)]


@pytest.mark.parametrize("vector", [True, False], ids=["vector", "map"])
@bodies
@conditions
def test_labels_reach_the_output_of_their_own_row(
    condition: Condition, settings: dict[str, Any], vector: bool
) -> None:
    code = code_of(condition)
    label, other = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, DROPPED])
    for net, x in zip(nets(settings, condition, vector=vector), inputs(vector), strict=True):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith("film."):  # starts at 0
                    parameter.copy_(torch.randn(parameter.shape, generator=generator(name)) / 2)
            one, two = net(x, code(label)), net(x, code(other))
        assert one.isfinite().all()
        torch.testing.assert_close(one[:3], two[:3])
        assert float((one[3] - two[3]).abs().max()) > 1e-3
        net(x, code(label)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    if code.embedding is not None:
        assert code.embedding.weight.grad is not None and code.embedding.weight.grad.abs().min() > 0


@bodies
@pytest.mark.parametrize("vector", [True, False], ids=["vector", "map"])
def test_film_starts_as_the_plain_body_with_the_same_names(settings: dict[str, Any], vector: bool) -> None:
    code = code_of(HOW[0])(torch.tensor([0, 1, 2, 3]))
    plain, film = nets(settings, None, vector=vector), nets(settings, HOW[0], vector=vector)
    for net, other, x in zip(plain, film, inputs(vector), strict=True):
        torch.testing.assert_close(net(x), other(x, code), rtol=0, atol=0)
        mine, theirs = net.state_dict(), other.state_dict()
        assert mine.keys() < theirs.keys()
        assert {name.split(".")[0] for name in theirs.keys() - mine.keys()} == {"film"}


def test_film_is_a_scale_and_a_shift_of_a_vector_input_and_of_every_block_but_the_last() -> None:
    with torch.random.fork_rng():
        parts = {"first": nn.Linear(2, 3), "flat": nn.Flatten(), "last": nn.Linear(3, 1)}
        body = nn.Sequential(OrderedDict(parts))
        film = conditioned(body, Condition(how="film"), 2, (2,))
    for name in ("input", "first"):
        layer = film.film[name]
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator("film", name)))
            layer.bias.copy_(torch.arange(float(len(layer.bias))))
    x, c = inputs(True)[1][:, :2], inputs(True)[1][:, 2:4]

    def modulated(name: str, values: torch.Tensor) -> torch.Tensor:
        scale, shift = film.film[name](c).chunk(2, dim=1)
        return (1 + scale) * values + shift

    expected = body.last(modulated("first", body.first(modulated("input", x))))
    torch.testing.assert_close(film(x, c), expected)
    assert set(film.film) == {"input", "first"}


def test_codes() -> None:
    label = torch.tensor([2, DROPPED, 0])
    one_hot = code_of(Condition(label="one_hot", factor=3.0))
    assert one_hot.size == 4 and not list(one_hot.parameters())
    assert one_hot(label).tolist() == [[0, 0, 3, 0], [0, 0, 0, 0], [3, 0, 0, 0]]
    embedding = code_of(Condition(size=5, factor=2.0))
    assert embedding.embedding is not None
    expected = 2 * embedding.embedding.weight.detach()[[2, 0]]
    torch.testing.assert_close(embedding(label).detach()[[0, 2]], expected)
    assert embedding(label)[1].tolist() == [0] * 5
    assert code_of(Condition()).size == 16


def test_labels_are_dropped_where_the_noise_says() -> None:
    label = torch.arange(4)
    uniform = torch.tensor([0.05, 0.3, 0.0999, 0.1])
    assert drop_labels(label, uniform, 0.1).tolist() == [DROPPED, 1, DROPPED, 3]
    assert label.tolist() == [0, 1, 2, 3]


def test_a_class_prior_is_a_gaussian_per_class_and_standard_for_dropped_labels() -> None:
    prior = ClassPrior(3, (2,)).double()
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            parameter.copy_(torch.randn(3, 2, generator=generator("prior", name)))
    label = torch.tensor([1, DROPPED, 1, 0])
    p = prior(label)
    mean = torch.stack([prior.mean[1], torch.zeros(2), prior.mean[1], prior.mean[0]])
    log_variance = torch.stack([prior.log_variance[1], torch.zeros(2), *prior.log_variance[[1, 0]]])
    theirs = distributions.Normal(mean, (log_variance / 2).exp())
    z = torch.randn(4, 2, generator=generator("z"), dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(z), theirs.log_prob(z).sum(1))
    q = DiagonalGaussian(z, torch.full_like(z, -1.0), p)
    expected = distributions.kl_divergence(distributions.Normal(z, torch.full_like(z, -0.5).exp()), theirs)
    torch.testing.assert_close(q.kl(), expected)


def test_what_a_label_may_be() -> None:
    always, sometimes = code_of(Condition()), code_of(Condition(dropout=0.2))
    label = torch.tensor([0, 3])
    assert always.check(label) is label and always.resolve(label, 2, label.device) is label
    assert sometimes.resolve(None, 2, label.device).tolist() == [DROPPED, DROPPED]
    assert sometimes.check(torch.tensor([DROPPED, 1])).tolist() == [DROPPED, 1]
    for wrong in (torch.tensor([4]), torch.tensor([0, -2])):
        with pytest.raises(UserError, match=r"there is no class (4|-2): the model knows 0 to 3"):
            sometimes.check(wrong)
    for refused in (lambda: always.resolve(None, 2, label.device), lambda: always.check(label - 1)):
        with pytest.raises(UserError, match=r"name a class, or train with model\.condition\.dropout above 0"):
            refused()


def test_mistakes_in_a_condition_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.condition needs classes, and these data carry no labels"):
        LabelEmbedding(Condition(), Spec(1, (8, 8)))
    for section, message in [
        ({"label": "one_hot", "size": 4}, "a one-hot code is as long as there are classes"),
        ({"dropout": 1.0}, "dropout: input should be less than 1"),
        ({"how": "add"}, "'film' or 'concat'"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(Condition, section, "job.yaml", "model.condition")
