"""Euler angles of tables as rotation matrices and back: ``physics.geometry`` on NumPy arrays, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.physics.geometry import euler_to_matrix, matrix_to_euler


def to_matrix(euler: NDArray[Any]) -> NDArray[np.float64]:
    """(P, 3, 3) A of METHOD section 2 from RELION's rot, tilt, psi (P, 3) in degrees."""
    return euler_to_matrix(torch.from_numpy(np.asarray(euler, np.float64))).numpy()


def turned(zxz: NDArray[Any]) -> NDArray[np.float64]:
    """(P, 3, 3) turns about the fixed axes z, x, z by (P, 3) degrees, one after another.

    Of no turns none, which SciPy 1.15 refuses.
    """
    if len(zxz) == 0:
        return np.zeros((0, 3, 3))
    return Rotation.from_euler("zxz", zxz, degrees=True).as_matrix()


def to_euler(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """RELION's rot, tilt, psi (P, 3) in degrees of A (P, 3, 3)."""
    return matrix_to_euler(torch.from_numpy(rotation)).numpy()


def tilt_angles(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of tilts (T, 3, 3), with rot within 90 degrees, so that tilts about y keep their sign."""
    euler = to_euler(rotation)
    turned = np.abs(euler[:, :1]) > 90
    other = (euler + np.array([180, 0, 180])) * [1, -1, 1]
    return np.where(turned, (other + 180) % 360 - 180, euler)
