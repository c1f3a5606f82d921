"""Where the particles of a data set are in their tomograms, as they lie there.

Owns: the way from coordinates, origins and poses of any dialect to one position and one orientation in the tomogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from opustomo.data.readers import optimisation_set, relion
from opustomo.data.readers.source import Source
from opustomo.errors import UserError

_ENDINGS = (".tomostar", ".mrc", ".mrcs", ".rec", ".st", ".ali", ".hdf", ".em", ".star")


def tomogram_key(name: str) -> str:
    """A tomogram's name without folders and the endings of files: what its names in several programs share."""
    stem = PurePath(name).name
    while PurePath(stem).suffix.lower() in _ENDINGS:
        stem = PurePath(stem).stem
    return stem


def begins(name: str, key: str) -> bool:
    """Whether a tomogram's name is ``key`` with more to it: TS_1_10.00Apx begins with TS_1, TS_10 does not."""
    return key != "" and name.startswith((key + "_", key + "."))


@dataclass(frozen=True)
class Places:
    """P particles: the point x of the average, Angstrom from its voxel N//2, lies at ``centre + rotation x``."""

    centre: NDArray[np.float64]  # (P, 3) Angstrom from the tomogram's first voxel, x, y, z
    rotation: NDArray[np.float64]  # (P, 3, 3)
    tomogram: NDArray[np.object_]  # (P,)
    pixel_size: float  # Angstrom, of the voxels that the file's coordinates count

    def at(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> Places:
        """Those of some of the particles."""
        return Places(self.centre[index], self.rotation[index], self.tomogram[index], self.pixel_size)


def places_of(
    source: Source,
    rotation: NDArray[np.float64],
    origin: NDArray[np.float64],
    pixel_size: float,
    coordinate_pixel: float | None = None,
    datadir: Path | None = None,
) -> Places:
    """Places of the P particles of ``source`` with poses as ``Particles`` has them.

    rotation (P, 3, 3), origin (P, 3) pixels of ``pixel_size`` Angstrom; coordinate_pixel: Angstrom, of the voxels that
    rlnCoordinateX/Y/Z count (default: as the files state it, else ``pixel_size``).  UserError: one row per image, no
    coordinates, no names of tomograms, centred coordinates without the tomograms' sizes.
    """
    boxes, stated = boxes_of(source, pixel_size, coordinate_pixel, datadir)
    rotation, shift = in_tomogram(source, rotation, -origin * pixel_size)
    return Places(boxes + shift, rotation, relion.tomograms(source.table), stated)


def in_tomogram(
    source: Source, rotation: NDArray[np.float64], shift: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotations (P, 3, 3) and vectors (P, 3) of the particles' frames in that of their tomogram."""
    # images are in the tomogram's frame already
    return (rotation, shift) if source.stacks else relion.in_tomogram(source.table, rotation, shift)


def from_tomogram(
    source: Source, rotation: NDArray[np.float64], shift: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The inverse of ``in_tomogram``."""
    return (rotation, shift) if source.stacks else relion.in_subtomogram(source.table, rotation, shift)


def boxes_of(
    source: Source, pixel_size: float, coordinate_pixel: float | None, datadir: Path | None
) -> tuple[NDArray[np.float64], float]:
    """(P, 3) middles of the boxes, Angstrom from the first voxel, and Angstrom, of the voxels that the file counts.

    Arguments and errors: see ``places_of``.
    """
    table = source.table
    if source.format == "series":
        raise UserError(f"{table.path}: a table with one row for each image does not say where particles are in 3-D")
    coordinates = relion.coordinates(table)
    if coordinates is None or "" in relion.tomograms(table):
        raise UserError(f"{table.path}: has no coordinates or no rlnTomoName (rlnMicrographName) for every particle")
    stated = coordinate_pixel or relion.coordinate_pixel(table) or pixel_size
    if coordinate_pixel is None and source.tomograms is not None:
        return optimisation_set.from_corner(source, pixel_size, datadir)
    if table.has(table.particle_block, "rlnCoordinateX"):
        return coordinates * stated, stated
    raise UserError(
        f"{table.path}: rlnCenteredCoordinateX/Y/ZAngst needs the tomograms' sizes; give the run the optimisation "
        "set, and leave --coords-angpix out"
    )
