"""Poses that change: moving the particles of a table, how far they have been moved, and poses from elsewhere.

Owns: the units of a move.  A move is (P, 6): rotation vector (radians, active) and shift (voxels of the working grid)
about the axes of the consensus frame, as the pose modes of the linear stage are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from opustomo.data.angles import to_matrix
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.physics.geometry import matrix_to_euler, rotation_from_vector, update_pose
from opustomo.physics.grid import Grid


def move_poses(particles: Particles, move: Tensor, grid: Grid, *, map_held: bool = False) -> Particles:
    """Particles at poses moved by ``move`` (P, 6), less its mean: a common move is one of the map, not of the poses.

    map_held: the map stays as it is, so a common move counts as well.
    """
    move = (move if map_held else move - move.mean(0)).double()
    rotation, origin = update_pose(
        torch.from_numpy(particles.rotation),
        torch.from_numpy(particles.origin),
        rotation_from_vector(move[:, :3]),
        move[:, 3:] * (grid.box / grid.working_box),
    )
    return replace(particles, rotation=rotation.numpy(), origin=origin.numpy(), euler=matrix_to_euler(rotation).numpy())


def moved_from(particles: Particles, given: Particles, grid: Grid) -> Tensor:
    """How far the poses of ``particles`` are from those of ``given``, (P, 6)."""
    turn = Rotation.from_matrix(given.rotation.swapaxes(1, 2) @ particles.rotation).as_rotvec()
    shift = -np.einsum("pji,pj->pi", given.rotation, particles.origin - given.origin) * grid.working_box / grid.box
    return torch.from_numpy(np.concatenate([turn, shift], 1)).float()


def same_poses(a: Particles, b: Particles) -> bool:
    """Whether two tables of the same particles have the very same poses."""
    return np.array_equal(a.rotation, b.rotation) and np.array_equal(a.origin, b.origin)


def with_poses(
    particles: Particles, rotation: NDArray[Any], origin_fraction: NDArray[Any], euler: NDArray[Any]
) -> Particles:
    """The same particles with the poses of a pose pickle.

    rotation: (P, 3, 3) A of METHOD section 2; origin_fraction: (P, 3) origins as a fraction of the box; euler: (P, 3)
    degrees.  Where the matrices are not those of the Euler angles (other programs store the transpose) the angles,
    whose convention is RELION's, are used and a note says so.  UserError naming both counts when P differs.
    """
    if not len(rotation) == len(origin_fraction) == len(euler) == len(particles):
        raise UserError(
            f"--poses has {len(euler)} poses but {particles.source} has {len(particles)} particles; make the pose "
            "pickle from this STAR file with `dsdsh prepare`"
        )
    angles = np.asarray(euler, np.float64)
    matrices = to_matrix(angles)
    notes = (*particles.notes, "poses from the pose pickle instead of the STAR file")
    if np.abs(matrices - rotation).max() < 1e-3:
        # the stored matrices carry corrections at float32 precision that the angles may have lost near tilt 0
        matrices = np.asarray(rotation, np.float64)
    else:
        notes += ("the matrices of the pose pickle disagree with its Euler angles: the angles are used",)
    origin = np.asarray(origin_fraction, np.float64) * particles.box
    return replace(particles, rotation=matrices, origin=origin, euler=angles, notes=notes)
