"""The RELION 3.0 layout of 3-D subtomograms, as ``relion_prepare_subtomograms.py`` and Warp leave it.

Owns: the writing of ``particles.star`` and of one CTF STAR per particle for sets that are made here (the simulator).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opustomo.data.atomic import write_text

_PARTICLES = (
    "rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ", "rlnImageName", "rlnCtfImage",
    "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginZ",
    "rlnMagnification", "rlnDetectorPixelSize",
)  # fmt: skip
_TILTS = (
    "rlnDefocusU", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnAngleRot", "rlnAngleTilt",
    "rlnAnglePsi", "rlnCtfBfactor", "rlnCtfScalefactor",
)  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """P particles of a set that is made here; poses as in RELION, the bead at c lies at ``A c - origin``."""

    images: Sequence[str]  # names relative to the STAR file
    tomograms: Sequence[str]
    coordinates: NDArray[np.float64]  # (P, 3) of the centre of the box, pixels of the tomogram, x, y, z
    euler: NDArray[np.float64]  # (P, 3) rot, tilt, psi in degrees
    origin: NDArray[np.float64]  # (P, 3) pixels


def write_particles(path: Path, particles: Listed, pixel_size: float) -> None:
    """Write the particle table, atomically; the CTF of ``x.mrc`` is ``x_ctf.mrc``, read as ``x_ctf.star``."""
    poses = np.hstack([particles.euler, particles.origin])
    listed = zip(particles.images, particles.tomograms, particles.coordinates, poses, strict=True)
    # Magnification 10000 makes rlnDetectorPixelSize (micrometres) the pixel size in Angstrom
    rows = [
        f"{tomogram} {_numbers(place, 2)} {image} {image.removesuffix('.mrc')}_ctf.mrc {_numbers(pose, 5)} "
        f"10000 {pixel_size:.7g}"
        for image, tomogram, place, pose in listed
    ]
    write_text(path, _loop("", _PARTICLES, rows))


def write_ctf(
    path: Path,
    defocus: NDArray[np.float64],
    tilts: NDArray[np.float64],
    bfactor: NDArray[np.float64],
    scale: NDArray[np.float64],
    microscope: tuple[float, float, float],
) -> None:
    """Write one particle's tilt table: defocus (T,) Angstrom, underfocus positive; tilts (T,) degrees, RELION's sign;
    bfactor (T,) Angstrom^2, positive, damping; scale (T,); microscope: voltage (kV), Cs (mm), amplitude contrast."""
    fixed = " ".join(f"{value:g}" for value in microscope)
    rows = [
        f"{df:.2f} {fixed} 0.00 {t:.3f} 0.00 {b:.3f} {s:.6f}"
        for df, t, b, s in zip(defocus, tilts, bfactor, scale, strict=True)
    ]
    write_text(path, _loop("images", _TILTS, rows))


def _numbers(values: NDArray[np.float64], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _loop(block: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    header = "".join(f"_{name} #{number}\n" for number, name in enumerate(columns, 1))
    return f"\ndata_{block}\n\nloop_\n{header}" + "\n".join(rows) + "\n\n"
