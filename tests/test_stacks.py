"""Tilt images of a simulated set as a RELION 5 optimisation set: geometry, defocus, frames and pixels.

The STAR files are read here with the ``starfile`` package and the formulas of RELION's source, not with our code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.config import SimulateConfig
from opustomo.data.mrc import header_of, read_volume, write_stack
from opustomo.simulate import dataset, tilt_series
from opustomo.simulate.molecule import Beads
from opustomo.simulate.plan import TOMOGRAM_SIZE, Preset, make_plan
from opustomo.simulate.tilt_series import TiltSeries

BOX, PIXEL, COUNT = 36, 10.0, 5
SERIES = TiltSeries(BOX, PIXEL)
FINER = 8  # images are enlarged by this to find a maximum


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy")
    dataset.main(SimulateConfig(output=folder, n=COUNT, box=BOX, stacks=True))
    return folder


def read_set(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Blocks of the particles and of the tomograms, found by way of the optimisation set."""
    names = starfile.read(folder / "optimisation_set.star", always_dict=True)[""]
    particles = starfile.read(folder / names["rlnTomoParticlesFile"], always_dict=True)
    return particles, starfile.read(folder / names["rlnTomoTomogramsFile"], always_dict=True)


def projection(tilts: Any) -> NDArray[np.float64]:
    """(T, 4, 4) of a tilt table."""
    rows = [[np.fromstring(text.strip("[]"), sep=",") for text in tilts[f"rlnTomoProj{axis}"]] for axis in "XYZW"]
    return np.stack([np.stack(row) for row in rows], 1)


def values(row: Any, name: str, unit: str = "") -> NDArray[np.float64]:
    return np.array([row[f"rln{name}{axis}{unit}"] for axis in "XYZ"], float)


def maximum(image: NDArray[np.floating]) -> NDArray[np.float64]:
    """Position (x, y) in pixels of the maximum of a band-limited image, to 1 / FINER pixel."""
    centred = np.fft.fftshift(np.fft.fft2(image))
    padded = np.pad(centred, (FINER - 1) * BOX // 2)
    fine = np.fft.ifft2(np.fft.ifftshift(padded)).real
    y, x = np.unravel_index(fine.argmax(), fine.shape)
    return np.array([x, y]) / FINER


def test_geometry_puts_a_bead_where_the_image_has_its_maximum(tmp_path: Path) -> None:
    preset = Preset(n=3, box=BOX, rot_err=0.0, shift_err=0.0)
    bead = np.array([60.0, -30.0, 45.0])  # Angstrom, in the frame of the consensus map
    blobs = {i: Beads(bead[None], np.array([8.0]), np.array([1000.0])) for i in range(preset.n)}
    # 8000 A: the CTF stays positive up to Nyquist, so a bead is a peak
    middle = {"coordinates": np.tile(TOMOGRAM_SIZE / 2, (preset.n, 1)), "defocus": np.full(preset.n, 8000.0)}
    plan = replace(make_plan(preset, 3), blobs=blobs, **middle)
    dataset.write_stack_tables(tmp_path, preset, plan, SERIES)
    for i, one in enumerate(dataset.observations(plan, SERIES, 0.0, 3)):
        write_stack(tmp_path / dataset.stack_name(i), one.images, PIXEL)

    particles, tomograms = read_set(tmp_path)
    for _, row in particles["particles"].iterrows():
        euler = [row.rlnAngleRot, row.rlnAngleTilt, row.rlnAnglePsi]
        turn = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().T
        within = (turn @ bead - values(row, "Origin", "Angst")) / PIXEL
        tilts = projection(tomograms[row.rlnTomoName])
        stack = mrcfile.read(tmp_path / row.rlnImageName)
        for t in (0, 13, 20, 40):
            place = tilts[t] @ np.append(values(row, "Coordinate") + within, 1)
            middle_of_box = tilts[t] @ np.append(values(row, "Coordinate"), 1)
            expected = (place - middle_of_box)[:2] + BOX // 2
            assert np.abs(maximum(stack[t]) - expected).max() < 0.15


def test_the_middle_of_the_tomogram_is_the_middle_of_every_image(noisy: Path) -> None:
    _, tomograms = read_set(noisy / "stacks")
    table = tomograms["global"].iloc[0]
    middle = np.append(values(table, "TomoSize") / 2, 1)
    assert np.allclose(projection(tomograms[table.rlnTomoName]) @ middle, middle, atol=1e-4)


def test_images_are_those_the_subtomograms_are_made_of(noisy: Path) -> None:
    matrix = tilt_series.backprojection_matrix(SERIES)
    for name in dataset.image_names(COUNT):
        volume, _ = read_volume(noisy / name)
        stack = mrcfile.read((noisy / "stacks" / Path(name).name).with_suffix(".mrcs"))
        again = tilt_series.backproject(torch.fft.rfftn(torch.from_numpy(stack.copy())[None], dim=(-2, -1)), matrix)[0]
        assert np.linalg.norm(again - volume) < 0.01 * np.linalg.norm(volume)


def test_defocus_dose_and_scale_agree_with_the_ctf_files(noisy: Path) -> None:
    particles, tomograms = read_set(noisy / "stacks")
    for i, row in particles["particles"].iterrows():
        table = tomograms["global"].set_index("rlnTomoName").loc[row.rlnTomoName]
        tilts, expected = tomograms[row.rlnTomoName], starfile.read(noisy / f"subtomo/p{i:05d}_ctf.star")
        ends = np.stack([values(row, "Coordinate"), values(table, "TomoSize") / 2], 1)
        place, middle = np.moveaxis(projection(tilts) @ np.vstack([ends, np.ones(2)]), 2, 0)
        depth = (place - middle)[:, 2] * table.rlnTomoTiltSeriesPixelSize
        assert np.allclose(tilts.rlnDefocusU + table.rlnTomoHand * depth, expected.rlnDefocusU, atol=0.1)
        assert np.allclose(tilts.rlnCtfScalefactor, expected.rlnCtfScalefactor, atol=1e-5)
        mean_dose = tilts.rlnMicrographPreExposure + table.rlnTomoImportFractionalDose / 2
        assert np.allclose(table.rlnCtfBfactorPerElectronDose * mean_dose, expected.rlnCtfBfactor)


def test_tables_say_what_the_stacks_are(noisy: Path) -> None:
    particles, tomograms = read_set(noisy / "stacks")
    optics, rows = particles["optics"].iloc[0], particles["particles"]
    assert particles["general"]["rlnTomoSubTomosAre2DStacks"] == 1
    assert (optics.rlnImageDimensionality, optics.rlnCtfDataAreCtfPremultiplied) == (2, 0)
    assert (optics.rlnImageSize, optics.rlnImagePixelSize) == (BOX, PIXEL)
    assert len(rows) == COUNT and rows.rlnTomoParticleName.is_unique
    volumes = starfile.read(noisy / "particles.star")
    assert np.allclose(rows.rlnAngleTilt, volumes.rlnAngleTilt) and np.allclose(
        rows.rlnOriginZAngst, 10 * volumes.rlnOriginZ, atol=1e-3
    )
    frames = len(SERIES.tilts)
    assert (tomograms["global"].rlnTomoFrameCount == frames).all()
    for row in rows.itertuples():
        assert row.rlnTomoVisibleFrames == "[" + ",".join("1" * frames) + "]"
        assert header_of(noisy / "stacks" / row.rlnImageName)[:2] == ((frames, BOX, BOX), PIXEL)
        with mrcfile.open(noisy / "stacks" / row.rlnImageName) as mrc:
            assert mrc.is_image_stack()


def test_stacks_are_written_only_when_asked_for_and_replaced_whole(tmp_path: Path) -> None:
    config = SimulateConfig(output=tmp_path / "set", n=2, box=BOX, stacks=True)
    dataset.main(config)
    dataset.main(replace(config, n=1))
    assert len(list((tmp_path / "set" / "stacks").glob("*.mrcs"))) == 1
    dataset.main(replace(config, stacks=False))
    assert not list((tmp_path / "set" / "stacks").iterdir())
