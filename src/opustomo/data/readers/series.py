"""Flat tables with one row for each tilt image: cryoDRGN-ET, tomoDRGN, Warp 1 and M image series.

Owns: how the poses of a particle's images become one pose of the particle and its tilts.  Row t says that the particle
lies in image t turned by A_t and at ``N//2 - o_t``.  The tilts are ``R_t = A_t A^T`` for any A; A is taken so that the
least tilted image has its beam along z and the tilt axis is along y, as in a subtomogram.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.data.readers import relion
from opustomo.data.readers.ctf_star import tilt_table
from opustomo.data.readers.source import Source
from opustomo.data.readers.tilt_images import TiltImages, tilt_angles
from opustomo.data.star import StarFile
from opustomo.errors import UserError
from opustomo.physics.geometry import euler_to_matrix, matrix_to_euler

_CTF = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration",
        "rlnAmplitudeContrast", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor")  # fmt: skip
_BFACTOR_PER_DOSE = 4.0  # Angstrom^2
_LEAST_TURN = np.deg2rad(1.0)  # tilts nearer to the reference do not show the axis


def stack_names(source: Source) -> list[str]:
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


def read_series(source: Source, pixel_size: float) -> TiltImages:
    """Poses and tilts of P particles.  UserError: column missing, image number that is none."""
    star, rows = source.whole, source.rows
    assert rows is not None
    turns = euler_to_matrix(torch.from_numpy(relion.eulers(star))).numpy()
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
    offsets = np.concatenate([[0], np.cumsum([len(members) for members in rows])]).astype(np.int64)
    counts = np.diff(offsets)
    named = star.has(block, "rlnTomoParticleName") or star.has(block, "rlnGroupName")
    by = "rlnGroupName" if named else "their stack: there is no rlnGroupName"
    note = f"{len(order)} images are {len(rows)} particles by {by}, {counts.min()} to {counts.max()} images a particle"
    return TiltImages(
        matrix_to_euler(torch.from_numpy(rotation)).numpy(), rotation, origin, table[order], offsets,
        _numbers(star)[order], residual[order], (note, origin_note),
    )  # fmt: skip


def _particle_rotation(turns: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A of a particle from A_t of its images (T, 3, 3) and their rows of TILT_COLUMNS.

    The least tilted image has the largest scale, cos(tilt) where files say so, else the least dose.
    """
    reference = turns[np.lexsort((table[:, 10], -table[:, 11]))[0]]
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
    source: Source, pixel_size: float, rotation: NDArray[np.float64], origin: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Euler angles and origins (rows, 3) of every image where the particles have these poses, (P, 3, 3) and (P, 3)."""
    star, rows = source.whole, source.rows
    assert rows is not None
    given = read_series(source, pixel_size)
    euler, shifts = relion.eulers(star), relion.origins(star, pixel_size)[0]
    turns = euler_to_matrix(torch.from_numpy(euler)).numpy()
    for i, members in enumerate(rows):
        tilts = turns[members] @ given.rotation[i].T
        euler[members] = matrix_to_euler(torch.from_numpy(tilts @ rotation[i])).numpy()
        shifts[members, :2] += (tilts @ (origin[i] - given.origin[i]))[:, :2]
    return euler, shifts
