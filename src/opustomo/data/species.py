"""Poses of a species of M for the particles of another file: images from an export, poses from M's refinement.

Owns: which row of the species each particle is.  M's table has no images and no names of particles, so a particle is
the species' nearest one in the same tilt series.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from opustomo.data.angles import to_euler
from opustomo.data.export import refuse_repeated
from opustomo.data.lists import ParticleList, read_list
from opustomo.data.particles import Particles
from opustomo.data.places import boxes_of, from_tomogram, in_tomogram, tomogram_key
from opustomo.data.readers.source import Source
from opustomo.errors import UserError

REACH = 0.25  # of the box: what a refinement moves no particle by


def with_species(particles: Particles, source: Source, path: Path, datadir: Path | None) -> Particles:
    """The same particles with the poses of ``path``, the particle table of a species of M (wrpCoordinateX1, ...).

    source: what ``particles`` were read from, with that ``--datadir``.  M's positions are Angstrom from the tomogram's
    first voxel, its angles RELION's; a box is centred on the particle's coordinate, and what M's position differs from
    that becomes the origin.
    UserError: another kind of list; copies of a particle; a particle whose tilt series the species does not have, that
    has no particle of the species within a quarter of the box, or the same one as another.
    """
    species = read_list(path)
    if species.unit != "angstrom":
        raise UserError(f"--poses {path}: is a list of {species.kind}; give a pose pickle, or a species of M")
    refuse_repeated(source.table, f"{path} has one pose for both; give --poses with the file that was expanded")
    pixel = particles.pixel_size
    boxes, voxel = boxes_of(source, pixel, None, datadir)
    centre = boxes + in_tomogram(source, particles.rotation, -particles.origin * pixel)[1]
    row, distance = _nearest(centre, particles.tomogram, species, path)
    _refuse_doubtful(particles, path, row, distance, voxel)
    rotation, shift = from_tomogram(source, species.rotation[row], species.position[row] - boxes)
    note = (
        f"poses of {len(row)} of {len(species)} particles of {path}, median {np.median(distance):.2g} A (at most "
        f"{distance.max():.2g} A) from those of the STAR file"
    )
    return replace(
        particles,
        rotation=rotation,
        origin=-shift / pixel,
        euler=to_euler(rotation),
        notes=(*particles.notes, note, *species.notes),
    )


def _nearest(
    centre: NDArray[np.float64], tomogram: NDArray[np.object_], species: ParticleList, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(P,) the row of the species nearest to each ``centre`` (P, 3) in the same tomogram, and how far, Angstrom."""
    row, distance = np.zeros(len(centre), np.int64), np.zeros(len(centre))
    keys, of_species = (
        np.array([tomogram_key(str(name)) for name in names], object) for names in (tomogram, species.tomogram)
    )
    for key in dict.fromkeys(keys):
        there, wanted = np.flatnonzero(of_species == key), keys == key
        if len(there) == 0:
            known = ", ".join(list(dict.fromkeys(of_species))[:3])
            raise UserError(
                f"--poses {path}: has no tilt series {key} (it has {known} ...); give the species that the particles "
                "were exported from"
            )
        distance[wanted], nearest = cKDTree(species.position[there]).query(centre[wanted])
        row[wanted] = there[nearest]
    return row, distance


def _refuse_doubtful(
    particles: Particles, path: Path, row: NDArray[np.int64], distance: NDArray[np.float64], voxel: float
) -> None:
    reach = REACH * particles.box * particles.pixel_size
    far = np.flatnonzero(distance > reach)
    if len(far):
        raise UserError(
            f"--poses {path}: {len(far)} of {len(row)} particles have none of the species within {reach:.0f} A, first: "
            f"{particles.names[far[0]]} (row {far[0] + 1} of {particles.source}, nearest {distance[far[0]]:.0f} A; "
            f"coordinates there count voxels of {voxel:g} A); give the species that they were exported from, or remove "
            "them"
        )
    order = np.argsort(row, kind="stable")
    same = np.flatnonzero(np.diff(row[order]) == 0)
    if len(same):
        first, second = order[same[0]], order[same[0] + 1]
        raise UserError(
            f"--poses {path}: particles {particles.names[first]} and {particles.names[second]} (rows {first + 1} and "
            f"{second + 1} of {particles.source}) are nearest to the same one (row {row[first] + 1}); remove one"
        )
