"""Base of priors over the codes of a frozen tokenizer: loss, labels and samples. A subclass adds the network.

    loss = -log p(c | y) = - sum_t log p(c_t | c_1 .. c_{t-1}, y),     c: an image's codes in raster order

in nats per image; `nats_per_token` is the same divided by the number of codes. The codes are those of a tokenizer
(a VQ-VAE, say) that is kept as it is (van den Oord et al., "Neural discrete representation learning", section
3.3): training reads them from code shards, and a sample is a map of codes that the tokenizer decodes.

With `conditional` the network gets the label. A part `label_dropout` of the labels is hidden in training, so
that the same network also models p(c) and samples can be guided: see `vaedist.nets.autoregressive`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaedist.config.job import Spec
from vaedist.core.context import Batch, Context, generator
from vaedist.core.errors import UserError
from vaedist.models.bases.code_prior_config import PriorConfig
from vaedist.models.bases.frozen_tokenizer import frozen_tokenizer
from vaedist.models.contract import Variant
from vaedist.nets.autoregressive import AutoregressiveNetwork, LogitSampler, generate
from vaedist.nets.conditioning import DROPPED, drop_labels
from vaedist.nets.dropout import sample_seeds

_MAPS_AT_ONCE = 32
"""Maps sampled at once: more are no faster on a CPU, and the caches grow."""


__all__ = ["CodePrior", "PriorConfig"]


class CodePrior(Variant):
    """Base of a `Model` that is a prior over codes: a subclass implements `network`.

    Raises:
        UserError: `conditional` on data without classes, or the tokenizer has not been read.
    """

    reads = "codes"
    latent = "codes"
    reconstructs = True
    samples = True
    units: ClassVar[Mapping[str, str]] = {"loss": "nats", "nats_per_token": "nats per code"}
    why_not: ClassVar[Mapping[str, str]] = {
        "encode": "the latent is a map of codes: see `codes`",
        "decode": "the latent is a map of codes: see `decode_codes`",
        "prior": "it is a distribution of codes, drawn one after the other: see `sample_codes`",
    }
    compiled: ClassVar[tuple[str, ...]] = ("net",)

    config: PriorConfig
    net: Any

    def __init__(self, config: PriorConfig, spec: Spec) -> None:
        super().__init__()
        if config.conditional and spec.classes < 1:
            raise UserError(
                "model.conditional is true, but these data carry no class: set model.conditional=false"
            )
        self.config, self.spec, self.conditional = config, spec, config.conditional
        tokenizer = frozen_tokenizer(config.tokenizer, spec)
        assert not isinstance(config.tokenizer, str)
        self.num_codes, self.latent_shape = config.tokenizer.codes, config.tokenizer.grid
        self.net = self.network(
            self.num_codes, config.tokenizer.grid, spec.classes + 1 if config.conditional else 0
        )
        self.tokenizer = tokenizer

    def network(self, codes: int, grid: tuple[int, int], labels: int) -> nn.Module:
        """An `AutoregressiveNetwork` of K codes; the last of its `labels`, if any, is "no label"."""
        raise NotImplementedError

    @property
    def pretrained(self) -> Mapping[str, str]:
        run = self.config.tokenizer
        return {"tokenizer": run if isinstance(run, str) else run.run}

    @property
    def sampling_options(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"top_k", "top_p"} | ({"guidance"} if self._unconditional_too else set()))

    @property
    def _unconditional_too(self) -> bool:
        return self.config.conditional and self.config.label_dropout > 0

    def averaged(self, name: str) -> bool:
        return not name.startswith("tokenizer.")

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        codes, label = batch["codes"], batch.get("label")
        if self.conditional and label is not None and ctx.training and self.config.label_dropout > 0:
            label = drop_labels(label, ctx.uniform("label", (len(codes),)), self.config.label_dropout)
        seeds = None
        if ctx.training and self.net.rate > 0:
            seeds = sample_seeds(ctx, len(codes)).to(codes.device)
        nats = self._nats(codes, self.net(codes, self._table_rows(label, len(codes)), seeds))
        return {"loss": nats, "nats_per_token": nats.detach() / math.prod(self.latent_shape)}

    def code_log_prob(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """(B,) nats, log p(codes | label) of (B, h, w) codes; without labels log p(codes)."""
        return -self._nats(codes, self.net(codes, self._table_rows(label, len(codes))))

    @staticmethod
    def _nats(codes: Tensor, logits: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return functional.cross_entropy(logits, codes, reduction="none").flatten(1).sum(1)

    def _table_rows(self, label: Tensor | None, rows: int) -> Tensor | None:
        """Rows of the network's label table, whose last one is "no label"; None where not conditional."""
        if not self.conditional:
            return None
        if label is None:
            label = torch.full((rows,), DROPPED, device=self._device)
        return torch.where(label == DROPPED, self.spec.classes, label)

    @property
    def _device(self) -> torch.device:
        return next(self.net.parameters()).device

    # The tokenizer's part

    def codes(self, image: Tensor) -> Tensor:
        return self.tokenizer.codes(image)

    def decode_codes(self, codes: Tensor) -> Any:
        """p(x | codes) of (B, h, w) int64 codes."""
        return self.tokenizer.decode_codes(codes)

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        return self.tokenizer.reconstruct(image, label)

    # Samples

    @torch.no_grad()
    def sample(self, n: int, **options: Any) -> Tensor:
        """As the contract says, with the options of `sample_codes`: the tokenizer's mean image of each of its maps."""
        codes = self.sample_codes(n, **options)
        return torch.cat([self.decode_codes(part).mean for part in codes.split(_MAPS_AT_ONCE)])

    @torch.no_grad()
    def sample_codes(
        self,
        n: int,
        *,
        seed: int = 0,
        first: int = 0,
        label: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """(n, h, w) int64 codes; map i depends on (seed, first + i, its label) and the options alone.

        Args:
            n, seed, first: As for `sample`.
            label: (n,) classes, -1 for none; default: each drawn evenly from the classes, where conditional.
            temperature: Divides the logits; 0: always the most probable code.
            top_k: How many codes stay in each draw.
            top_p: Which probability stays in each draw.
            guidance: g of the extrapolation from hidden to given label; 1 or None: none.

        Raises:
            UserError: an option that means nothing, a class that is not there, or guidance without hidden labels.
        """
        sampler = LogitSampler(temperature, top_k, top_p)
        sampler.check()
        guidance = self._guidance(guidance)
        generators = [generator("sample", seed, number) for number in range(first, first + n)]
        # In fp32: numbers of 24 bits are below 1 by more than fp64 rounds.
        positions = math.prod(self.latent_shape)
        uniform = torch.stack([torch.rand(positions, generator=draws) for draws in generators])
        if self.conditional and label is None:
            label = torch.stack(
                [torch.randint(self.spec.classes, (), generator=draws) for draws in generators]
            )
        elif self.conditional and label is not None:
            self._check_labels(label)
        network: AutoregressiveNetwork = self.net
        maps = []
        for start in range(0, n, _MAPS_AT_ONCE):
            noise = uniform[start : start + _MAPS_AT_ONCE].to(self._device)
            part = None if label is None else label[start : start + _MAPS_AT_ONCE].to(self._device)
            labels = self._table_rows(part, len(noise))
            if guidance is not None:
                assert labels is not None
                labels = torch.cat([labels, torch.full_like(labels, self.spec.classes)])
            state = network.start_sampling(len(noise) if guidance is None else 2 * len(noise), labels)
            maps.append(generate(state, noise, sampler, guidance))
        return torch.cat(maps).unflatten(1, self.latent_shape)

    def _guidance(self, guidance: float | None) -> float | None:
        """None where it changes nothing."""
        if guidance is None or guidance == 1:
            return None
        if not math.isfinite(guidance):
            raise UserError(f"guidance is {guidance}; give a number (1: none)")
        if not self._unconditional_too:
            raise UserError(
                f"guidance is {guidance}, but this prior never saw a hidden label: train it with "
                "model.conditional=true and model.label_dropout above 0"
            )
        return guidance

    def _check_labels(self, label: Tensor) -> None:
        wrong = label[(label < DROPPED) | (label >= self.spec.classes)]
        if len(wrong):
            raise UserError(
                f"there is no class {int(wrong[0])}: the model knows 0 to {self.spec.classes - 1}"
            )
        if (label == DROPPED).any() and not self._unconditional_too:
            raise UserError(
                "this prior saw the label of every training image: name a class, or train with "
                "model.label_dropout above 0"
            )
