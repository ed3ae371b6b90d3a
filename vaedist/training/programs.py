"""Encoder and decoder as programs that need torch and nothing else, checked against the run's own numbers.

| program | from | to |
|---|---|---|
| `encoder.pt2` | `image` uint8 (n, C, H, W) | the posterior's mean (n, *latent), or int64 codes (n, h, w) |
| `decoder.pt2` | `latent` as the encoder gives it | images (n, C, H, W) in [0, 1] |

A model that is told the class takes `label`, int64 (n,), too. n is free. What a variant cannot do is left out.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vaedist.errors import NotDefined, UserError
from vaedist.models.contract import Variant

_ROWS = (1, 3)
"""Sizes of batches on which a program must agree with the model."""


class _Encoder(nn.Module):
    def __init__(self, model: Variant) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        if self.model.latent == "codes":
            return self.model.codes(image)
        return self.model.encode(image, label).mean


class _Decoder(nn.Module):
    def __init__(self, model: Variant) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        if self.model.latent == "codes":
            return self.model.decode_codes(latent).mean
        return self.model.decode(latent, label).mean


@torch.no_grad()
def write_programs(model: Variant, shape: tuple[int, int, int], folder: Path) -> dict[str, str]:
    """Write the programs that there are; for each name of a file that there is not, the reason.

    Args:
        model: In evaluation mode, on the CPU.
        shape: (C, H, W) of an image.
        folder: Where they go.

    Raises:
        UserError: a program does not compute what the model does.
    """
    numbers = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (max(_ROWS), *shape), generator=numbers, dtype=torch.uint8)
    label = {"label": torch.zeros(max(_ROWS), dtype=torch.int64)} if _is_told(model) else {}
    missing: dict[str, str] = {}
    encoder, decoder = _Encoder(model).eval(), _Decoder(model).eval()
    try:
        latent = encoder(image, **label)
        _write(encoder, {"image": image, **label}, folder / "encoder.pt2")
    except NotDefined as reason:
        missing["encoder.pt2"] = str(reason)
        weight = next(model.parameters())
        latent = torch.randn(max(_ROWS), *model.latent_shape, generator=numbers).to(weight.dtype)
    try:
        decoder(latent, **label)
        _write(decoder, {"latent": latent, **label}, folder / "decoder.pt2")
    except NotDefined as reason:
        missing["decoder.pt2"] = str(reason)
    return missing


def _is_told(model: Variant) -> bool:
    """Whether encoder and decoder take the class; what makes and reads codes does not."""
    return model.conditional and model.latent != "codes"


def _write(part: nn.Module, inputs: dict[str, Tensor], path: Path) -> None:
    rows = torch.export.Dim("n", min=1, max=1 << 20)
    with _quiet():
        program = torch.export.export(
            part, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs}, strict=False
        )
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names files of this machine
        torch.export.save(program, path)
        read = torch.export.load(path).module()
    for count in _ROWS:
        few = {name: value[:count] for name, value in inputs.items()}
        ours, theirs = part(**few), read(**few)
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5):
            furthest = float((ours.double() - theirs.double()).abs().max())
            raise UserError(
                f"{path.name} differs from the model by up to {furthest:.3g}: leave the programs out (--no-programs)"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(model: Variant, shape: tuple[int, int, int]) -> str:
    """Lines of Python that use the programs."""
    size = ", ".join(str(axis) for axis in shape)
    label = ", label=torch.zeros(4, dtype=torch.int64)" if _is_told(model) else ""
    return "\n".join(
        [
            "import torch",
            "",
            'encoder = torch.export.load("encoder.pt2").module()',
            'decoder = torch.export.load("decoder.pt2").module()',
            f"images = torch.randint(0, 256, (4, {size}), dtype=torch.uint8)",
            f"latent = encoder(image=images{label})",
            f"again = decoder(latent=latent{label})  # from 0 to 1",
        ]
    )
