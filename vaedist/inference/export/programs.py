"""Encoder and decoder as programs that need torch and nothing else, checked against the run's own numbers.

| program | from | to |
|---|---|---|
| `encoder.pt2` | `image` uint8 (n, C, H, W) | the posterior's mean (n, *latent), or int64 codes (n, h, w) |
| `decoder.pt2` | `latent` as the encoder gives it | images (n, C, H, W) in [0, 1] |

A conditional model takes `label`, int64 (n,), too. n is free. Operations that a variant does not define are left out.

`encoder.onnx` and `decoder.onnx` are the same programs for other runtimes (https://onnx.ai), made of torch.export's
graph by torch.onnx and checked by running them in ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vaedist.core.errors import NotDefined, UserError
from vaedist.models.contract import Variant

_ROWS = (1, 3)
"""Sizes of batches on which a program must agree with the model."""
PROGRAMS_NEED = "2.8"
"""Version of torch: 2.6 cannot store these programs, or not read what it stored."""
ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
"""Libraries that only ONNX files need."""


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


def check_programs(*, onnx: bool) -> None:
    """Whether programs can be written and checked here.

    Args:
        onnx: As ONNX too.

    Raises:
        UserError: torch is too old, or a library is missing.
    """
    if torch.__version__ < PROGRAMS_NEED:
        raise UserError(
            f"programs need torch {PROGRAMS_NEED} or newer, and this is {torch.__version__}: give --no-programs"
        )
    if onnx and (absent := [name for name in ONNX_NEEDS if importlib.util.find_spec(name) is None]):
        raise UserError(
            f"--onnx needs {', '.join(ONNX_NEEDS)}, and {', '.join(absent)} cannot be found: "
            f"pip install {' '.join(absent)} (or vaedist[onnx])"
        )


@torch.no_grad()
def write_programs(
    model: Variant, shape: tuple[int, ...], folder: Path, *, onnx: bool = False
) -> dict[str, str]:
    """Write the programs that the variant defines; by file name, the reason for each that it does not.

    Args:
        model: In evaluation mode, on the CPU.
        shape: (C, H, W) of an image.
        folder: Where they go.
        onnx: Also as ONNX.

    Raises:
        UserError: a program does not compute what the model does, or cannot be expressed in ONNX.
    """
    numbers = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (max(_ROWS), *shape), generator=numbers, dtype=torch.uint8)
    label = {"label": torch.zeros(max(_ROWS), dtype=torch.int64)} if _takes_label(model) else {}
    missing: dict[str, str] = {}
    suffixes = (".pt2", ".onnx") if onnx else (".pt2",)
    encoder, decoder = _Encoder(model).eval(), _Decoder(model).eval()
    try:
        latent = encoder(image, **label)
        _write(encoder, {"image": image, **label}, folder / "encoder", "latent", onnx=onnx)
    except NotDefined as reason:
        missing |= {f"encoder{suffix}": str(reason) for suffix in suffixes}
        weight = next(model.parameters())
        latent = torch.randn(max(_ROWS), *model.latent_shape, generator=numbers).to(weight.dtype)
    try:
        decoder(latent, **label)
        _write(decoder, {"latent": latent, **label}, folder / "decoder", "image", onnx=onnx)
    except NotDefined as reason:
        missing |= {f"decoder{suffix}": str(reason) for suffix in suffixes}
    return missing


def _takes_label(model: Variant) -> bool:
    """Whether encoder and decoder take the class; what makes and reads codes does not."""
    return model.conditional and model.latent != "codes"


def _write(part: nn.Module, inputs: dict[str, Tensor], path: Path, output: str, *, onnx: bool) -> None:
    """`path` has no suffix yet; `output` names what comes out, for ONNX."""
    rows = torch.export.Dim("n", min=1, max=1 << 20)
    native = path.with_suffix(".pt2")
    try:
        with _quiet():
            program = torch.export.export(
                part, (), inputs, dynamic_shapes={name: {0: rows} for name in inputs}, strict=False
            )
            for graph in program.graph_module.modules():
                for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # names files of this machine
            torch.export.save(program, native)
            read = torch.export.load(native).module()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{native.name}: torch {torch.__version__} cannot write this program ({reason:.200}): install a newer "
            "torch, or give --no-programs"
        ) from None
    _check_agreement(part, read, inputs, native, "--no-programs")
    if onnx:
        _check_agreement(
            part, _onnx(program, inputs, path.with_suffix(".onnx"), output), inputs, path.with_suffix(".onnx")
        )


def _onnx(
    program: torch.export.ExportedProgram, inputs: dict[str, Tensor], path: Path, output: str
) -> Callable[..., Tensor]:
    """Write the program as ONNX; a function that runs the file in ONNX Runtime."""
    import onnxruntime

    try:
        with _quiet():
            exported = torch.onnx.export(
                program, kwargs=inputs, dynamo=True, output_names=[output], verbose=False
            )
            assert exported is not None, "torch returns what it is given no file for"
            exported.save(path)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path.name}: torch cannot express this model in ONNX ({reason}): leave --onnx out"
        ) from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(**few: Tensor) -> Tensor:
        (output_array,) = session.run([output], {name: value.numpy() for name, value in few.items()})
        return torch.as_tensor(output_array)

    return run


def _check_agreement(
    part: nn.Module,
    program: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    path: Path,
    without: str = "--onnx",
) -> None:
    for count in _ROWS:
        few = {name: value[:count] for name, value in inputs.items()}
        ours, theirs = part(**few), program(**few)
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5):
            furthest = float((ours.double() - theirs.double()).abs().max())
            cure = "give" if without.startswith("--no") else "leave out"
            raise UserError(f"{path.name} differs from the model by up to {furthest:.3g}: {cure} {without}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch.export and torch.onnx about their own code."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def usage_example(model: Variant, shape: tuple[int, ...]) -> str:
    """Lines of Python that use the programs."""
    size = ", ".join(str(axis) for axis in shape)
    label = ", label=torch.zeros(4, dtype=torch.int64)" if _takes_label(model) else ""
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
