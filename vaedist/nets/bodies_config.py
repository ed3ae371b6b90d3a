"""Settings of `vaedist.nets.bodies`, importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from vaedist.config.settings import LIST, NUMBER, Strict, number_or_list

Upsample = Literal["transpose", "resize", "shuffle"]
Activation = Literal["silu", "relu", "leaky_relu", "tanh"]


class Mlp(Strict):
    """A fully connected body."""

    kind: Literal["mlp"] = "mlp"
    width: int = Field(512, ge=1, description="Units of each hidden layer.")
    depth: int = Field(2, ge=1, description="Hidden layers.")
    grid: int = Field(1, ge=1, description="Side of the latent map that it emits; 1 for a vector.")
    activation: Activation = "silu"
    black: Literal[-1, 0] = Field(
        -1,
        description="What an encoder sees where a pixel is black; white is 1. With 0 it moves no weight: so published "
        "networks for MNIST were trained.",
    )


class GridBody(Strict):
    width: Annotated[
        Annotated[Annotated[int, Field(ge=1)], Tag(NUMBER)]
        | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Tag(LIST)],
        number_or_list(),
    ] = Field(
        64,
        description="Channels at the coarsest grid; finer grids have half, at least 16. A list: of each grid size, "
        "finest first.",
    )
    depth: int = Field(2, ge=0, description="Blocks at each grid size.")
    downsample: int = Field(4, ge=1, description="Image side / latent side; a power of two.")
    patch: int = Field(
        1, ge=1, description="The part of `downsample` that is space-to-depth; a power of two."
    )
    upsample: Upsample = "transpose"
    norm: Literal["group", "none"] = "group"
    activation: Activation = "silu"
    dense: int | None = Field(
        None,
        ge=1,
        description="Units of a layer between the coarsest grid and a latent vector; none: no layer.",
    )

    @model_validator(mode="after")
    def _powers_of_two(self) -> GridBody:
        for name in ("downsample", "patch"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two (it is {value})")
        if self.patch > self.downsample:
            raise ValueError(f"patch ({self.patch}) is a part of downsample ({self.downsample}), not more")
        sizes = (self.downsample // self.patch).bit_length()
        if isinstance(self.width, tuple) and len(self.width) != sizes:
            raise ValueError(
                f"width lists {len(self.width)} grid sizes, and downsample / patch = {self.downsample // self.patch} "
                f"makes {sizes}: list as many, finest first"
            )
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each grid size, finest first."""
        if isinstance(self.width, tuple):
            return self.width
        levels = (self.downsample // self.patch).bit_length() - 1
        return tuple(min(self.width, max(16, self.width >> level)) for level in reversed(range(levels + 1)))


class Conv(GridBody):
    """Plain strided convolutions."""

    kind: Literal["conv"] = "conv"


class Resnet(GridBody):
    """Residual blocks."""

    kind: Literal["resnet"] = "resnet"


Body = Annotated[Mlp | Conv | Resnet, Field(discriminator="kind")]
