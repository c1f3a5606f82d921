"""Rigid bodies that move against each other: one density made of parts, each turned about its joint.

Owns: the motion of a volume made of soft bodies and its derivatives.  Body b moves a point x of the volume to
``R_b (x - c_b) + c_b + t_b``, so what is seen at x comes from ``s_b(x) = R_b^T (x - c_b - t_b) + c_b`` and

    V'(x) = sum_b w_b(s_b(x)) V(s_b(x)).

The weights w_b > 0 sum to 1 and move with their bodies: within a body the motion is rigid, no motion is the identity,
and mass is neither made nor lost.  Where bodies are pulled apart the density between them thins out over their soft
edges, where they come together it adds up, as that of atoms does.  V' is linear in V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from opustomo.physics.fourier import fourier_resize, spectral_gradient
from opustomo.physics.geometry import cross_matrix, rotation_from_vector
from opustomo.physics.volume import centred_coordinates, turned_coordinates

FINER = 2  # grid on which densities are read by trilinear interpolation: on their own it costs a third near Nyquist


def soft_bodies(distance: Tensor, width: float) -> Tensor:
    """Weights that sum to 1 everywhere, (B, C, C, C), from signed distances to the bodies (negative inside), voxels.

    Half of a weight passes from one body to the next within about ``width`` voxels.
    """
    return torch.softmax(-distance / width, 0)


def move_bodies(volume: Tensor, weights: Tensor, joints: Tensor, motion: Tensor) -> Tensor:
    """Volumes whose bodies have moved, (b, C, C, C); differentiable with respect to volume and motion.

    volume: (b, C, C, C), or (1, C, C, C) for all alike; weights: (B, C, C, C), positive, of sum 1; joints: (B, 3)
    voxels (x, y, z) from voxel C//2; motion: (b, B, 6) rotation vectors (radians, active, right-handed) and shifts
    (voxels).
    """
    weight, density = _in_place(volume, weights, joints, motion)
    return (weight * density).sum(1)


def move_with_derivatives(volume: Tensor, weights: Tensor, joints: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """``move_bodies`` and the derivatives of its result with respect to motion, (b, 6 B, C, C, C)."""
    weight, density = _in_place(volume, weights, joints, motion)
    # a body that is in its place already moves on by (J d) x y + t for a change d, t of the motion, y = x - c - t
    sx, sy, sz = spectral_gradient(density) * weight + density * _gradient(weight)
    place = centred_coordinates(volume.shape[-1], volume.device).movedim(-1, 0)
    yx, yy, yz = (place - (joints + motion[..., 3:])[..., None, None, None]).unbind(2)
    torque = torch.stack([sy * yz - sz * yy, sz * yx - sx * yz, sx * yy - sy * yx], 2)
    rotation = (left_jacobian(motion[..., :3]).transpose(-1, -2) @ torque.flatten(3)).view_as(torque)
    shift = -torch.stack([sx, sy, sz], 2)
    return (weight * density).sum(1), torch.cat([rotation, shift], 2).flatten(1, 2)


def left_jacobian(vector: Tensor) -> Tensor:
    """J (..., 3, 3) with ``exp(v + d) = exp(J d) exp(v)`` to first order, for rotation vectors v (..., 3).

    Source: Sola et al. 2018, A micro Lie theory, eq. 145.
    """
    cross = cross_matrix(vector)
    angle = vector.norm(dim=-1).clamp(min=1e-4)[..., None, None]
    eye = torch.eye(3, device=vector.device, dtype=vector.dtype)
    return eye + (1 - torch.cos(angle)) / angle**2 * cross + (angle - torch.sin(angle)) / angle**3 * (cross @ cross)


def _in_place(volume: Tensor, weights: Tensor, joints: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and densities of all bodies, each where it has moved to: (b, B, C, C, C) both."""
    size = volume.shape[-1]
    back = rotation_from_vector(motion[..., :3]).transpose(-1, -2)
    shift = joints - torch.einsum("bkij,bkj->bki", back, joints + motion[..., 3:])
    points = turned_coordinates(size, back, shift).movedim(2, -1)  # s_b(x): (b, B, C, C, C, 3)
    # a volume that all share is read at all points in one go
    together = points.view(len(volume), -1, *points.shape[2:])
    density = _read(fourier_resize(volume, FINER * size), together, FINER, "zeros").view(points.shape[:5])
    # of every body its own; beyond the box the value at its border
    weight = _read(weights, points.movedim(1, 0), 1, "border").movedim(0, 1)
    return weight, density


def _read(volumes: Tensor, points: Tensor, finer: int, padding: str) -> Tensor:
    """Trilinear values of volumes (v, n, n, n), on a grid ``finer`` than that of the points (v, m, C, C, C, 3)."""
    n, shape = volumes.shape[-1], points.shape[1:5]
    unit = (points * finer + n // 2) * (2.0 / (n - 1)) - 1.0
    flat = unit.flatten(1, 2)  # (v, m C, C, C, 3): one set of points after the other along z
    values = functional.grid_sample(volumes[:, None], flat, align_corners=True, padding_mode=padding)
    return values[:, 0].unflatten(1, shape[:2])


def _gradient(volume: Tensor) -> Tensor:
    """Central differences per voxel of (..., n, n, n) along x, y, z: (3, ..., n, n, n)."""
    return torch.stack(torch.gradient(volume, dim=(-1, -2, -3)))
