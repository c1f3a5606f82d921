"""CTF and weight volumes: every layout in use, turned into one half-Fourier array.

Owns: telling cubic from half-Fourier and centre from corner origin.  The header's pixel size is not looked at
(RELION-4 writes its inverse).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.mrc import LARGEST, read_volume
from opustomo.errors import UserError

OF_RELION4 = "RELION 4: half-Fourier CTF^2 and multiplicity, origin at the corner"


def read_transfer_volume(path: Path, box: int) -> NDArray[np.float32]:
    """Read a CTF or weight volume as (N, N, N//2+1) float32 (kz, ky, kx): zero frequency at index 0, kx >= 0.

    box: N of the subtomograms.  Errors as ``half_fourier`` and ``read_volume``.
    """
    return half_fourier(read_volume(path)[0], box, path)[0]


def half_fourier(volume: NDArray[np.float32], box: int, path: Path) -> tuple[NDArray[np.float32], str]:
    """A transfer volume in any layout as (N, N, N//2+1) with its origin at index 0, and the layout found in words.

    Accepts (N, N, N), half-Fourier (N, N, N//2+1), each with the origin at voxel N//2 or at the corner, and
    RELION-4's (2N, N, N//2+1), CTF^2 followed by multiplicity, of which the first is returned.
    UserError: another size, no Friedel symmetry about either origin, nothing but zeros.
    """
    half = box // 2 + 1
    if volume.shape == (2 * box, box, half):
        return np.ascontiguousarray(volume[:box]), OF_RELION4
    if volume.shape not in {(box, box, box), (box, box, half)}:
        raise UserError(
            f"{path}: transfer volume of size (z, y, x) {volume.shape} does not fit the box {box}: expected "
            f"{(box, box, box)} or {(box, box, half)}; make it at the box size of the subtomograms"
        )
    if not (np.abs(volume) < LARGEST).all():
        raise UserError(f"{path}: NaN, infinite or absurdly large values; make the transfer volume again")
    if not np.any(volume):
        raise UserError(f"{path}: transfer volume has zeros only; remove the particle or make the volume again")
    cubic = volume.shape[2] == box
    centred = _is_centred(volume, cubic)
    if centred:
        volume = np.fft.ifftshift(volume, axes=(0, 1, 2) if cubic else (0, 1))
    if cubic:
        volume = _friedel_half(volume, path)
    words = f"{'cubic' if cubic else 'half-Fourier'}, origin {'at voxel N//2' if centred else 'at the corner'}"
    return np.ascontiguousarray(volume, np.float32), words


def _is_centred(volume: NDArray[np.float32], cubic: bool) -> bool:
    """Whether zero frequency lies at N//2 rather than at index 0 of z and y.

    Friedel symmetry cannot tell (for even N both origins have the same mates), the covered region can: the plane of
    the untilted image, kz = 0, is full while the plane kz = Nyquist is mostly wedge and damped; ky likewise is
    damped towards Nyquist, unless the tilt axis is x, so kz alone decides where it can.  Low frequencies alone do not
    serve, a CTF is almost zero there.  Without a difference RELION's convention holds: cubic volumes are centred,
    half-Fourier ones start at the corner.
    """
    middle = volume.shape[0] // 2
    ratio = 1.0
    for axis in (0, 1):
        at_middle, at_corner = (_slab_power(volume, index, axis) for index in (middle, 0))
        ratio *= (at_middle + 1e-30) / (at_corner + 1e-30)
        if not 0.8 < ratio < 1.25:
            return bool(ratio > 1)
    return cubic


def _slab_power(volume: NDArray[np.float32], index: int, axis: int) -> float:
    slab = np.take(volume, [index - 1, index, index + 1], axis, mode="wrap")
    return float(np.square(slab, dtype=np.float64).sum())


def _friedel_half(volume: NDArray[np.float32], path: Path) -> NDArray[np.float32]:
    """The kx >= 0 half of a cubic volume with its origin at the corner, averaged with its Friedel mates."""
    mates = np.roll(volume[::-1, ::-1, ::-1], 1, axis=(0, 1, 2))
    asymmetry = np.square(volume - mates, dtype=np.float64).sum() / np.square(volume, dtype=np.float64).sum()
    if asymmetry > 0.1:
        raise UserError(
            f"{path}: transfer volume has no Friedel symmetry about voxel N//2 or the corner "
            f"(asymmetric power {asymmetry:.0%}); it is shifted or not a CTF volume: make it again"
        )
    return (0.5 * (volume + mates))[:, :, : volume.shape[2] // 2 + 1]
