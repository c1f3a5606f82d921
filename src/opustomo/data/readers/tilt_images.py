"""What readers of tilt images hand over: where every image of a particle is and how the particle lies in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.physics.geometry import matrix_to_euler


class TiltImages(NamedTuple):
    """The parts of ``Particles`` that come from tilt images, in its units; same fields, plus notes."""

    euler: NDArray[np.float64]  # (P, 3)
    rotation: NDArray[np.float64]  # (P, 3, 3)
    origin: NDArray[np.float64]  # (P, 3) pixels
    tilts: NDArray[np.float64]
    tilt_offsets: NDArray[np.int64]
    slices: NDArray[np.int64]
    tilt_shifts: NDArray[np.float64]
    notes: tuple[str, ...]


def tilt_angles(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euler angles (T, 3) of tilts (T, 3, 3) with rot within 90 degrees, so that tilts about y keep their sign."""
    euler = matrix_to_euler(torch.from_numpy(rotation)).numpy()
    turned = np.abs(euler[:, :1]) > 90
    other = (euler + np.array([180, 0, 180])) * [1, -1, 1]
    return np.where(turned, (other + 180) % 360 - 180, euler)
