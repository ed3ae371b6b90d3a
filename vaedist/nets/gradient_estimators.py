"""How a gradient passes from a code vector q to the vector z that it stands for, and where both lie.

`straight_through`: dq/dz = 1, whatever lies between z and q. van den Oord et al., "Neural discrete representation
learning".

`rotation`: q is written as c R z, where R is the rotation that turns z's direction into q's and c = |q| / |z|; both are
held constant. The angle between gradient and vector is then the same before and after, so vectors on two sides of
a code are pushed in different directions. With e and u the unit vectors of z and q, and r = (e + u) / |e + u|,

    R z = z - 2 r (r . z) + 2 u (e . z)

Fifty et al., "Restructuring vector quantization with the rotation trick".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaedist.nets.quantizers_config import Estimator


def project_to_sphere(vectors: Tensor, dim: int) -> Tensor:
    """Vectors along `dim` at length sqrt(D); one of length 0 stays."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors * (math.sqrt(vectors.shape[dim]) / length.clamp_min(torch.finfo(vectors.dtype).eps))


def apply_estimator(z: Tensor, q: Tensor, estimator: Estimator) -> Tensor:
    """q (B, D, h, w), with a gradient to z: see the module."""
    if estimator == "straight_through":
        return z + (q - z).detach()
    smallest = torch.finfo(z.dtype).eps
    with torch.no_grad():
        z_length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        q_length = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        e, u = z / z_length.clamp_min(smallest), q / q_length.clamp_min(smallest)
        r = e + u
        r_length = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        # No direction to turn from or to, or half a turn, which has no plane: straight through.
        turns = torch.minimum(torch.minimum(z_length, q_length), r_length) > math.sqrt(smallest)
        r, stretch = r / r_length.clamp_min(smallest), q_length / z_length.clamp_min(smallest)
    turned = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * u * (e * z).sum(1, keepdim=True)
    turned = torch.where(turns, stretch * turned, z)
    return turned + (q - turned).detach()
