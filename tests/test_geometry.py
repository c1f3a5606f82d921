"""Rotations against scipy, and the pose algebra against resampled volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.physics.geometry import (
    euler_to_matrix,
    matrix_to_euler,
    rotation_angle,
    rotation_from_vector,
    update_pose,
)

RNG = np.random.default_rng(0)
POLES = [[30.0, 0.0, 0.0], [30.0, 0.0, 55.0], [-100.0, 180.0, 20.0], [0.0, 180.0, 0.0], [0.0, 0.0, 0.0]]
EULERS = np.concatenate([RNG.uniform([-180, 0, -180], [180, 180, 180], (200, 3)), POLES])


def test_relion_matrix_is_the_transpose_of_intrinsic_zyz() -> None:
    expected = Rotation.from_euler("ZYZ", EULERS, degrees=True).as_matrix().transpose(0, 2, 1)
    assert np.abs(euler_to_matrix(torch.from_numpy(EULERS)).numpy() - expected).max() < 1e-12


def test_tilt_euler_spans_the_image_plane_of_a_tilt_about_y() -> None:
    t = np.deg2rad(25.0)
    u, v, distance = euler_to_matrix(torch.tensor([0.0, 25.0, 0.0], dtype=torch.float64)).numpy()
    assert np.allclose(u, [np.cos(t), 0, -np.sin(t)])
    assert np.allclose(v, [0, 1, 0])
    assert np.allclose(distance, [np.sin(t), 0, np.cos(t)])


def test_euler_round_trip_reproduces_the_matrix_also_at_the_poles() -> None:
    matrix = euler_to_matrix(torch.from_numpy(EULERS))
    euler = matrix_to_euler(matrix)
    assert float((euler_to_matrix(euler) - matrix).abs().max()) < 1e-9
    assert float(euler[:, 1].min()) >= 0
    assert float(euler[:, 1].max()) <= 180


def test_euler_angles_themselves_return() -> None:
    euler = torch.from_numpy(EULERS[:200])
    assert float((matrix_to_euler(euler_to_matrix(euler)) - euler).abs().max()) < 1e-6


def test_rotation_from_vector_is_scipys_and_differentiable_at_zero() -> None:
    vectors = RNG.normal(0, 1.0, (50, 3))
    expected = Rotation.from_rotvec(vectors).as_matrix()
    assert np.abs(rotation_from_vector(torch.from_numpy(vectors)).numpy() - expected).max() < 1e-12
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rotation_from_vector(zero)[1, 0].backward()  # d R_yx / d w_z = 1
    assert zero.grad is not None
    assert torch.allclose(zero.grad, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.5, 90.0, 179.0])
def test_rotation_angle_matches_scipy(degrees: float) -> None:
    a = Rotation.random(20, rng=RNG)
    axis = RNG.normal(size=(20, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    b = a * Rotation.from_rotvec(np.deg2rad(degrees) * axis)
    expected = np.rad2deg((a.inv() * b).magnitude())
    found = rotation_angle(torch.from_numpy(a.as_matrix()), torch.from_numpy(b.as_matrix()))
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_updated_pose_shows_the_template_where_the_moved_template_was() -> None:
    """``V'(x) = V(R^T (x - t))`` seen with the old pose equals V seen with the new one, at every particle voxel.

    A particle with pose (A, o) holds at x the template's value at ``A^T (x + o)``: its centre is at -o.
    """
    a = torch.from_numpy(Rotation.random(rng=RNG).as_matrix())
    turn = torch.from_numpy(Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix())
    origin, shift = torch.tensor([1.5, -2.0, 0.7], dtype=torch.float64), torch.tensor([-0.4, 0.9, 1.3]).double()
    beads = torch.from_numpy(RNG.normal(0, 6, (8, 3)))

    def template(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.1 * (x[:, None] - beads).square().sum(-1)).sum(-1)

    axis = torch.arange(-8.0, 9.0, 2.0, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis, axis)
    old = (x + origin) @ a  # A^T (x + o)
    particle = template((old - shift) @ turn)
    new_a, new_origin = update_pose(a, origin, turn, shift)
    assert float((template((x + new_origin) @ new_a) - particle).abs().max()) < 1e-10
