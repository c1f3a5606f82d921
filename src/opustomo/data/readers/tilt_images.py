"""What readers of tilt images hand over: where every image of a particle is and how the particle lies in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
