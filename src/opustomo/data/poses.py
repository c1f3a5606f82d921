"""Poses that change: moving the particles of a table, and how far they have been moved.

Owns: the units of a move.  A move is (P, 6): rotation vector (radians, active) and shift (voxels of the working grid)
about the axes of the consensus frame, as the pose modes of the linear stage are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from opustomo.data.particles import Particles
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
