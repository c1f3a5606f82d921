"""``dsd`` and ``dsdsh`` on tilt images: the poses that were written, classes as files of the same dialect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from opustomo.compat import dsd, dsdsh
from opustomo.config import InputOptions
from opustomo.data.pickles import load_poses, save_pickle
from opustomo.data.poses import with_poses
from opustomo.data.readers import read_particles
from stack_writers import Set, native_turns, two_states_set

BOX, COUNT = 16, 4


@pytest.fixture(scope="module")
def made() -> Set:
    return two_states_set(COUNT, 5.0, box=BOX, turns=native_turns(np.arange(-60.0, 61.0, 40.0)), step=40.0)


def star_of(made: Set, form: str, folder: Path) -> Path:
    if form == "set":
        turn = Rotation.random(COUNT, random_state=3).as_matrix()
        return made.write_set(folder, native=True, turn=turn)
    return made.write_series(folder, warp1=form == "warp1")


@pytest.mark.parametrize("form", ["set", "flat", "warp1"])
def test_poses_of_tilt_images(made: Set, form: str, tmp_path: Path) -> None:
    """One pose for each particle; a training with the pickle has what it has without."""
    star, pixel = star_of(made, form, tmp_path), str(made.microscope.pixel)
    assert dsdsh.main(["prepare", str(star), str(BOX), pixel]) == 0
    poses = load_poses(star.with_name(f"{star.stem}_pose_euler.pkl"))
    particles = read_particles(star, InputOptions())
    if form == "set":  # of a flat table the frame is that of the least tilted image
        np.testing.assert_allclose(poses.rotation, made.rotation, atol=1e-5)
        np.testing.assert_allclose(poses.origin * BOX, made.origin, atol=1e-4)
    found = with_poses(particles, *poses)
    np.testing.assert_allclose(found.rotation, particles.rotation, atol=1e-5)
    np.testing.assert_allclose(found.origin, particles.origin, atol=1e-4)
    assert not any("disagree" in note for note in found.notes)
    angles = Rotation.from_euler("ZYZ", poses.euler, degrees=True).inv().as_matrix()
    np.testing.assert_allclose(poses.rotation, angles, atol=1e-4)


def test_box_and_pixel_size_are_compared(made: Set, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    star, pixel = star_of(made, "set", tmp_path), str(made.microscope.pixel)
    for line, words in (([str(BOX + 2), pixel], "BOX 18: "), ([str(BOX), "3.3"], "APIX 3.3")):
        assert dsdsh.main(["prepare", str(star), *line]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("form", ["set", "flat"])
def test_classes_of_tilt_images(made: Set, form: str, tmp_path: Path) -> None:
    """A class of a set is a set, of a flat table all images of its particles."""
    star, pixel = star_of(made, form, tmp_path), str(made.microscope.pixel)
    save_pickle(tmp_path / "labels.pkl", np.array([1, 0, 1, 1]))
    line = ["parse_pose_star", str(star), "-D", str(BOX), "--Apix", pixel, "--labels", str(tmp_path / "labels.pkl")]
    assert dsd.main([*line, "--outdir", str(tmp_path / "classes")]) == 0
    suffix = "_optimisation_set" if form == "set" else ""
    given = read_particles(star, InputOptions())
    for label, rows in ((0, [1]), (1, [0, 2, 3])):
        part = read_particles(tmp_path / f"classes/pre{label}{suffix}.star", InputOptions(datadir=star.parent))
        assert list(part.names) == list(given.names[rows])
        assert np.array_equal(part.tilts, given.subset(np.array(rows)).tilts)
