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

from opustomo.config import InputOptions
from opustomo.data.angles import to_euler
from opustomo.data.lists import read_list
from opustomo.data.particles import Particles
from opustomo.data.places import Places, places_of, tomogram_key
from opustomo.data.readers import relion
from opustomo.data.readers.source import read_source
from opustomo.errors import UserError

REACH = 0.25  # of the box: what a refinement moves no particle by


def with_species(particles: Particles, path: Path, options: InputOptions) -> Particles:
    """The same particles with the poses of ``path``, the particle table of a species of M (wrpCoordinateX1, ...).

    options: as ``particles`` were read.  M's positions are Angstrom from the tomogram's first voxel, its angles
    RELION's; a box is centred on the particle's coordinate, and what M's position differs from that becomes the origin.
    UserError: another kind of list; a particle whose tilt series the species does not have, that has no particle of
    the species within a quarter of the box, or the same one as another.
    """
    species = read_list(path)
    if species.unit != "angstrom":
        raise UserError(f"--poses {path}: is a list of {species.kind}; give a pose pickle, or a species of M")
    source = read_source(particles.source, options.format, options.datadir)
    pixel, datadir = particles.pixel_size, options.datadir
    here = places_of(source, particles.rotation, particles.origin, pixel, None, datadir)
    boxes = places_of(source, particles.rotation, np.zeros_like(particles.origin), pixel, None, datadir)
    row, distance = _nearest(here, species.position, [tomogram_key(str(name)) for name in species.tomogram], path)
    _refuse_doubtful(particles, path, row, distance, here.pixel_size)
    rotation, shift = species.rotation[row], species.position[row] - boxes.centre
    if not source.stacks:
        rotation, shift = relion.in_subtomogram(source.table, rotation, shift)
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
    here: Places, position: NDArray[np.float64], tomogram: list[str], path: Path
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(P,) the nearest of ``position`` (n, 3) in the same tomogram, and how far it is, Angstrom."""
    row, distance = np.zeros(len(here.centre), np.int64), np.zeros(len(here.centre))
    keys = np.array([tomogram_key(str(name)) for name in here.tomogram], object)
    of_species = np.array(tomogram, object)
    for key in dict.fromkeys(keys):
        there, wanted = np.flatnonzero(of_species == key), keys == key
        if len(there) == 0:
            known = ", ".join(list(dict.fromkeys(tomogram))[:3])
            raise UserError(
                f"--poses {path}: has no tilt series {key} (it has {known} ...); give the species that the particles "
                "were exported from"
            )
        distance[wanted], nearest = cKDTree(position[there]).query(here.centre[wanted])
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
