"""Class-conditional networks: how a label becomes a vector, and how that vector enters a body.

A label y in 0 .. K - 1 becomes a code c(y), (size,): a learned vector (`embedding`) or the K-vector that is 1 at y
(`one_hot`), times `factor`. The code of a dropped label, `DROPPED`, is 0, so that one model works with and without
labels: training drops each label with probability `dropout` (as in Ho and Salimans, "Classifier-free diffusion
guidance", section 3.2).

| how | what a body does with c |
|---|---|
| `concat` | c is appended to the input: as further channels, constant over the image, or as further values |
| `film` | channel j becomes (1 + a_j(c)) x_j + b_j(c), a, b linear, initially 0: after each block but the last, and |
| | at a vector input too, because a channel of a map has one factor for the whole image |

Sohn et al., "Learning structured output representation using deep conditional generative models" (the CVAE); Perez et
al., "FiLM: visual reasoning with a general conditioning layer", equation 1.

The prior is N(0, 1) for every label (`standard`), or N(m_y, diag s_y^2) with learned m and s (`per_class`), which is
N(0, 1) for a dropped label.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from vaedist.config.job import Spec
from vaedist.core.errors import UserError
from vaedist.nets.conditioning_config import Condition
from vaedist.nets.divergences import DiagonalGaussian

DROPPED = -1
"""The label of a sample whose class is not given."""


class LabelEmbedding(nn.Module):
    """Labels (B,) int64 to codes (B, size).

    Args:
        condition: Its settings.
        spec: Of the data, which must have classes.

    Raises:
        UserError: the data have no classes.
    """

    def __init__(self, condition: Condition, spec: Spec) -> None:
        super().__init__()
        if not spec.classes:
            raise UserError(
                "model.condition needs classes, and these data carry no labels: pack a folder with one folder per "
                "class, or remove model.condition"
            )
        self.classes, self.factor, self.may_drop = spec.classes, condition.factor, condition.dropout > 0
        self.size = condition.size or 16 if condition.label == "embedding" else spec.classes
        if condition.label == "embedding":
            self.embedding = nn.Embedding(spec.classes, self.size)
        else:
            self.register_buffer("embedding", None)

    def forward(self, label: Tensor) -> Tensor:
        index = label.clamp_min(0)
        if self.embedding is not None:
            code: Tensor = self.embedding(index)
        else:
            code = nn.functional.one_hot(index, self.classes).to(torch.get_default_dtype())
        return self.factor * code * (label != DROPPED)[:, None]

    def resolve(self, label: Tensor | None, rows: int, device: torch.device) -> Tensor:
        """`label`, or for None (rows,) dropped labels.

        Raises:
            UserError: None, but the model was not trained with dropped labels.
        """
        if label is not None:
            return label
        self._require_label_dropout()
        return torch.full((rows,), DROPPED, device=device)

    def check(self, label: Tensor) -> Tensor:
        """`label`, checked, which synchronizes with the device.

        Raises:
            UserError: not a class of the data, or dropped and the model was not trained with dropped labels.
        """
        if torch.compiler.is_compiling():
            return label  # a traced label has no values: the caller of an exported program has to check them
        wrong = label[(label < DROPPED) | (label >= self.classes)]
        if len(wrong):
            raise UserError(f"there is no class {int(wrong[0])}: the model knows 0 to {self.classes - 1}")
        if (label == DROPPED).any():
            self._require_label_dropout()
        return label

    def _require_label_dropout(self) -> None:
        if not self.may_drop:
            raise UserError(
                "this model saw the label of every training image: name a class, or train with "
                "model.condition.dropout above 0"
            )


class Concat(nn.Sequential):
    """A body with the code appended to its input."""

    def forward(self, x: Tensor, code: Tensor) -> Tensor:  # type: ignore[override]
        code = code.to(x.dtype)
        if x.dim() == 2 or isinstance(self[0], nn.Flatten):
            x = x.flatten(1)
        else:
            code = code[:, :, None, None].expand(-1, -1, *x.shape[2:])
        x = torch.cat([x, code], 1)
        for block in self:
            x = block(x)
        return x


class Film(nn.Sequential):
    """A body whose vector input and whose blocks, all but the last, are scaled and shifted by the code.

    Args:
        blocks: The body; its blocks keep their names.
        size: Numbers in a code.
        shape: Of one input, without the batch axis.
    """

    film: nn.ModuleDict

    def __init__(self, blocks: nn.Sequential, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.names = [name for name, _ in blocks.named_children()]
        trained = [name for name, block in blocks.named_children() if any(True for _ in block.parameters())]
        film = nn.ModuleDict()
        with torch.no_grad():
            x = torch.zeros(1, *shape)
            if len(shape) == 1:
                film["input"] = _modulation(size, shape[0])
            for name, block in blocks.named_children():
                self.add_module(name, block)
                x = block(x)
                if name in trained[:-1]:
                    film[name] = _modulation(size, x.shape[1])
        self.add_module("film", film)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:  # type: ignore[override]
        x = self._modulated("input", x, code)
        for name in self.names:
            x = self._modulated(name, getattr(self, name)(x), code)
        return x

    def _modulated(self, name: str, x: Tensor, code: Tensor) -> Tensor:
        if name not in self.film:
            return x
        scale, shift = self.film[name](code.to(x.dtype)).chunk(2, dim=1)
        if x.dim() == 4:
            scale, shift = scale[:, :, None, None], shift[:, :, None, None]
        return x * (1 + scale) + shift


def _modulation(size: int, channels: int) -> nn.Linear:
    """From codes to a and b, which are 0 at first."""
    layer = nn.Linear(size, 2 * channels)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conditioned(
    body: nn.Sequential, condition: Condition | None, size: int, shape: tuple[int, ...]
) -> nn.Sequential:
    """The body as a network `body(x, code)`; without a condition the body itself.

    Args:
        body: For `concat` built with `extra` = `size`.
        condition: Its settings.
        size: Numbers in a code.
        shape: Of one input, without the code and the batch axis.
    """
    if condition is None:
        return body
    if condition.how == "film":
        return Film(body, size, shape)
    return Concat(OrderedDict(body.named_children()))


class ClassPrior(nn.Module):
    """p(z | y) = N(m_y, diag s_y^2) with learned m and s of each class; N(0, 1) for a dropped label.

    Args:
        classes: K.
        shape: Of one latent.
    """

    def __init__(self, classes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, *shape))
        self.log_variance = nn.Parameter(torch.zeros(classes, *shape))

    def forward(self, label: Tensor) -> DiagonalGaussian:
        """Priors of (B,) labels, a row each."""
        index, known = label.clamp_min(0), (label != DROPPED).to(self.mean.dtype)
        known = known.view(-1, *[1] * (self.mean.dim() - 1))
        return DiagonalGaussian(self.mean[index] * known, self.log_variance[index] * known)


def drop_labels(label: Tensor, uniform: Tensor, share: float) -> Tensor:
    """Labels with each one dropped where its uniform number in [0, 1) is below `share`."""
    return torch.where(uniform.to(label.device) < share, DROPPED, label)
