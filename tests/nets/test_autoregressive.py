"""Networks over code maps: causality by gradient, caches that equal the full forward, choosing a code, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vaedist.core.context import LaneContext, generator
from vaedist.core.errors import UserError
from vaedist.nets.autoregressive import LogitSampler, UncachedSamplingState, generate
from vaedist.nets.dropout import dropout, sample_seeds
from vaedist.nets.pixelcnn import GatedLayer, GatedPixelCnn
from vaedist.nets.pixelcnn_config import PixelCnn
from vaedist.nets.transformer import CausalTransformer
from vaedist.nets.transformer_config import Transformer

K, GRID, LABELS = 7, (5, 6), 4

Make = Callable[..., Any]


def pixelcnn(grid: tuple[int, int] = GRID, labels: int = LABELS, **settings: Any) -> GatedPixelCnn:
    size = PixelCnn.model_validate({"width": 12, "layers": 6, "first": 5, "hidden": 16, **settings})
    return GatedPixelCnn(size, K, grid, labels)


def transformer(grid: tuple[int, int] = GRID, labels: int = LABELS, **settings: Any) -> CausalTransformer:
    size = Transformer.model_validate({"width": 24, "layers": 3, "heads": 3, **settings})
    return CausalTransformer(size, K, grid, labels)


NETWORKS: dict[str, Make] = {
    "pixelcnn": pixelcnn,
    "pixelcnn, undilated": lambda *grid, **more: pixelcnn(*grid, first=7, dilations=[1], **more),
    "pixelcnn, two layers": lambda *grid, **more: pixelcnn(*grid, layers=2, first=3, **more),
    "transformer": transformer,
    "transformer, learned": lambda *grid, **more: transformer(*grid, positions="learned", **more),
    "transformer, rotary": lambda *grid, **more: transformer(*grid, positions="rotary", **more),
}
network = pytest.mark.parametrize("make", list(NETWORKS.values()), ids=list(NETWORKS))


def build(make: Make, *arguments: Any, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A network whose logits spread as those of a trained one: some codes are likely, most are not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = make(*arguments, **more)
    last = net.head[-1] if isinstance(net.head, nn.Sequential) else net.head
    with torch.no_grad():
        probe = net(codes(8, net.grid), labels(8) if more.get("labels", LABELS) else None)
        last.weight.mul_(2.5 / probe.std())
    return net.to(dtype)


def codes(rows: int, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return torch.randint(0, K, (rows, *grid), generator=generator("codes", seed))


def labels(rows: int) -> Tensor:
    return torch.arange(rows) % LABELS


def reach(net: Any) -> Tensor:
    """(T, T) bool: whether the logits at t (row) have any gradient with respect to the code at s (column)."""
    held: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        held.append(out.detach().requires_grad_())
        return held[-1]

    places = math.prod(net.grid)
    handle = net.embedding.register_forward_hook(keep)
    logits = net(codes(2, net.grid), labels(2)).flatten(2)
    handle.remove()
    weights = torch.rand(K, generator=generator("weights"), dtype=torch.float64)
    seen = torch.zeros(places, places, dtype=torch.bool)
    for t in range(places):
        (gradient,) = torch.autograd.grad(
            (logits[:, :, t] * weights[:, None].T).sum(), held[0], retain_graph=True, materialize_grads=True
        )
        touched = gradient.abs().sum((0, -1)).flatten() > 0
        seen[t, : len(touched)] = touched
    return seen


BEFORE = torch.ones(30, 30, dtype=torch.bool).tril(-1)


# Causality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [NETWORKS[name] for name in NETWORKS if name != "pixelcnn, two layers"],
    ids=[name for name in NETWORKS if name != "pixelcnn, two layers"],
)
def test_a_code_depends_on_all_codes_before_it_and_on_no_other(make: Make) -> None:
    assert torch.equal(reach(build(make)), BEFORE)


def test_a_small_pixelcnn_sees_less_but_never_later_codes() -> None:
    seen = reach(build(NETWORKS["pixelcnn, two layers"]))
    assert not (seen & ~BEFORE).any()
    neighbours = [s for t, s in ((14, 13), (14, 8), (14, 7), (14, 9)) if not seen[t, s]]
    assert not neighbours, "left, upper, and both upper diagonal codes: no blind spot"


def test_the_test_of_causality_finds_what_it_looks_for() -> None:
    """A first layer of type B leaks; later layers of an all-zero mask, as one earlier system had, see nothing."""
    leaking = build(pixelcnn)
    with torch.random.fork_rng(devices=[]):
        first = GatedLayer(12, reach=2, dilation=1, masked=False, last=False, labels=LABELS)
    leaking.layers[0] = first.double()
    assert (reach(leaking) & ~BEFORE).any()

    blind = build(pixelcnn)
    for layer in blind.layers:
        nn.init.zeros_(layer.vertical.weight)
        nn.init.zeros_(layer.horizontal.weight)
    assert not reach(blind).any()


@network
def test_codes_change_later_logits_alone(make: Make) -> None:
    """The same by changing a code, through the lookup itself."""
    net, one = build(make), codes(2)
    with torch.no_grad():
        before = net(one, labels(2)).flatten(2)
        for t in (0, 13, 28):
            other = one.clone()
            other.flatten(1)[:, t] = (other.flatten(1)[:, t] + 1) % K
            changed = (net(other, labels(2)).flatten(2) != before).any(1).any(0)
            assert not changed[: t + 1].any() and changed[t + 1]


@network
def test_logits_depend_on_the_label(make: Make) -> None:
    net, one = build(make), codes(1).expand(LABELS, -1, -1)
    with torch.no_grad():
        logits = net(one, torch.arange(LABELS))
    assert all((logits[a] - logits[b]).abs().max() > 1e-6 for a in range(LABELS) for b in range(a))
    assert build(make, labels=0)(codes(1)).shape == (1, K, *GRID)


# Caches ---------------------------------------------------------------------------------------------------------


@network
@pytest.mark.parametrize("grid", [GRID, (1, 4), (3, 1), (9, 9)], ids=str)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_cached_logits_are_those_of_the_full_forward(
    make: Make, grid: tuple[int, int], dtype: torch.dtype, within: float
) -> None:
    net, sequence, label = build(make, grid, dtype=dtype), codes(3, grid), labels(3)
    state, found = net.start_sampling(3, label), []
    for t in range(math.prod(grid)):
        found.append(state.logits())
        state.append(sequence.flatten(1)[:, t])
    with torch.no_grad():
        full = net(sequence, label).flatten(2)
    torch.testing.assert_close(torch.stack(found, 2), full, rtol=0, atol=within)


@network
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_cached_samples_are_those_of_one_full_forward_per_code(make: Make, guidance: float | None) -> None:
    net, rows, sampler = build(make), 5, LogitSampler(3.0, 6, 0.98)
    uniform = torch.rand(rows, math.prod(GRID), generator=generator("uniform"))
    label = labels(rows)
    if guidance is not None:
        label = torch.cat([label, torch.full_like(label, LABELS - 1)])
    full = generate(UncachedSamplingState(net, len(label), label, "cpu"), uniform, sampler, guidance)
    cached = generate(net.start_sampling(len(label), label), uniform, sampler, guidance)
    assert torch.equal(cached, full)
    assert len(full.unique()) >= 5 and len(full.unique(dim=0)) == rows, "samples worth comparing"


def test_guidance_is_extrapolation() -> None:
    """One code, whose logits are known."""

    class Fixed:
        def logits(self) -> Tensor:
            return torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # labelled, free

        def append(self, codes: Tensor) -> None:
            assert codes.tolist() == [codes[0]] * 2

    uniform = torch.linspace(0, 0.999, 1000)
    for g in (0.0, 1.0, 3.0):
        expected = torch.tensor([g, 1 - g, 0.0]).softmax(0)
        drawn = torch.cat([generate(Fixed(), u.view(1, 1), LogitSampler(), g) for u in uniform])
        share = torch.bincount(drawn.flatten(), minlength=3) / 1000
        torch.testing.assert_close(share, expected, atol=0.002, rtol=0)


# Choosing -------------------------------------------------------------------------------------------------------

P = [0.5, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (LogitSampler(), P),
        (LogitSampler(temperature=0.5), [0.25, 0.0025, 0.09, 0.0225]),
        (LogitSampler(temperature=0), [1, 0, 0, 0]),
        (LogitSampler(top_k=2), [0.5, 0, 0.3, 0]),
        (LogitSampler(top_k=9), P),
        (LogitSampler(top_k=1, top_p=0.1), [1, 0, 0, 0]),
        (LogitSampler(top_p=0.5), [1, 0, 0, 0]),
        (LogitSampler(top_p=0.51), [0.5, 0, 0.3, 0]),
        (LogitSampler(top_p=0.81), [0.5, 0, 0.3, 0.15]),
        (LogitSampler(top_p=1.0), P),
        (LogitSampler(top_k=3, top_p=0.9), [0.5, 0, 0.3, 0.15]),
    ],
)
def test_probabilities(sampler: LogitSampler, expected: list[float]) -> None:
    logits = torch.tensor([P, P[::-1]], dtype=torch.float64).log() + 3
    wanted = torch.tensor([expected, expected[::-1]], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(logits), wanted / wanted.sum(1, keepdim=True))


def test_a_draw_follows_the_probabilities_and_never_takes_an_impossible_code() -> None:
    n = 4000
    logits = torch.tensor([-math.inf, 0.0, math.log(3), -math.inf]).expand(n, 4)
    drawn = LogitSampler().draw(logits, torch.rand(n, generator=generator("draw")))
    share = torch.bincount(drawn, minlength=4) / n
    assert share[0] == 0 and share[3] == 0
    assert abs(float(share[2]) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n)
    ends = LogitSampler().draw(logits[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (LogitSampler(temperature=-1), "temperature is -1; give a number of at least 0"),
        (LogitSampler(temperature=math.nan), "temperature is nan"),
        (LogitSampler(top_k=0), "top_k is 0; give how many codes"),
        (LogitSampler(top_p=0.0), r"top_p is 0\.0; give the probability"),
        (LogitSampler(top_p=1.5), r"top_p is 1\.5"),
    ],
)
def test_sampling_settings_out_of_range_are_refused(sampler: LogitSampler, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 4}, "must be odd"),
        ({"layers": 1}, "greater than or equal to 2"),
        ({"dilations": []}, "at least 1 item"),
    ],
)
def test_impossible_sizes_of_a_pixelcnn_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCnn.model_validate(settings)


def test_impossible_sizes_of_a_transformer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width \(20\) must be a multiple of 4 \* heads .* = 16"):
        Transformer(width=20, heads=4)
    assert Transformer(width=20, heads=4, positions="learned").width == 20


# Dropout --------------------------------------------------------------------------------------------------------


def seeds(rows: int = 8, start: int = 0, step: int = 0) -> Tensor:
    ctx = LaneContext(seed=1, step=step, batch_size=8, lanes=4, rows=(start, start + rows))
    return sample_seeds(ctx, rows)


def test_dropout_keeps_the_right_share_and_the_mean() -> None:
    x = torch.ones(8, 100, 333, dtype=torch.float64)
    for rate in (0.1, 0.5, 0.83):
        out = dropout(x, rate, seeds(), 0)
        level = round(rate * 65536) / 65536
        assert set(out.unique().tolist()) == {0.0, 1 / (1 - level)}
        count = x[0].numel()
        for row in (out == 0).flatten(1).double().mean(1):
            assert abs(float(row) - level) < 4.5 * math.sqrt(level * (1 - level) / count)
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, seeds(), 0) is x


def test_masks_are_independent_over_samples_layers_steps_and_positions() -> None:
    x = torch.ones(8, 20000, dtype=torch.float64)
    masks = torch.cat([dropout(x, 0.5, seeds(step=step), layer) for step in range(2) for layer in range(4)])
    masks = torch.cat([masks, masks[:1].roll(1, 1), masks[:1].roll(10000, 1)]) - 1
    correlation = masks @ masks.T / x.shape[1]
    off = (correlation - torch.eye(len(masks))).abs()
    assert float(off.max()) < 5.5 / math.sqrt(x.shape[1])


def test_a_mask_belongs_to_its_sample() -> None:
    """Whatever the share of the batch that a process holds, and with an odd number of elements."""
    x = torch.ones(8, 5, 7)
    whole = dropout(x, 0.3, seeds(), 2)
    parts = [dropout(x[a:b], 0.3, seeds(b - a, a), 2) for a, b in ((0, 3), (3, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[0], whole[1])


@network
def test_networks_drop_in_training_alone(make: Make) -> None:
    net, sequence = build(make, dropout=0.3), codes(8)
    still = net(sequence, labels(8))
    assert torch.equal(net(sequence, labels(8)), still)
    moved = net(sequence, labels(8), seeds())
    assert not torch.allclose(moved, still)
    assert torch.equal(net(sequence, labels(8), seeds()), moved)
    assert not torch.allclose(net(sequence, labels(8), seeds(step=1)), moved)
