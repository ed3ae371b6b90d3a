"""What a variant is: the loss inside `forward`, three hooks around a step, and declared capabilities.

A variant is one file in this folder. Its name is the `kind` of the job file; it holds a `Config` (a
`settings.Strict` with a field `kind: Literal["<name>"]`) and a `Model`, a subclass of `Variant` below. A `Config`
that is to load without torch lies in `<name>_config.py`, and the variant's file imports it. Nothing else needs to know
of a variant: the loop, the commands, the launchers and the metrics ask for capabilities. `bases` has what variants
with a Gaussian latent and priors over codes share.

Scales. A batch carries uint8 images (B, C, H, W). Networks see and emit [-1, 1] (`to_network`). The likelihood
object alone owns the target's scale: it takes the uint8 image, and its `mean` and `sample` are in [0, 1].

Terms. `forward(batch, ctx)` returns named tensors of shape (B,): sums over pixels and latents, one number per
example, in the unit that `Model.units` declares. `loss` is what training minimises. A statistic of the whole
batch is a scalar (), or is added to every row of `loss`; the loop averages rows over the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.config.model_section import kind_module
from vaedist.config.settings import Strict
from vaedist.core.context import Batch, Context
from vaedist.core.errors import NotDefined


class Likelihood(Protocol):
    """p(x | z) of a batch of decoded latents."""

    evidence: ClassVar[Literal["discrete", "binary", "density", "surrogate"]]
    """What `log_prob` is: log-probability of the bytes, of black-and-white images (else a surrogate), or a density."""
    name: ClassVar[str]
    """As metrics.json writes it."""

    @property
    def mean(self) -> Tensor:
        """(B, C, H, W) in [0, 1]."""

    def log_prob(self, image: Tensor) -> Tensor:
        """(B,) nats for uint8 images (B, C, H, W), summed over pixels, in fp32 (fp64 for fp64 models)."""

    def sample(self, noise: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], from uniform noise on [0, 1) of the same shape."""


class Posterior(Protocol):
    """q(z | x) of a batch."""

    @property
    def mean(self) -> Tensor:
        """(B, D) or (B, D, h, w)."""

    def sample(self, noise: Tensor) -> Tensor:
        """A latent per row from standard normal noise of the shape of `mean`."""

    def kl(self) -> Tensor:
        """KL(q || prior) in nats per latent dimension, the shape of `mean`.

        Raises:
            NotDefined: the encoder is deterministic; so does `log_prob`.
        """

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats of latents of the shape of `mean`, summed over dimensions."""


class Prior(Protocol):
    """p(z), or p(z | y), of a batch."""

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats of latents, summed over dimensions."""

    def sample(self, noise: Tensor) -> Tensor:
        """A latent per row from standard normal noise of its shape."""


class Variant(nn.Module):
    """Base of every `Model`. Subclasses set the class attributes and implement `forward`."""

    phases: ClassVar[tuple[str, ...]] = ("main",)
    reads: ClassVar[Literal["images", "codes"]] = "images"
    """What a batch carries: `image`, or the `codes` that the frozen `tokenizer` gives to each image."""
    latent: Literal["vector", "map", "codes", "none"] = "none"
    latent_shape: tuple[int, ...] = ()
    """Of one sample: (D,), (D, h, w), or (h, w) for codes."""
    conditional: bool = False
    reconstructs: bool = False
    samples: bool = False
    batch_statistics: bool = False
    """True where the loss has a term over the global batch without an exact two-pass form: accumulation is refused."""
    units: ClassVar[Mapping[str, str]] = {"loss": "nats"}
    why_not: ClassVar[Mapping[str, str]] = {}
    """Operation to reason, for what is not defined: `{"sample": "..."}`."""

    sampling_options: ClassVar[frozenset[str]] = frozenset()
    """Further keyword arguments of `sample`, of `top_k`, `top_p`, `guidance`: what commands may offer."""

    compiled: ClassVar[tuple[str, ...]] = ("encoder", "decoder")
    """Attributes that `train.compile` compiles: the bodies, never `forward`."""

    adversarial_terms: ClassVar[frozenset[str]] = frozenset()
    """Terms that compare two networks instead of measuring the model: they cannot be monitored."""

    config: Strict
    spec: Spec

    def forward(self, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        """Terms of this phase; writes no persistent state (statistics go to `ctx.accumulate`)."""
        raise NotImplementedError

    def parameters_of(self, phase: str) -> Iterable[nn.Parameter]:
        """What this phase's optimizer trains."""
        assert phase in self.phases
        return self.parameters()

    def prepare(self, first_batches: Sequence[Batch], ctx: Context) -> None:
        """Once before step 1 of a new run, never on resume: k-means start, data variance. Under no_grad.

        `first_batches` are this process's rows of the first global batches; `ctx` holds noise for one of them.
        """

    prepare_batches: ClassVar[int] = 0
    """How many global batches `prepare` wants to see."""

    def after_step(self, ctx: Context) -> dict[str, Tensor]:
        """After an accepted step, under no_grad: apply its statistics (`ctx.total`, `ctx.collected`).

        The scalars returned are logged.
        """
        return {}

    @property
    def schedule_end(self) -> int:
        """The step from which every loss weight has its final value; best and early stopping wait for it."""
        return 0

    def averaged(self, name: str) -> bool:
        """Whether the weight average averages the parameter `name` (buffers are always copied)."""
        return True

    @property
    def uncompiled(self) -> Mapping[str, str]:
        """Body to the reason why `train.compile` leaves it as it is; logged at the start."""
        return {}

    def check_source(self, source: Strict, mapping: Mapping[str, str], where: str) -> None:
        """Refuse another run's weights that would fit in name and shape, but mean something else here.

        Args:
            source: That run's model settings.
            mapping: Its submodules to ours, as in `init_from.map`; empty: all of them.
            where: That run, for the message.

        Raises:
            UserError: saying what to change.
        """

    @property
    def pretrained(self) -> Mapping[str, str]:
        """Submodule to the run whose chosen weights it starts with and keeps (frozen), such as a tokenizer."""
        return {}

    def train(self, mode: bool = True) -> Variant:
        """As `torch.nn.Module.train`; pretrained submodules stay in evaluation mode."""
        super().train(mode)
        for name in self.pretrained:
            getattr(self, name).eval()
        return self

    def prior(self, label: Tensor | None = None) -> Prior:
        """p(z), or p(z | y) of (B,) labels, where `latent` is a vector or a map."""
        raise self.not_defined("prior")

    def encode(self, image: Tensor, label: Tensor | None = None) -> Posterior:
        """q(z | x) of uint8 images."""
        raise self.not_defined("encode")

    def decode(self, z: Tensor, label: Tensor | None = None) -> Likelihood:
        """p(x | z)."""
        raise self.not_defined("decode")

    def codes(self, image: Tensor) -> Tensor:
        """(B, h, w) int64 code of each latent position, where `latent == "codes"`."""
        raise self.not_defined("codes")

    num_codes: int = 0

    def decode_codes(self, codes: Tensor) -> Likelihood:
        """p(x | codes) of (B, *latent_shape) int64 codes, where `latent == "codes"`."""
        raise self.not_defined("decode_codes")

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C, H, W) in [0, 1] from uint8 images, without noise."""
        raise self.not_defined("reconstruct")

    def sample(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """n images (n, C, H, W) in [0, 1] from the prior; image i depends on (seed, first + i, its label) alone.

        Where the latent is a vector or a map, number i is the mean of `decode` at `prior(label).sample(temperature *
        noise)`, with standard normal noise of `latent_shape` from `generator("sample", seed, i)`: so commands know
        the latents of samples.

        Args:
            n: How many.
            seed: Of the noise.
            first: Number of the first one, so that many are drawn in parts.
            label: (n,) int64 class of each, where `conditional`; None: drawn evenly over the classes; -1: unknown,
                where labels were dropped in training.
            temperature: Spread around the prior's mean, or of the codes' distribution.
        """
        raise self.not_defined("sample")

    def sample_codes(
        self, n: int, *, seed: int = 0, first: int = 0, label: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """(n, *latent_shape) int64: the codes of the same call's `sample`, where `latent == "codes"`."""
        raise self.not_defined("sample")

    def not_defined(self, operation: str) -> NotDefined:
        kind = getattr(self.config, "kind", type(self).__module__.rpartition(".")[2])
        reason = self.why_not.get(operation, f"the variant {kind!r} has no such operation")
        return NotDefined(f"{operation} is not defined, because {reason}")

    def to_network(self, image: Tensor) -> Tensor:
        """uint8 [0, 255] to [-1, 1] in the model's floating type."""
        return image.to(next(self.parameters()).dtype) / 127.5 - 1


def build(config: Strict, spec: Spec, seed: int) -> Variant:
    """A variant with its initial weights, a function of (config, spec, seed) alone, in fp32 on the CPU.

    torch's layers draw their initial weights from the global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Variant = kind_module(config.kind).Model(config, spec)  # type: ignore[attr-defined]
    return model
