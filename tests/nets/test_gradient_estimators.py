"""How gradients pass a code: straight through, or turned and stretched with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaedist.core.context import generator
from vaedist.nets.gradient_estimators import apply_estimator, project_to_sphere


def normal(*shape: int, name: object = 0) -> Tensor:
    return torch.randn(shape, generator=generator("passing", name, shape), dtype=torch.float64)


def turning(z: Tensor, q: Tensor) -> Tensor:
    """(D, D) matrix of |q| / |z| times the rotation in the plane of z and q, from its angle and two axes."""
    e, u = z / z.norm(), q / q.norm()
    cosine = e @ u
    side = u - cosine * e
    sine, side = side.norm(), side / side.norm()
    plane = torch.outer(e, e) + torch.outer(side, side)
    turn = cosine * plane + sine * (torch.outer(side, e) - torch.outer(e, side))
    return (torch.eye(len(z), dtype=z.dtype) - plane + turn) * q.norm() / z.norm()


def test_both_emit_the_code_vectors() -> None:
    z, q = normal(4, 5, 3, 2), normal(4, 5, 3, 2, name=1)
    for estimator in ("straight_through", "rotation"):
        torch.testing.assert_close(apply_estimator(z, q, estimator), q, rtol=1e-14, atol=1e-14)


def test_straight_through_is_the_identity_for_gradients() -> None:
    z, q, weight = normal(4, 5, 3, 2).requires_grad_(), normal(4, 5, 3, 2, name=1), normal(4, 5, 3, 2, name=2)
    (gradient,) = torch.autograd.grad((apply_estimator(z, q, "straight_through") * weight).sum(), z)
    assert torch.equal(gradient, weight)


def test_rotation_turns_and_stretches_the_gradient() -> None:
    z, q, weight = normal(2, 5, 3, 2).requires_grad_(), normal(2, 5, 3, 2, name=1), normal(2, 5, 3, 2, name=2)
    (gradient,) = torch.autograd.grad((apply_estimator(z, q, "rotation") * weight).sum(), z)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                matrix = turning(z[b, :, i, j].detach(), q[b, :, i, j])
                torch.testing.assert_close(matrix @ z[b, :, i, j].detach(), q[b, :, i, j])
                torch.testing.assert_close(gradient[b, :, i, j], matrix.T @ weight[b, :, i, j])
                # The angle between gradient and vector is the same on both sides.
                there = torch.cosine_similarity(weight[b, :, i, j], q[b, :, i, j], 0)
                here = torch.cosine_similarity(gradient[b, :, i, j], z[b, :, i, j].detach(), 0)
                torch.testing.assert_close(here, there)


def test_two_vectors_of_one_code_are_pushed_apart_by_rotation_only() -> None:
    """Two vectors beside one code, pushed along the code: rotated gradients point along each vector."""
    z = torch.tensor([[1.0, 0.5], [1.0, -0.5]], dtype=torch.float64).view(2, 2, 1, 1).requires_grad_()
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1).expand(2, -1, -1, -1)
    for estimator, apart in (("straight_through", False), ("rotation", True)):
        (gradient,) = torch.autograd.grad((apply_estimator(z, q, estimator) * q).sum(), z)  # type: ignore[arg-type]
        assert (float((gradient[0] - gradient[1]).abs().max()) > 0.1) == apart


def test_no_direction_goes_straight_through() -> None:
    """z = 0, q = 0 and half a turn have no rotation; values stay right and gradients finite."""
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.5], [1.0, -2.0, 0.5]]).view(3, 3, 1, 1).requires_grad_()
    q = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 2.0, -0.5]]).view(3, 3, 1, 1)
    values = apply_estimator(z, q, "rotation")
    torch.testing.assert_close(values, q)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))
    (same,) = torch.autograd.grad(apply_estimator(z, z.detach(), "rotation")[1:].sum(), z)
    torch.testing.assert_close(same[1:], torch.ones_like(same[1:]))


def test_on_the_sphere_values_have_size_one() -> None:
    z = normal(4, 6, 2, 2).requires_grad_()
    placed = project_to_sphere(z, 1)
    torch.testing.assert_close(placed.square().mean(1), torch.ones(4, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(
        torch.cosine_similarity(placed, z, 1), torch.ones(4, 2, 2, dtype=torch.float64)
    )
    (gradient,) = torch.autograd.grad((placed * normal(4, 6, 2, 2, name=1)).sum(), z)
    torch.testing.assert_close((gradient * z.detach()).sum(1), torch.zeros(4, 2, 2, dtype=torch.float64))
    assert float(project_to_sphere(torch.zeros(1, 4), 1).abs().max()) == 0
    assert math.isclose(float(project_to_sphere(torch.full((1, 4), 3.0), 1)[0, 0]), 1.0)
