"""An evaluation as text: the lines that `vaedist-evaluate` prints, from the JSON document that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vaedist.evaluation.metrics.tables import columns, metrics_table, sample_rows, terms_table

SHOWN_GROUPS = 40
_SATURATED = 0.95

PARTS = ("likelihood", "latents", "prior", "samples")
"""Parts of an evaluation that a model may not have; their reasons speak of the operation that they need."""

NATS = {
    "discrete": "NLL",
    "binary": "NLL, black and white",
    "dequantised": "NLL, dequantised",
    "surrogate": "surrogate",
}


def format_report(document: Mapping[str, Any]) -> str:
    """The whole text, without a line end."""
    optional = {
        "likelihood": _likelihood,
        "latents": _latents,
        "codes": _codes,
        "prior": _prior,
        "samples": _samples,
        "audit": _audit,
    }
    parts = [_head(document), _reconstructions(document), _terms(document)]
    parts += [part(document[name]) for name, part in optional.items() if document.get(name) is not None]
    parts += [_groups(document), _not_defined(document)]
    return "\n\n".join(text for lines in parts if (text := "\n".join(lines)))


def _head(document: Mapping[str, Any]) -> Iterator[str]:
    data, images = document["data"], document["images"]
    shape = "x".join(str(size) for size in data["shape"])
    part = "" if images == data["split_images"] else f" of {data['split_images']}"
    yield f"run    {document['run']}: {document['kind']}, step {document['step']}, {document['weights']} weights"
    yield f"data   {data['path']}: {data['split']}, {images}{part} images of {shape}"
    if data["other_data"]:
        yield "note   these are not the data that the run was trained from (--other-data)"
    if document["collapse"]:
        yield f"ALARM  {document['collapse']['told']}"


def _reconstructions(document: Mapping[str, Any]) -> Iterator[str]:
    images = document["images"]
    rows = {"this run": (images, document["metrics"])}
    rows |= {name: (images, metrics) for name, metrics in document["baselines"].items()}
    if any(metrics for _, metrics in rows.values()):
        yield "mean ±spread (standard deviation over images); foreground: where the original is > 0"
        yield metrics_table(rows)


def _terms(document: Mapping[str, Any]) -> Iterator[str]:
    yield terms_table(document["terms"], document["units"], document["images"])
    for name, value in document["batch_terms"].items():
        yield f"{name} {value:.6g} (a statistic of whole batches: depends on their size)"


def _likelihood(found: Mapping[str, Any]) -> Iterator[str]:
    rounds = found["rounds"]
    yield (
        f"{NATS[found['name']]} {found['nll']['mean']:.2f} nats per image by {found['importance_samples']} importance "
        f"samples: {found['meaning']}"
    )
    if rounds["count"] > 1:
        yield f"over {rounds['count']} rounds of draws {rounds['mean']:.3f} ±{rounds['std']:.3f}"
    yield (
        f"ELBO by the same draws {found['elbo']['mean']:.2f}; effective samples "
        f"{found['effective_samples']['mean']:.1f} of {found['importance_samples']}"
    )
    if found["bits_per_dim"] is not None:
        yield f"bits/dim {found['bits_per_dim']['mean']:.4f}"


def _latents(found: Mapping[str, Any]) -> Iterator[str]:
    shape = "x".join(str(size) for size in found["shape"])
    yield f"latent {shape}: {found['active_units']} of {found['units']} units active"
    line = (
        f"aggregate posterior, in units of the prior: mean {found['mean_rms']:.3f} (root mean square over dimensions), "
        f"std {found['std_mean']:.3f} ({found['std_smallest']:.3f} to {found['std_largest']:.3f})"
    )
    if "correlation_largest" in found:
        line += f", largest correlation {found['correlation_largest']:.3f}"
    yield line
    if "mmd" in found:
        yield (
            f"MMD to the prior {found['mmd']:.4g} (two sets of prior draws: ±{found['mmd_prior_spread']:.2g}), "
            f"{found['mmd_draws']} draws each"
        )
    if "split" in found:
        split = found["split"]
        limit = split["mutual_information_limit"]
        yield (
            f"rate {split['rate']:.3f} nats = mutual information {split['mutual_information']:.3f} + total correlation "
            f"{split['total_correlation']:.3f} + dimension-wise KL {split['dimension_wise_kl']:.3f}; KL(q(z)||p(z)) "
            f"{split['marginal_kl']:.3f}"
        )
        if split["mutual_information"] > _SATURATED * limit:
            yield (
                f"note: {split['images']} images show at most log {split['images']} = {limit:.3f} nats of mutual "
                "information; the true value may be larger, and KL(q(z)||p(z)) smaller"
            )


def _codes(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"codes used {found['used']} of {found['codes']} ({100 * found['used_share']:.1f} %), perplexity "
        f"{found['perplexity']:.1f}, over {found['vectors']} vectors"
    )


def _prior(found: Mapping[str, Any]) -> Iterator[str]:
    rows = {"this run" if name == "prior" else name: value for name, value in found["nats_per_token"].items()}
    cells = [[name, f"{value['mean']:.4f} ±{value['std']:.4f}"] for name, value in rows.items()]
    yield columns([["nats per token", "mean ±spread"], *cells])
    size = f"{found['images']} images of {found['tokens']} codes"
    yield f"counts fitted on the training codes, Witten-Bell smoothed; {size}"
    if found["bits_per_dim"] is not None:
        yield (
            f"image: codes + decoder {found['nll']['mean']:.2f} nats, bits/dim {found['bits_per_dim']['mean']:.4f}: "
            f"{found['meaning']}"
        )


def _samples(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['generated']} samples from {found['latents_from']} against {found['real']} real images of the split"
    yield columns(sample_rows(found["metrics"]))


def _audit(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"memorisation {found['verdict']}"
    lines = [["samples nearer to training than 99 % of held-out", "share", "95 %", "chance below"]]

    def add(title: str, share: float, interval: Sequence[float], limit: float) -> None:
        low, high = interval
        lines.append([title, f"{share:.1%}", f"{low:.1%} to {high:.1%}", f"{limit:.1%}"])

    for name, space in found["spaces"].items():
        for title, part in {name: space["close"], f"{name}, to one patient": space["close_to_one"]}.items():
            if part is not None:
                add(title, part["share"], part["interval"], part["limit"])
        patients = space["whole_patients"]
        if patients is not None:
            shares = [part["share"] for part in patients["parts"]]
            title = f"{name}, than of {len(shares)} parts of training patients"
            add(title, patients["mean"], (min(shares), max(shares)), patients["limit"])
    yield columns(lines)


def _groups(document: Mapping[str, Any]) -> Iterator[str]:
    for number, (name, groups) in enumerate(document["groups"].items() if document["metrics"] else ()):
        if number:
            yield ""
        if len(groups) > SHOWN_GROUPS:
            yield f"per {name}: {len(groups)} groups, in metrics.json"
        else:
            rows = {group: (values["images"], values["metrics"]) for group, values in groups.items()}
            yield metrics_table(rows, f"per {name}", spread=False)


def _not_defined(document: Mapping[str, Any]) -> Iterator[str]:
    """Each reason once, after the names of the parts that it explains."""
    named: dict[str, list[str]] = {}
    for name, reason in document["not_defined"].items():
        named.setdefault(reason, []).append(name)
    for reason, names in named.items():
        parts = [name for name in names if name in PARTS]
        yield f"{', '.join(parts)}: {reason}" if parts else reason
