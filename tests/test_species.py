"""Poses of a species of M, written by its own columns here, for particles that are elsewhere in other poses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from opustomo.config import InputOptions, TrainConfig
from opustomo.data.particles import Particles
from opustomo.data.readers import particles_of
from opustomo.data.readers.source import Format, Source, read_source
from opustomo.data.species import with_species
from opustomo.errors import UserError
from opustomo.training.start import select_inputs
from stack_writers import SIZE, relion_angles, two_states_set
from star_sets import PIXEL, Set, put_loop

COUNT = 6
RNG = np.random.default_rng(8)
PLACE = RNG.uniform(60, 400, (COUNT, 3))  # voxels of PIXEL, where the boxes are
MOVED = RNG.uniform(-6, 6, (COUNT, 3))  # Angstrom, what M has moved the particles by
TURN = Rotation.random(COUNT, random_state=4).as_matrix()
SERIES = np.array([f"TS_{i % 2}" for i in range(COUNT)])


def put_species(path: Path, position: np.ndarray, rotation: np.ndarray, series: np.ndarray, keep: int = 0) -> Path:
    """M's table: Angstrom, one pose or (as from the second column on) several; other rows between those wanted."""
    order = np.random.default_rng(2).permutation(len(position))[keep:]
    other = np.array([[5.0, 5.0, 5.0], [2000.0, 10.0, 10.0]])
    position = np.concatenate([other, position[order]])
    angles = np.concatenate([np.zeros((2, 3)), relion_angles(rotation)[order]])
    columns = {f"wrpCoordinate{axis}1": [f"{v:.5f}" for v in position[:, i]] for i, axis in enumerate("XYZ")}
    columns |= {f"wrpAngle{n}1": [f"{v:.5f}" for v in angles[:, i]] for i, n in enumerate(("Rot", "Tilt", "Psi"))}
    columns["wrpRandomSubset"] = [str(1 + i % 2) for i in range(len(position))]
    columns["wrpSourceName"] = ["TS_0.tomostar", "TS_9.tomostar", *(f"{name}.tomostar" for name in series[order])]
    columns["wrpSourceHash"] = ["ABCDEF0123456789"] * len(position)
    put_loop(path, "", columns)
    return path


def written(folder: Path) -> Set:
    """An export of Warp (voxels of the image's own size) with first poses."""
    made = Set(folder, n=COUNT)
    for axis, values in zip("XYZ", PLACE.T, strict=True):
        made.columns[f"rlnCoordinate{axis}"] = [f"{value:.5f}" for value in values]
    made.write()
    return made


def read(star: Path) -> tuple[Particles, Source]:
    source = read_source(star)
    return particles_of(source, star, InputOptions()), source


def test_particles_get_the_poses_that_m_has_for_them(tmp_path: Path) -> None:
    star = written(tmp_path).star
    species = put_species(tmp_path / "species.star", PLACE * PIXEL + MOVED, TURN, SERIES)
    inputs = select_inputs(TrainConfig(star=star, output=tmp_path / "run", poses=species))
    found = inputs.particles
    np.testing.assert_allclose(found.rotation, TURN, atol=1e-6)
    # the centre lies at N//2 - origin
    np.testing.assert_allclose(found.origin, -MOVED / PIXEL, atol=1e-5)
    angles = Rotation.from_euler("ZYZ", found.euler, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(angles, TURN, atol=1e-6)
    assert any(note.startswith(f"poses of 6 of 8 particles of {species}, median") for note in found.notes)


@pytest.mark.parametrize("dialect", ["relion5", "relion4"])
def test_poses_go_into_the_frame_of_the_particles(dialect: Format, tmp_path: Path) -> None:
    """Of a set whose subtomograms are turned; those of RELION 4 have poses in the subtomogram's own frame."""
    truth = two_states_set(4, 5.0, step=40.0)
    truth = replace(truth, position=truth.position + np.random.default_rng(3).uniform(-90, 90, (4, 3)))
    frame, pixel = Rotation.random(4, random_state=1).as_matrix(), truth.microscope.pixel
    star = truth.write_set(tmp_path, turn=frame)
    names = np.array(["TS_1" if i % 2 else "TS_2" for i in range(4)])
    species = put_species(tmp_path / "m.star", (truth.position + SIZE / 2) * pixel + MOVED[:4], TURN[:4], names)
    given, source = read(star)
    if dialect == "relion4":
        given = replace(given, origin=np.einsum("pji,pj->pi", frame, given.origin))
        found = with_species(given, read_source(star, dialect), species, None)
        to_tomogram = frame
    else:
        found, to_tomogram = with_species(given, source, species, None), np.tile(np.eye(3), (4, 1, 1))
    np.testing.assert_allclose(to_tomogram @ found.rotation, TURN[:4], atol=1e-6)
    origin = np.einsum("pij,pj->pi", to_tomogram, found.origin)
    np.testing.assert_allclose(origin, truth.origin - MOVED[:4] / pixel, atol=1e-4)


def test_species_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    star = written(tmp_path).star
    (given, source), path = read(star), tmp_path / "species.star"

    def error(position: np.ndarray, series: np.ndarray = SERIES, keep: int = 0) -> str:
        with pytest.raises(UserError) as caught:
            with_species(given, source, put_species(path, position, TURN, series, keep), None)
        return str(caught.value)

    assert "has no tilt series TS_1 (it has TS_0, TS_9, TS_7 ...)" in error(
        PLACE * PIXEL, np.where(SERIES == "TS_1", "TS_7", SERIES)
    )
    far = error(PLACE * PIXEL / 2)  # voxels of another size
    assert "particles have none of the species within 14 A, first: sub/p" in far and "voxels of 3.5 A" in far
    absent = error(PLACE * PIXEL, keep=1)
    assert "1 of 6 particles have none of the species" in absent
    close = PLACE.copy()
    close[2] = close[0] + 1
    made = Set(tmp_path, n=COUNT)
    for axis, values in zip("XYZ", close.T, strict=True):
        made.columns[f"rlnCoordinate{axis}"] = [f"{value:.5f}" for value in values]
    given, source = read(made.write_star())
    doubled = error(PLACE * PIXEL)
    assert "particles sub/p0.mrc and sub/p2.mrc (rows 1 and 3 of" in doubled and "nearest to the same one" in doubled
    with pytest.raises(UserError, match="is a list of RELION; give a pose pickle, or a species of M"):
        with_species(given, source, star, None)


def test_a_species_alone_has_no_images(tmp_path: Path) -> None:
    path = put_species(tmp_path / "species.star", PLACE, TURN, SERIES)
    with pytest.raises(UserError, match="is a species of M, which names no images; export its particles"):
        read_source(path)
