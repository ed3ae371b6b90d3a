"""Tables of made-up evaluations: which numbers share a line, whose spread is shown, and who beats whom."""

from __future__ import annotations

from typing import Any

import pytest

from vaedist.evaluation.comparison import Comparison, RunEvaluation, compared_numbers


def summary(mean: float) -> dict[str, Any]:
    return {"mean": mean, "std": 0.5, "count": 9}


def document(run: str = "run", **parts: Any) -> dict[str, Any]:
    return {
        "run": run,
        "images": 9,
        "data": {
            "path": "/data", "identity": "ab", "split": "test", "shape": [1, 8, 8], "binarise": "none"
        },
        "metrics": {"ssim": summary(0.5), "mse": summary(0.01)},
        "baselines": {"black": {"ssim": summary(0.1)}},
        "codes": None,
        "tokenizer": None,
        **parts,
    }  # fmt: skip


def likelihood(name: str, nll: float, of: str = "bernoulli") -> dict[str, Any]:
    bits = None if name == "surrogate" else summary(nll / 10)
    return {"name": name, "likelihood": of, "nll": summary(nll), "bits_per_dim": bits}


def entries(**values: list[float]) -> list[RunEvaluation]:
    """An experiment for each name, with the SSIM of each of its seeds."""
    return [
        RunEvaluation(name, seed, number, document(f"{name}-{seed}", metrics={"ssim": summary(value)}))
        for number, (name, column) in enumerate(values.items())
        for seed, value in enumerate(column)
    ]


def test_a_spread_is_over_seeds() -> None:
    (table,) = Comparison(entries(a=[0.5, 0.7], b=[0.6])).document()
    a, b = table["experiments"]
    assert (a["name"], a["seeds"], a["runs"]) == ("a (2 seeds)", [0, 1], ["a-0", "a-1"])
    assert a["numbers"]["SSIM"] == {
        "values": [0.5, 0.7],
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.02**0.5),
        "count": 2,
    }
    assert (b["name"], b["numbers"]["SSIM"]["std"]) == ("b", None)
    text = Comparison(entries(a=[0.5, 0.7], b=[0.6])).text()
    assert "0.6000 ±0.1414" in text
    assert "0.6000 ±0.5" not in text  # the spread over images


def test_who_beats_whom() -> None:
    clear = Comparison(entries(a=[0.7, 0.8, 0.9], b=[0.5, 0.6, 0.65], c=[0.4, 0.85, 0.5]))
    assert clear.document()[0]["verdicts"] == ["SSIM: a (3 seeds) beats b (3 seeds)"]
    assert "a (3 seeds) beats b (3 seeds)" in clear.text()
    few = Comparison(entries(a=[0.7, 0.8], b=[0.5, 0.6, 0.65]))
    assert few.document()[0]["verdicts"] == []
    assert "none beats another: that takes 3 seeds" in few.text()
    once = [RunEvaluation("a", 0, 0, entry.document) for entry in entries(a=[0.7, 0.8, 0.9])]
    same_seed = Comparison(
        [*once, *(RunEvaluation("b", e.seed, 1, e.document) for e in entries(b=[0.1, 0.2, 0.3]))]
    )
    assert same_seed.document()[0]["verdicts"] == []  # three runs of one seed are not three seeds
    assert "a (3 runs)" in same_seed.text()


def test_less_error_is_better() -> None:
    found = [
        RunEvaluation(name, seed, number, document(metrics={"mse": summary(value + seed / 100)}))
        for number, (name, value) in enumerate({"good": 0.1, "bad": 0.2}.items())
        for seed in range(3)
    ]
    assert Comparison(found).document()[0]["verdicts"] == ["MSE: good (3 seeds) beats bad (3 seeds)"]


def test_likelihoods_of_different_meaning_are_different_lines() -> None:
    titles = {
        name: [number.title for number in compared_numbers(document(likelihood=likelihood(name, 90.0, of)))][
            2:
        ]
        for name, of in {
            "binary": "bernoulli",
            "discrete": "discretisedlogistic",
            "dequantised": "gaussian",
            "surrogate": "bernoulli",
        }.items()
    }
    assert titles == {
        "binary": ["NLL, black and white", "bits/dim, binary"],
        "discrete": ["NLL", "bits/dim, discrete"],
        "dequantised": ["NLL, dequantised", "bits/dim, dequantised"],
        "surrogate": ["surrogate (bernoulli)"],
    }
    other = compared_numbers(document(likelihood=likelihood("surrogate", 90.0, "continuousbernoulli")))
    assert "surrogate (continuousbernoulli)" in [number.title for number in other]


def test_nats_per_token_name_the_tokenizer() -> None:
    prior = {
        "nats_per_token": {"prior": summary(1.5)},
        "bits_per_dim": None,
        "name": "surrogate",
    }
    (number,) = [
        n
        for n in compared_numbers(document(prior=prior, tokenizer="c0ffee1234"))
        if n.title.startswith("nats")
    ]
    assert number.title == "nats/token [c0ffee]"


def test_other_images_have_another_table() -> None:
    binary = document("b")
    binary["data"] = {**binary["data"], "binarise": "static"}
    comparison = Comparison([RunEvaluation("a", 0, 0, document("a")), RunEvaluation("b", 0, 1, binary)])
    assert [table["data"]["binarise"] for table in comparison.document()] == ["none", "static"]
    assert comparison.text().count("test of /data") == 2


def test_experiments_of_one_name_are_numbered() -> None:
    found = [RunEvaluation("run", 0, number, document(metrics={"ssim": summary(0.5)})) for number in (0, 1)]
    names = [experiment["name"] for experiment in Comparison(found).document()[0]["experiments"]]
    assert names == ["1: run", "2: run"]
    numbered = [RunEvaluation(f"vq-{seed}", seed, 0, document()) for seed in (0, 1)]
    assert Comparison(numbered).document()[0]["experiments"][0]["name"] == "vq (2 seeds)"


def test_baselines_stand_below() -> None:
    assert "black" in Comparison(entries(a=[0.5], b=[0.6])).text()


def test_samples_of_different_samplers_do_not_share_a_line() -> None:
    def drawn(latents_from: str) -> dict[str, Any]:
        return document(samples={"latents_from": latents_from, "metrics": {"this run": {"kid[x]": 0.1}}})

    assert "kid[x]" in {number.title for number in compared_numbers(drawn("the prior"))}
    assert "kid[x], gmm" in {
        number.title for number in compared_numbers(drawn("Gaussian mixture of 8 components"))
    }
