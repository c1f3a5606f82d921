"""The simulator: the mini-ribosome, image formation, poses and the files of a simulated set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import starfile
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.config import InputOptions, SimulateConfig
from opustomo.data.mrc import header_of, read_volume
from opustomo.data.readers import read_particles
from opustomo.errors import UserError
from opustomo.simulate import bead_model, dataset, tilt_series
from opustomo.simulate.bead_model import assemble
from opustomo.simulate.molecule import Beads, gaussian_volume
from opustomo.simulate.plan import BLOB, EMPTY, GOOD, MISPLACED, PRESETS, Preset, chosen_preset, make_plan
from opustomo.simulate.tilt_series import TiltSeries
from opustomo.simulate.truth import write_truth

BOX, PIXEL = 36, 10.0
SERIES = TiltSeries(BOX, PIXEL)


def simulate(output: Path, **options: object) -> Path:
    dataset.main(SimulateConfig(output=output, **({"n": 12, "box": BOX} | options)))  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four states, no noise, poses written as they are."""
    return simulate(tmp_path_factory.mktemp("clean"), snr=0.0, rot_err=0.0, shift_err=0.0)


def relion_matrix(rot: float, tilt: float, psi: float) -> NDArray[np.float64]:
    """A = Rz(psi) Ry(tilt) Rz(rot), spelt out: the page on conventions, not our code."""

    def rz(t: float) -> NDArray[np.float64]:
        return np.array([[np.cos(t), np.sin(t), 0], [-np.sin(t), np.cos(t), 0], [0, 0, 1]])

    def ry(t: float) -> NDArray[np.float64]:
        return np.array([[np.cos(t), 0, -np.sin(t)], [0, 1, 0], [np.sin(t), 0, np.cos(t)]])

    a, b, c = np.deg2rad([rot, tilt, psi])
    return np.asarray(rz(c) @ ry(b) @ rz(a))


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# ------------------------------------------------------------------------------------------------- bead model


def test_masses_of_the_states_are_those_of_ribosomes() -> None:
    mass = [assemble(s, 0.0).weight.sum() for s in range(4)]
    assert mass[1] / mass[0] == pytest.approx(1.57, abs=0.03)  # 2.3 MDa to 1.45 MDa
    assert mass[2] - mass[1] == pytest.approx(0.0118 * mass[1], rel=0.1)  # a tRNA of 25 kDa
    assert mass[3] - mass[1] == pytest.approx(3 * (mass[2] - mass[1]), rel=0.02)


def test_bead_file_is_small_and_names_its_source_and_licence() -> None:
    path = Path(bead_model.__file__).with_name("beads_70s.json")
    text = json.loads(path.read_text())
    assert path.stat().st_size < 100_000
    assert "4V5D" in text["source"] and "CC0" in text["licence"]
    assert 300 <= sum(len(beads.weight) for beads in bead_model.domains().values()) <= 600


def test_origin_is_the_centre_of_the_70s() -> None:
    beads = assemble(1, 0.0)
    assert np.abs(np.average(beads.centre, axis=0, weights=beads.weight)).max() < 0.1
    assert 120 < np.linalg.norm(beads.centre, axis=1).max() < 150


def test_rotation_turns_the_small_subunit_alone_as_a_rigid_body() -> None:
    still, turned = assemble(3, 0.0), assemble(3, 8.0)
    large = len(bead_model.domains()["50S"].weight)
    small = slice(large, large + len(bead_model.domains()["30S"].weight))
    moved = np.linalg.norm(turned.centre - still.centre, axis=1)
    assert moved[:large].max() == 0 and moved[small.stop :].max() == 0
    assert 10 < moved[small].max() < 20  # the rim of a body of 100 A radius at 8 degrees
    fitted, error = Rotation.align_vectors(turned.centre[small], still.centre[small])
    assert np.rad2deg(fitted.magnitude()) == pytest.approx(8.0, abs=1e-3)
    assert error < 1e-3
    # counter-clockwise as seen from the solvent side of the 30S: right-handed about the axis towards the viewer
    assert fitted.as_rotvec() @ still.centre[small].mean(0) > 0


def test_volume_holds_the_mass_of_its_beads() -> None:
    beads = assemble(2, 3.0)
    volume = gaussian_volume(beads, 40, 10.0)
    assert volume.sum() * 1000.0 == pytest.approx(beads.weight.sum(), rel=1e-4)


def test_volume_axes_are_z_y_x_about_voxel_half_box() -> None:
    bead = Beads(np.array([[40.0, -20.0, 10.0]]), np.array([12.0]), np.array([1.0]))
    peak = np.unravel_index(gaussian_volume(bead, BOX, PIXEL).argmax(), (BOX,) * 3)
    assert peak == (BOX // 2 + 1, BOX // 2 - 2, BOX // 2 + 4)


# ---------------------------------------------------------------------------------------------- image formation


def test_untilted_projection_is_the_sum_along_the_beam() -> None:
    beads = assemble(3, 4.0)
    untilted = tilt_series.project([beads], SERIES)[0, len(SERIES.tilts) // 2].numpy()
    expected = np.fft.rfft2(gaussian_volume(beads, BOX, PIXEL).sum(0))
    below = np.arange(BOX) != BOX // 2  # maps have no Nyquist term
    difference = (untilted - expected)[below, :-1]
    assert np.abs(difference).max() < 1e-4 * np.abs(expected).max()


def test_tilted_projection_follows_relions_tilt_angle() -> None:
    beads = assemble(1, 0.0)
    turned = beads.moved(relion_matrix(0, 45.0, 0), np.zeros(3))
    zero, tilted = len(SERIES.tilts) // 2, int(np.flatnonzero(SERIES.tilts == 45.0)[0])
    images = tilt_series.project([beads, turned], SERIES)
    assert torch.allclose(images[0, tilted], images[1, zero], atol=1e-3 * float(images.abs().max()))
    assert not torch.allclose(images[0, -1 - tilted], images[1, zero], atol=0.05 * float(images.abs().max()))


def test_ctf_crosses_zero_where_theory_says() -> None:
    wavelength = 0.0196875  # Angstrom at 300 kV
    defocus, cs = 30000.0, 2.7e7
    # pi lambda df s^2 - pi/2 Cs lambda^3 s^4 + asin(w) = pi, a quadratic in s^2
    roots = np.roots([-0.5 * np.pi * cs * wavelength**3, np.pi * wavelength * defocus, np.arcsin(0.07) - np.pi])
    zero = roots.real.min()
    assert 1 / np.sqrt(zero) == pytest.approx(24.6, abs=0.1)
    near = tilt_series.ctf(np.array([0.0, 0.999 * zero, 1.001 * zero]), defocus, SERIES)
    assert near[0] == pytest.approx(0.07)  # bright protein: positive below the first zero
    assert near[1] > 0 > near[2]


def test_dose_damps_and_is_least_at_the_untilted_image() -> None:
    weights = tilt_series.transfer(np.full((1, len(SERIES.tilts)), 30000.0), SERIES)[0].abs()
    assert SERIES.bfactor.argmin() == len(SERIES.tilts) // 2
    assert SERIES.bfactor.min() == pytest.approx(4 * 3.0 * 0.5)
    last = int(SERIES.bfactor.argmax())
    assert (weights[last] <= weights[len(SERIES.tilts) // 2] + 1e-6).all()
    assert weights[last, 0, 0] == pytest.approx(0.07 * np.cos(np.deg2rad(60)), rel=1e-3)


def test_missing_wedge_holds_little_power() -> None:
    noise = tilt_series.white_noise(2, SERIES, 1.0, torch.Generator().manual_seed(0))
    volumes = tilt_series.backproject(noise, tilt_series.backprojection_matrix(SERIES))
    power = (np.abs(np.fft.fftn(volumes, axes=(1, 2, 3))) ** 2).mean(0)
    k = np.fft.fftfreq(BOX) * BOX
    kz, kx = np.abs(k)[:, None, None], np.abs(k)[None, None, :]
    ball = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2 < (0.45 * BOX) ** 2
    # two Fourier voxels beyond the planes of the outermost tilts
    missing = ball & (kz * np.cos(np.pi / 3) - kx * np.sin(np.pi / 3) > 2)
    assert missing.sum() > 0.1 * ball.sum()
    assert power[missing].sum() < 0.03 * power[ball].sum()


def test_snr_is_the_ratio_of_variances_in_the_central_sphere() -> None:
    preset = Preset(n=8, box=BOX, snr=0.25)
    plan = make_plan(preset, 5)
    pure, noisy = (
        np.stack([one.subtomogram for one in dataset.observations(plan, SERIES, snr, 5)]) for snr in (0.0, 0.25)
    )
    axis = np.arange(BOX) - BOX // 2
    sphere = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 0.42 * BOX
    assert pure[:, sphere].var() / (noisy - pure)[:, sphere].var() == pytest.approx(0.25, rel=0.1)


# -------------------------------------------------------------------------------------------------- data sets


def test_particles_lie_at_a_c_minus_origin(clean: Path) -> None:
    labels = np.load(clean / "labels.npz")
    table = starfile.read(clean / "particles.star")
    better = []
    for i in np.flatnonzero(labels["state"] > 0)[:4]:
        row = table.iloc[i]
        turn = relion_matrix(row.rlnAngleRot, row.rlnAngleTilt, row.rlnAnglePsi)
        shift = row[["rlnOriginX", "rlnOriginY", "rlnOriginZ"]].to_numpy(float) * PIXEL
        model = assemble(int(labels["state"][i]), labels["hinge"][i])
        data, _ = read_volume(clean / row.rlnImageName)
        scores = [
            correlation(data, gaussian_volume(model.moved(a, s), BOX, PIXEL))
            for a, s in ((turn, -shift), (turn, shift), (turn.T, -shift), (turn, 0 * shift))
        ]
        better.append(scores[0] - max(scores[1:]))
    assert min(better) > 0.02


def test_labels_agree_with_the_files(clean: Path) -> None:
    labels = np.load(clean / "labels.npz")
    table = starfile.read(clean / "particles.star")
    assert len(table) == len(labels["state"]) == 12
    assert list(table.rlnImageName) == [f"subtomo/p{i:05d}.mrc" for i in range(12)]
    for name in table.rlnImageName:
        assert header_of(clean / name)[:2] == ((BOX,) * 3, PIXEL)
    pose = table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY", "rlnOriginZ"]].to_numpy()
    assert np.abs(pose - labels["true_pose"][:, :6]).max() < 1e-4
    assert np.array_equal(np.isnan(labels["hinge"]), labels["state"] == 0)
    assert sorted(np.bincount(labels["state"])) == [3, 3, 3, 3]
    hinge = labels["hinge"][labels["state"] > 0]
    assert hinge.min() >= 0 and hinge.max() <= 8
    assert len(set(table.rlnMicrographName)) in (2, 3)
    names = {path.name for path in (clean / "gt").iterdir()}
    assert {"state0_hinge+0.0.mrc", "state3_hinge+8.0.mrc"} < names and len(names) == 16
    assert json.loads((clean / "sim.json").read_text())["state_names"]["2"] == "70S+P"


def test_ctf_tables_carry_the_true_defocus_and_geometry(clean: Path) -> None:
    labels = np.load(clean / "labels.npz")
    tilts = starfile.read(clean / "subtomo" / "p00003_ctf.star")
    row = starfile.read(clean / "particles.star").iloc[3]
    across, height = ((row[f"rlnCoordinate{axis}"] - size / 2) * PIXEL for axis, size in (("X", 928), ("Z", 320)))
    angle = np.deg2rad(labels["tilts"])
    depth = across * np.sin(angle) + height * np.cos(angle)  # along the beam, from the middle of the tomogram
    expected = labels["true_pose"][3, 6] - height + depth
    assert np.allclose(tilts.rlnDefocusU, expected, atol=0.1) and np.ptp(expected) > 500
    assert np.allclose(tilts.rlnAngleTilt, labels["tilts"])
    assert np.allclose(tilts.rlnCtfBfactor, labels["bfac"], atol=1e-3) and (tilts.rlnCtfBfactor > 0).all()
    assert np.allclose(tilts.rlnCtfScalefactor, np.cos(np.deg2rad(labels["tilts"])), atol=1e-5)


def test_our_reader_finds_the_true_poses(clean: Path) -> None:
    particles = read_particles(clean / "particles.star", InputOptions())
    labels = np.load(clean / "labels.npz")
    found = (particles.dialect, particles.box, particles.pixel_size, particles.transfer)
    assert found == ("RELION 3.0", BOX, PIXEL, "tilts")
    expected = np.stack([relion_matrix(*pose) for pose in labels["true_pose"][:, :3]])
    assert np.abs(particles.rotation - expected).max() < 1e-5
    assert np.abs(particles.origin - labels["true_pose"][:, 3:6]).max() < 1e-4
    assert np.abs(particles.origin).max() <= 2 and np.abs(particles.origin).max() > 1


def test_mask_covers_every_state_and_stays_inside_the_box(clean: Path) -> None:
    mask, _ = read_volume(clean / "mask.mrc")
    assert mask.min() == 0 and mask.max() == 1
    assert mask[0].max() == mask[:, 0].max() == mask[:, :, 0].max() == 0
    for path in (clean / "gt").iterdir():
        volume, _ = read_volume(path)
        assert np.square(volume * (1 - mask)).sum() < 0.005 * np.square(volume).sum()


def test_written_poses_are_wrong_by_the_stated_errors() -> None:
    plan = make_plan(Preset(n=2000, rot_err=3.0, shift_err=0.5), 1)
    relative = plan.given_rotation @ plan.rotation.swapaxes(1, 2)
    angle = np.rad2deg(Rotation.from_matrix(relative).magnitude())
    assert np.median(angle) == pytest.approx(3.0 * 0.6745, rel=0.06)  # median of |N(0, 1)|
    assert (plan.given_origin - plan.origin).std() == pytest.approx(0.5, rel=0.05)


def test_junk_preset_has_decoys_of_three_kinds_and_says_which() -> None:
    plan = make_plan(PRESETS["junk"], 2)
    counts = np.bincount(plan.junk_kind)
    assert counts.tolist() == [300, 34, 33, 33]
    assert (plan.state[plan.junk_kind == GOOD] == 1).all()
    assert (plan.state[plan.junk_kind == BLOB] == -1).all()
    relative = plan.given_rotation @ plan.rotation.swapaxes(1, 2)
    angle = np.rad2deg(Rotation.from_matrix(relative).magnitude())
    assert angle[plan.junk_kind == GOOD].max() < 15 < np.median(angle[plan.junk_kind == MISPLACED])
    empty = int(np.flatnonzero(plan.junk_kind == EMPTY)[0])
    assert len(plan.beads(empty, PIXEL).weight) == 0


@pytest.mark.parametrize(
    ("preset", "n", "states"), [("two-state", 400, (1, 2)), ("hinge", 400, (1,)), ("few", 263, (1, 3))]
)
def test_presets(preset: str, n: int, states: tuple[int, ...], tmp_path: Path) -> None:
    chosen = chosen_preset(SimulateConfig(output=tmp_path, preset=preset))  # type: ignore[arg-type]
    plan = make_plan(chosen, 1)
    assert len(plan.state) == n and tuple(np.unique(plan.state)) == states
    write_truth(tmp_path, chosen, plan, SERIES)
    labels = np.load(tmp_path / "labels.npz")
    assert ("present" in labels) == (len(states) == 2)
    if len(states) == 2:
        assert np.array_equal(labels["present"] == 1, labels["state"] == states[1])


def test_same_seed_same_set_other_seed_another(tmp_path: Path) -> None:
    first, again, other = (simulate(tmp_path / name, n=3, seed=seed) for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert (first / "particles.star").read_text() == (again / "particles.star").read_text()
    volumes = [read_volume(folder / "subtomo" / "p00002.mrc")[0] for folder in (first, again, other)]
    assert np.array_equal(volumes[0], volumes[1]) and not np.allclose(volumes[0], volumes[2])


def test_a_simulated_set_is_replaced_whole(tmp_path: Path) -> None:
    simulate(tmp_path / "set", n=5)
    simulate(tmp_path / "set", n=3, preset="hinge")
    assert len(list((tmp_path / "set" / "subtomo").glob("*.mrc"))) == 3
    assert {path.name[:6] for path in (tmp_path / "set" / "gt").iterdir()} == {"state1"}


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty and not a simulated set"):
        simulate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": 33}, "--box 33"),
        ({"box": 24}, "needs 360 A"),
        ({"snr": -2.0}, "--snr -2"),
        ({"rot_err": -3.0}, "--rot-err -3"),
        ({"n": -1}, "above 0"),
    ],
)
def test_senseless_options_are_refused_before_anything_is_written(
    options: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
