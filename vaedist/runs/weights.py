"""The weights in a saved state: which ones are chosen, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vaedist.core.errors import UserError


def chosen_weights(state: Mapping[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """The weights of a saved state: `ema` or `raw`; default: the ones its job says everything downstream uses."""
    chosen = weights or state["job"]["train"]["weights"]
    if chosen == "raw":
        if state["model"] is None:
            raise UserError("only the averaged weights were exported: ask for these (ema)")
        return state["model"]
    if state["ema"] is None:
        raise UserError(
            "these weights were not averaged (train.ema_half_life is not set): ask for the raw ones"
        )
    return state["ema"]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 of weights by name, shape and value: 64 hex digits, the same in fp64 as in the fp32 they were cast to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        held = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name}\0{tuple(held.shape)}\0".encode())
        digest.update(held.contiguous().numpy().tobytes())
    return digest.hexdigest()
