"""Gradient estimators for quantization: how the gradient of a code vector q reaches the vector z that q replaces.

`straight_through`: dq/dz = 1, whatever z and q are. van den Oord et al., "Neural discrete representation learning".

`rotation`: q is written as c R z, where R is the rotation from z's direction to q's and c = |q| / |z|; both are held
constant. The angle between gradient and vector is then the same at z as at q, so vectors on two sides of a code are
pushed in different directions. With e and u the unit vectors of z and q, and r = (e + u) / |e + u|,

    R z = z - 2 r (r . z) + 2 u (e . z)

Fifty et al., "Restructuring vector quantization with the rotation trick".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaedist.nets.quantizers_config import Estimator


def project_to_sphere(vectors: Tensor, dim: int) -> Tensor:
    """Vectors along `dim` scaled to length sqrt(D); one of length 0 stays 0."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors * (math.sqrt(vectors.shape[dim]) / length.clamp_min(torch.finfo(vectors.dtype).eps))


def apply_estimator(z: Tensor, q: Tensor, estimator: Estimator) -> Tensor:
    """q (B, D, h, w), with a gradient to z by the estimator: see the module."""
    if estimator == "straight_through":
        return z + (q - z).detach()
    eps = torch.finfo(z.dtype).eps
    with torch.no_grad():
        z_length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        q_length = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        e, u = z / z_length.clamp_min(eps), q / q_length.clamp_min(eps)
        r = e + u
        r_length = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        # Straight through where a vector has no direction, or where they are opposite: half a turn has no plane.
        has_rotation = torch.minimum(torch.minimum(z_length, q_length), r_length) > math.sqrt(eps)
        r, stretch = r / r_length.clamp_min(eps), q_length / z_length.clamp_min(eps)
    rotated = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * u * (e * z).sum(1, keepdim=True)
    rotated = torch.where(has_rotation, stretch * rotated, z)
    return rotated + (q - rotated).detach()
