"""Pose errors after removing what no one can know: one rotation and one shift common to all particles.

Owns: the comparison of poses with their truth, and the directions that a code should not know.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.physics.geometry import euler_to_matrix

Floats = NDArray[np.float64]


def rotation_matrices(euler: Floats) -> Floats:
    """(P, 3) rot, tilt, psi in degrees to A (P, 3, 3), METHOD section 2."""
    return euler_to_matrix(torch.as_tensor(euler, dtype=torch.float64)).numpy()


def pose_errors(rotation: Floats, origin: Floats, true_rotation: Floats, true_origin: Floats) -> dict[str, float]:
    """Median and 90th percentile of the angular (degrees) and shift (pixels) errors of P poses.

    rotation, true_rotation: (P, 3, 3) A; origin, true_origin: (P, 3) pixels.  The consensus frame is free: the common
    rotation G (A = A_true G) and the common shift t of the frame (origin = origin_true - A_true t) are removed first.
    """
    relative = Rotation.from_matrix(true_rotation.swapaxes(1, 2) @ rotation)
    angle = _angles_from_mean(relative, relative)
    # again without the worst half: a few outliers must not turn the frame
    angle = _angles_from_mean(relative[angle <= np.median(angle)], relative)
    shift = np.einsum("pji,pj->pi", true_rotation, origin - true_origin)
    distance = np.linalg.norm(shift - np.median(shift, axis=0), axis=1)
    return {
        "angle_median": float(np.median(angle)),
        "angle_p90": float(np.percentile(angle, 90)),
        "shift_median": float(np.median(distance)),
        "shift_p90": float(np.percentile(distance, 90)),
    }


def directions(rotation: Floats) -> dict[str, Floats]:
    """What a code should not know about a particle's orientation A (P, 3, 3).

    ``beam`` and ``tilt_axis``: A^T z and A^T y (P, 3) in the consensus frame; ``*_even``: their outer products (P, 6),
    since a missing wedge is the same for a direction and its opposite; ``in_plane``: cos and sin of psi (P, 2).
    """
    beam, axis = rotation[:, 2], rotation[:, 1]
    psi = np.arctan2(rotation[:, 1, 2], -rotation[:, 0, 2])
    i, j = np.triu_indices(3)
    return {
        "beam": beam,
        "tilt_axis": axis,
        "in_plane": np.stack([np.cos(psi), np.sin(psi)], 1),
        "beam_even": beam[:, i] * beam[:, j],
        "tilt_axis_even": axis[:, i] * axis[:, j],
    }


def _angles_from_mean(some: Rotation, rotations: Rotation) -> Floats:
    """Angles (P,) in degrees between P rotations and the (chordal) mean of some of them."""
    return np.asarray(np.rad2deg((some.mean().inv() * rotations).magnitude()), np.float64)
