"""Flat tables with one row for each tilt image: cryoDRGN-ET, tomoDRGN, Warp 1 and M image series.

Owns: how the poses of a particle's images become one pose of the particle and its tilts.  Row t says that the particle
lies in image t turned by A_t and at ``N//2 - o_t``.  The tilts are ``R_t = A_t A^T`` for any A; A is taken so that the
least tilted image has its beam along z and the tilt axis is along y, as in a subtomogram.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.data.angles import tilt_angles, to_euler, to_matrix
from opustomo.data.particles import SCALE, TILT_COLUMNS, offsets_of
from opustomo.data.readers import relion
from opustomo.data.readers.dialect import Imaging, Opened, Poses
from opustomo.data.readers.source import Source
from opustomo.data.readers.tilts import tilt_table
from opustomo.data.star import StarFile
from opustomo.errors import UserError

_CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration",
        "rlnAmplitudeContrast", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor")  # fmt: skip
_BFACTOR = TILT_COLUMNS.index("bfactor")
_BFACTOR_PER_DOSE = 4.0  # Angstrom^2
_LEAST_TURN = np.deg2rad(1.0)  # tilts nearer to the reference do not show the axis


def image_files(source: Source) -> list[str]:
    """(P,) file of each particle's images.  UserError: images of one particle in several files."""
    names = np.array([name.split("@")[-1] for name in relion.image_names(source.whole)], object)
    assert source.rows is not None
    for rows in source.rows:
        if (other := rows[names[rows] != names[rows[0]]]).size:
            raise UserError(
                f"{source.whole.path}: column _rlnImageName, row {other[0] + 1}: {names[other[0]]}, but other images "
                f"of this particle (row {rows[0] + 1}) are in {names[rows[0]]}; all must be in one stack: extract again"
            )
    return [str(names[rows[0]]) for rows in source.rows]


def read(opened: Opened) -> Imaging:
    """Poses and tilts of P particles.  UserError: column missing, image number that is none."""
    return _read(opened.source, opened.pixel_size)


def poses(source: Source, pixel_size: float) -> Poses:
    """The poses that ``read`` makes of those of the images."""
    found = _read(source, pixel_size)
    return Poses(found.euler, found.rotation, found.origin, found.notes[-1])


def _read(source: Source, pixel_size: float) -> Imaging:
    star, rows = source.whole, source.rows
    assert rows is not None
    turns = to_matrix(relion.eulers(star))
    shifts, origin_note = relion.origins(star, pixel_size)
    block = star.particle_block
    columns = {name: star.numbers(block, name, "the CTF") for name in _CTF if star.has(block, name)}
    if "rlnCtfBfactor" not in columns and star.has(block, "rlnMicrographPreExposure"):
        columns["rlnCtfBfactor"] = _BFACTOR_PER_DOSE * star.numbers(block, "rlnMicrographPreExposure", "the dose")
    # the tilts' own angles come from the poses, below
    table = tilt_table(columns | {"rlnAngleTilt": np.zeros(len(turns))}, relion.microscope(star), star.path)
    rotation, origin = np.zeros((len(rows), 3, 3)), np.zeros((len(rows), 3))
    residual = np.zeros((len(turns), 2))
    for i, members in enumerate(rows):
        rotation[i] = _particle_rotation(turns[members], table[members])
        tilts = turns[members] @ rotation[i].T
        table[members, :3] = tilt_angles(tilts)
        plane = tilts[:, :2].reshape(-1, 3)
        origin[i] = np.linalg.lstsq(plane, shifts[members, :2].ravel(), rcond=1e-3)[0]
        residual[members] = shifts[members, :2] - (plane @ origin[i]).reshape(-1, 2)
    order = np.concatenate(rows)
    counts = [len(members) for members in rows]
    named = star.has(block, "rlnTomoParticleName") or star.has(block, "rlnGroupName")
    by = "rlnGroupName" if named else "their stack: there is no rlnGroupName"
    note = f"{len(order)} images are {len(rows)} particles by {by}, {min(counts)} to {max(counts)} images a particle"
    return Imaging(
        to_euler(rotation), rotation, origin, "tilts", (), table[order], offsets_of(counts), _numbers(star)[order],
        residual[order], (note, origin_note),
    )  # fmt: skip


def _particle_rotation(turns: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A of a particle from A_t of its images (T, 3, 3) and their rows of TILT_COLUMNS.

    The least tilted image has the largest scale, cos(tilt) where files say so, else the least dose.
    """
    reference = turns[np.lexsort((table[:, _BFACTOR], -table[:, SCALE]))[0]]
    vectors = Rotation.from_matrix(turns @ reference.T).as_rotvec()
    size = np.linalg.norm(vectors, axis=1)
    axes = vectors[size > _LEAST_TURN] / size[size > _LEAST_TURN, None]
    if len(axes) == 0:
        return reference
    _, _, directions = np.linalg.svd(axes)
    x, y = directions[0, :2] * np.where(directions[0, 1] < 0, -1, 1)
    # turn about the beam, by as little as brings the axis to y
    turn = Rotation.from_rotvec([0, 0, np.arctan2(x, y)]).as_matrix()
    return turn @ reference


def _numbers(star: StarFile) -> NDArray[np.int64]:
    """(rows,) image of the stack, from 0."""
    numbers = [name.split("@")[0] for name in relion.image_names(star)]
    for row, number in enumerate(numbers):
        if not number.isdigit() or int(number) < 1:
            raise UserError(
                f"{star.path}: column _rlnImageName, row {row + 1}: {number!r} in front of @ is not the number of an "
                "image (from 1); correct it"
            )
    return np.array(numbers, np.int64) - 1


def poses_in_file(
    source: Source, pixel_size: float, euler: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Euler angles and origins (rows, 3) of every image where the particles have these."""
    star, rows = source.whole, source.rows
    assert rows is not None
    given, rotation = _read(source, pixel_size), to_matrix(euler)
    angles, shifts = relion.eulers(star), relion.origins(star, pixel_size)[0]
    turns = to_matrix(angles)
    for i, members in enumerate(rows):
        tilts = turns[members] @ given.rotation[i].T
        angles[members] = to_euler(tilts @ rotation[i])
        shifts[members, :2] += (tilts @ (origin[i] - given.origin[i]))[:, :2]
    return angles, shifts
