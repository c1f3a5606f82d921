"""Rotations and poses in RELION's convention.

Owns: Euler angles, rotation matrices and small rotations, all acting on (x, y, z) column vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _about_z(angle: Tensor) -> Tensor:
    """Passive rotation about z, ``[[c, s, 0], [-s, c, 0], [0, 0, 1]]``; angle in radians, any shape."""
    c, s = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    return torch.stack([c, s, zero, -s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def _about_y(angle: Tensor) -> Tensor:
    """Passive rotation about y, ``[[c, 0, -s], [0, 1, 0], [s, 0, c]]``; angle in radians, any shape."""
    c, s = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    return torch.stack([c, zero, -s, zero, one, zero, s, zero, c], -1).unflatten(-1, (3, 3))


def euler_to_matrix(euler: Tensor) -> Tensor:
    """RELION Euler angles to rotation matrices.

    euler: (..., 3) rot, tilt, psi in degrees.  Returns (..., 3, 3) ``A = Rz(psi) Ry(tilt) Rz(rot)``, so that
    ``x_particle = A x_consensus``.  Source: RELION, Euler_angles2matrix.
    """
    rot, tilt, psi = torch.deg2rad(euler).unbind(-1)
    return _about_z(psi) @ _about_y(tilt) @ _about_z(rot)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) to RELION Euler angles (..., 3): rot, tilt, psi in degrees.

    tilt lies in [0, 180]; where sin(tilt) vanishes only rot + psi (or rot - psi) is defined and psi is set to 0.
    """
    sine = torch.hypot(matrix[..., 2, 0], matrix[..., 2, 1])
    tilt = torch.atan2(sine, matrix[..., 2, 2])
    regular = sine > 1e-6
    rot = torch.atan2(matrix[..., 2, 1], matrix[..., 2, 0])
    psi = torch.atan2(matrix[..., 1, 2], -matrix[..., 0, 2])
    # tilt = 0: A = Rz(rot + psi); tilt = 180: A = diag(-1, 1, -1) Rz(rot - psi)
    flip = torch.where(matrix[..., 2, 2] < 0, -1.0, 1.0)
    polar = torch.atan2(flip * matrix[..., 0, 1], flip * matrix[..., 0, 0])
    rot = torch.where(regular, rot, polar)
    psi = torch.where(regular, psi, torch.zeros_like(psi))
    return torch.rad2deg(torch.stack([rot, tilt, psi], -1))


def rotation_from_vector(vector: Tensor) -> Tensor:
    """Rodrigues: (..., 3) axis times angle in radians (active, right-handed) to (..., 3, 3) matrices.

    Differentiable at zero.
    """
    return torch.linalg.matrix_exp(cross_matrix(vector))


def cross_matrix(vector: Tensor) -> Tensor:
    """The matrix (..., 3, 3) that takes x to ``vector x x``, for vectors (..., 3)."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def rotation_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees between rotation matrices (..., 3, 3), in [0, 180]."""
    # the chord is accurate for small angles, where arccos of the trace is not
    chord = (a - b).square().sum((-2, -1)).sqrt() / (2.0 * 2.0**0.5)
    return torch.rad2deg(2.0 * torch.asin(chord.clamp(max=1.0)))


def update_pose(rotation: Tensor, origin: Tensor, turn: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Compose a consensus-frame correction with stored poses (METHOD section 6).

    If ``V'(x) = V(turn^T (x - shift))`` explains the particle, then ``A <- A turn`` and
    ``origin <- origin - A shift``.  rotation: (..., 3, 3); origin, shift: (..., 3) in the same pixels.
    """
    moved = origin - (rotation @ shift[..., None])[..., 0]
    return rotation @ turn, moved
