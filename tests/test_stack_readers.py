"""Every dialect of tilt images gives the particles that were written, and is written back whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from fourier_simulator import Microscope, random_poses, two_states
from opustomo.config import InputOptions
from opustomo.data.export import CorrectedPoses, write_subset
from opustomo.data.observe import Noise, observe
from opustomo.data.particles import Particles
from opustomo.data.readers import poses_of, read_particles
from opustomo.data.readers.source import read_source
from opustomo.data.star import read_star
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies, fourier_resize, from_band, irfft3
from opustomo.physics.geometry import euler_to_matrix, matrix_to_euler
from opustomo.physics.grid import make_grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, spherical_mask
from stack_writers import Set, native_turns, put_stack, relion_angles, two_states_set
from star_sets import SHARED, put_loop, put_volume, relion31

TILTS = np.arange(-60.0, 61.0, 10.0)


def made(native: bool = False, twice: bool = False) -> Set:
    return two_states_set(4, 5.0, turns=native_turns(TILTS) if native else None, step=10.0, twice=twice)


@pytest.fixture(scope="module")
def plain() -> Set:
    return made()


def assert_particles(found: Particles, truth: Set, rotation: bool = True) -> None:
    """Poses, halves and every image's orientation, shift, defocus and envelope are those that were written."""
    if rotation:
        assert np.abs(found.rotation - truth.rotation).max() < 1e-6
        assert np.abs(found.origin - truth.origin).max() < 1e-4
    frames = euler_to_matrix(torch.from_numpy(found.tilts[:, :3])).numpy().reshape(4, -1, 3, 3)
    assert np.abs(frames @ found.rotation[:, None] - truth.angles).max() < 1e-5
    shift = np.einsum("ptij,pj->pti", frames, found.origin)[..., :2] + found.tilt_shifts.reshape(4, -1, 2)
    assert np.abs(shift - np.einsum("tij,pj->pti", truth.turns, truth.origin)[..., :2]).max() < 1e-4
    table = found.tilts.reshape(4, len(truth.turns), 13)
    assert np.abs(table[..., 3] - truth.defocus).max() < 0.05
    assert np.abs(table[..., 10] - truth.microscope.bfactor).max() < 0.01
    assert np.abs(table[..., 11] - truth.microscope.scale).max() < 1e-5
    assert found.half.tolist() == [1, 2, 1, 2]
    assert (found.box, found.premultiplied) == (32, truth.twice) and found.pixel_size == pytest.approx(7.5)


def numerators(particles: Particles) -> torch.Tensor:
    grid = make_grid(32, 7.5, 0.75, 12)
    noise = Noise(torch.ones(len(band_frequencies(24))), 1.0, False, torch.zeros(13))
    return torch.stack([torch.cat([part.flatten() for part in observe(particles, i, grid, noise)]) for i in range(4)])


def test_one_set_in_every_dialect_is_one_set(plain: Set, tmp_path: Path) -> None:
    stars = {
        "RELION 5": plain.write_set(tmp_path / "set"),
        "tilt images": plain.write_series(tmp_path / "flat"),
        "Warp 1": plain.write_series(tmp_path / "warp", warp1=True),
    }
    found = {name: read_particles(star, InputOptions()) for name, star in stars.items()}
    rows = numerators(found["RELION 5"])
    for name, particles in found.items():
        assert_particles(particles, plain)
        assert particles.dialect == name.replace("Warp 1", "tilt images")
        other = numerators(particles)
        assert float((other - rows).norm() / rows.norm()) < 1e-3
    assert "by rlnGroupName, 13 to 13 images" in " ".join(found["Warp 1"].notes)


@pytest.mark.parametrize("twice", [False, True])
def test_native_tilt_series_with_every_angle(tmp_path: Path, twice: bool) -> None:
    truth = made(native=True, twice=twice)
    assert_particles(read_particles(truth.write_set(tmp_path, native=True), InputOptions()), truth)
    matrices = read_particles(truth.write_set(tmp_path / "proj"), InputOptions())
    assert_particles(matrices, truth)
    series = read_particles(truth.write_series(tmp_path / "flat"), InputOptions())
    assert_particles(series, truth, rotation=False)
    # the frame of a flat table has its beam along z and the tilt axis along y, as a subtomogram
    frames = euler_to_matrix(torch.from_numpy(series.tilts[:13, :3])).numpy()
    assert np.abs(frames[6, 2] - [0, 0, 1]).max() < 1e-6
    axes = Rotation.from_matrix(frames[[0, 3, 9, 12]] @ frames[6].T).as_rotvec()
    own_axis = np.abs(np.cross(axes, frames[6] @ [0, 1, 0])).max() / np.linalg.norm(axes, axis=1).min()
    assert own_axis < 0.12  # 4 degrees of X tilt lie between them


@pytest.mark.parametrize("warp", [False, True])
def test_images_that_are_not_visible(plain: Set, tmp_path: Path, warp: bool) -> None:
    """RELION leaves them out of the stack, WarpTools leaves them in."""
    found = read_particles(plain.write_set(tmp_path, hidden=4, warp=warp), InputOptions())
    assert np.diff(found.tilt_offsets).tolist() == [12] * 4
    kept = [i for i in range(13) if i != 4]
    assert found.slices[:12].tolist() == (kept if warp else list(range(12)))
    assert np.allclose(found.tilts[:12, 1], TILTS[kept], atol=1e-5)


def test_orientation_of_the_subtomogram_turns_pose_and_origin(plain: Set, tmp_path: Path) -> None:
    turn = Rotation.random(4, rng=np.random.default_rng(2)).as_matrix()
    star = plain.write_set(tmp_path, turn=turn)
    found = read_particles(star, InputOptions())
    assert_particles(found, plain)
    # and back: corrected poses are written in the frame of the file
    moved = Rotation.from_rotvec([0.1, 0.2, -0.1]).as_matrix() @ plain.rotation
    poses = CorrectedPoses(matrix_to_euler(torch.from_numpy(moved)).numpy(), plain.origin + 1.0, 7.5)
    write_subset(read_source(star), np.array([2, 0]), tmp_path / "out.star", poses=poses.at(np.array([2, 0])))
    again = read_particles(tmp_path / "out_optimisation_set.star", InputOptions())
    assert np.abs(again.rotation - moved[[2, 0]]).max() < 1e-5
    assert np.abs(again.origin - plain.origin[[2, 0]] - 1.0).max() < 1e-3


def test_corrected_poses_of_a_flat_table(tmp_path: Path) -> None:
    truth = made(native=True)
    star = truth.write_series(tmp_path)
    given = read_particles(star, InputOptions())
    moved = given.rotation @ Rotation.from_rotvec([0.1, 0.2, -0.1]).as_matrix()
    poses = CorrectedPoses(
        matrix_to_euler(torch.from_numpy(moved)).numpy(), given.origin + np.array([1.0, -0.5, 0.7]), 7.5
    )
    write_subset(read_source(star), np.arange(4), tmp_path / "out.star", poses=poses)
    again = read_particles(tmp_path / "out.star", InputOptions())
    frames = [euler_to_matrix(torch.from_numpy(p.tilts[:, :3])).numpy().reshape(4, -1, 3, 3) for p in (given, again)]
    assert np.abs(frames[1] @ again.rotation[:, None] - frames[0] @ moved[:, None]).max() < 1e-5
    shifts = [np.einsum("ptij,pj->pti", f, p.origin)[..., :2] for f, p in zip(frames, (given, again), strict=True)]
    change = np.einsum("ptij,j->pti", frames[0], [1.0, -0.5, 0.7])[..., :2]
    assert np.abs(shifts[1] - shifts[0] - change).max() < 1e-3


def test_coordinates_of_warptools_are_pixels_of_its_images(plain: Set, tmp_path: Path) -> None:
    star = plain.write_set(tmp_path)
    particles = tmp_path / "particles.star"
    lines = []
    for line in particles.read_text().split("\n"):
        words = line.split()
        if words and words[0].startswith("TS_"):
            words[-3:] = [f"{float(value) / 4:.5f}" for value in words[-3:]]
        elif words and words[0] == "1" and len(words) > 5:
            words[5:7] = ["1.875", "4"]
        lines.append(" ".join(words))
    particles.write_text("\n".join(lines))
    tomograms = tmp_path / "tomograms.star"
    text = tomograms.read_text().replace(" 7.5 300", " 1.875 300").replace("rlnTomoFrameCount", "rlnTomoTiltSeriesName")
    tomograms.write_text(text.replace(" -1.0 13", " -1.0 ../dummy_tiltseries.mrc"))
    again = read_particles(star, InputOptions())
    assert any("pixels of the extracted images" in note for note in again.notes)
    place = np.array([[float(v) for v in row] for row in read_star(particles).particles.iloc[:, -3:].to_numpy()])
    expected = -np.einsum("tj,pj->pt", plain.turns[:, 2], (place * 4 - [200, 210, 80]) * 1.875 - plain.origin * 7.5)
    assert np.abs(again.tilts[:, 3].reshape(4, -1) - 27000.0 - expected).max() < 0.1


def test_dose_filter_where_no_bfactor_is_stated(plain: Set, tmp_path: Path) -> None:
    star = plain.write_set(tmp_path)
    tomograms = tmp_path / "tomograms.star"
    tomograms.write_text(tomograms.read_text().replace("rlnCtfBfactor", "rlnMicrographPreExposure"))
    found = read_particles(star, InputOptions())
    assert not found.tilts[:, 10].any()
    assert np.allclose(found.tilts[:13, 12], plain.microscope.bfactor, atol=1e-3)


def test_pseudo_subtomograms_keep_their_own_frame(tmp_path: Path) -> None:
    """RELION 4: sums of CTF-multiplied slices; the poses are in the subtomogram's frame, whatever its orientation."""
    one = relion31(tmp_path)
    one.optics["rlnCtfDataAreCtfPremultiplied"] = ["1"]
    one.columns["rlnTomoParticleName"] = [f"TS_1/{i}" for i in range(4)]
    for name in ("Rot", "Tilt", "Psi"):
        one.columns[f"rlnTomoSubtomogram{name}"] = ["30.0"] * 4
    star = one.write(ctf=False)
    weight = np.random.default_rng(0).uniform(1, 2, (32, 16, 9)).astype(np.float32)
    for i in range(4):
        put_stack(tmp_path / f"sub/p{i}_ctf.mrc", weight, 1 / 3.5)
    found = read_particles(star, InputOptions())
    assert (found.dialect, found.transfer, found.premultiplied) == ("RELION 4", "weight_volume", True)
    angles = np.array([[float(one.columns[f"rlnAngle{n}"][i]) for n in ("Rot", "Tilt", "Psi")] for i in range(4)])
    assert np.allclose(found.rotation, euler_to_matrix(torch.from_numpy(angles)).numpy())
    put_loop(tmp_path / "optimisation_set.star", "", {"rlnTomoParticlesFile": ["particles.star"]})
    again = read_particles(tmp_path / "optimisation_set.star", InputOptions())
    assert again.dialect == "RELION 4" and np.array_equal(again.rotation, found.rotation)


def test_numerator_of_pseudo_subtomograms_is_weight_times_volume(tmp_path: Path) -> None:
    """Sums of premultiplied slices with CTF^2 and multiplicity as RELION 4 stores them, simulated independently."""
    microscope = Microscope(32, 7.5, np.arange(-60.0, 61.0, 4.0))
    one, rng = relion31(tmp_path), np.random.default_rng(4)
    rotation, origin = random_poses(4, rng)
    beads = two_states(32, 3)[0]
    for i in range(4):
        images = microscope.images(beads, rotation[i], origin[i], 26000.0, np.zeros((31, 32, 32)), twice=True)
        put_volume(tmp_path / f"sub/p{i}.mrc", microscope.mean_volume(images, mean=False), 7.5)
        full = [microscope.mean_transfer(26000.0, power, mean=False) for power in (2, 0)]
        halves = [np.fft.ifftshift(volume)[..., :17] for volume in full]
        put_stack(tmp_path / f"sub/p{i}_ctf.mrc", np.concatenate(halves), 1 / 7.5)
    one.columns |= dict(
        zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), texts(relion_angles(rotation)), strict=True)
    )
    one.columns |= dict(zip([f"rlnOrigin{axis}Angst" for axis in "XYZ"], texts(origin * 7.5), strict=True))
    one.columns["rlnTomoParticleName"] = [f"TS_1/{i}" for i in range(4)]
    one.optics |= {"rlnCtfDataAreCtfPremultiplied": ["1"], "rlnImagePixelSize": ["7.5"], "rlnImageSize": ["32"]}
    found = read_particles(one.write_star(), InputOptions())
    grid = make_grid(32, 7.5, 0.75, 10)
    noise = Noise(torch.ones(len(band_frequencies(24))), 1.0, False, torch.zeros(13))
    volume = centre_crop(fourier_resize(torch.from_numpy(beads.density(32)).float(), 24), grid.crop)
    inside = spherical_mask(grid.crop, 8.0, 2.0)

    def residual(particles: Particles, i: int) -> float:
        numerator, weight = observe(particles, i, grid, noise)
        model = centre_crop(irfft3(from_band(model_band(volume, 24) * weight, 24)), grid.crop) * inside
        data = numerator * inside
        scale = (data * model).sum() / model.square().sum()
        return float((data - scale * model).square().sum() / data.square().sum())

    assert max(residual(found, i) for i in range(4)) < 0.01
    for i in range(4):
        put_stack(tmp_path / f"sub/m{i}_ctf.mrc", np.concatenate(halves[::-1]), 1 / 7.5)  # the multiplicity first
    wrong = replace(found, ctf_files=tuple(tmp_path / f"sub/m{i}_ctf.mrc" for i in range(4)))
    assert min(residual(wrong, i) for i in range(4)) > 0.1


def texts(columns: np.ndarray) -> list[list[str]]:
    return [[f"{value:.6f}" for value in column] for column in columns.T]


def test_selected_particles_are_written_with_all_their_rows(plain: Set, tmp_path: Path) -> None:
    flat = plain.write_series(tmp_path / "flat")
    source = read_source(flat)
    assert len(source) == 4
    write_subset(source, np.array([3, 1]), tmp_path / "flat/out.star", np.array([1, 0]))
    blocks = starfile.read(tmp_path / "flat/out.star", always_dict=True)
    assert len(blocks["particles"]) == 26
    assert blocks["particles"].groupby("rlnGroupName")["rlnClassNumber"].unique().map(list).to_dict() == {
        "TS_2_001": [1], "TS_2_003": [2]
    }  # fmt: skip
    assert set(read_star(tmp_path / "flat/out.star").particles["rlnKept"]) >= {"01.00", "03.120"}
    again = read_particles(tmp_path / "flat/out.star", InputOptions())
    assert np.abs(again.rotation - plain.rotation[[3, 1]]).max() < 1e-6


def test_selected_optimisation_set_loads_again(plain: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    star = plain.write_set(tmp_path / "job")
    source = read_source(star)
    (tmp_path / "classes").mkdir()
    write_subset(source, np.array([2, 1]), tmp_path / "classes/pre0.star")
    new = tmp_path / "classes/pre0_optimisation_set.star"
    assert read_star(new).text("", "rlnTomoParticlesFile", "a test")[0] == "../classes/pre0.star"
    assert read_star(new).text("", "rlnKept", "a test")[0] == "7"
    again = read_particles(new, InputOptions(datadir=tmp_path / "job"))
    assert np.abs(again.rotation - plain.rotation[[2, 1]]).max() < 1e-6
    kept = read_star(tmp_path / "classes/pre0.star")
    assert list(kept.blocks) == ["general", "optics", "particles"]
    assert kept.particles["rlnKept"].tolist() == ["02.50", "01.50"]
    whole = read_source(star)
    write_subset(whole, np.arange(4), tmp_path / "job/all.star")
    assert read_star(tmp_path / "job/all.star").particles.equals(whole.whole.particles)


def test_real_warptools_set_is_read(tmp_path: Path) -> None:
    folder = SHARED / "real_70S_warptools/stacks_2d"
    if not folder.exists():
        pytest.skip("the shared data sets are not here")
    star = next(folder.glob("*_optimisation_set.star"))
    found = read_particles(star, InputOptions())
    assert (len(found), found.box, found.premultiplied) == (40, 32, True)
    assert sorted(set(np.diff(found.tilt_offsets))) == [34, 35, 37]
    volumes = read_particles(folder.parent / "subtomograms_3d/particles.star", InputOptions())
    assert np.array_equal(np.sort(found.euler, 0), np.sort(volumes.euler, 0))
    write_subset(read_source(star), np.array([5, 30]), tmp_path / "some.star")
    again = read_particles(tmp_path / "some_optimisation_set.star", InputOptions(datadir=folder))
    assert np.array_equal(again.tilts, found.subset(np.array([5, 30])).tilts)
    rotation, origin = poses_of(read_source(star), found.pixel_size)
    assert np.array_equal(rotation, found.rotation) and np.array_equal(origin, found.origin)


# ------------------------------------------------------------------------------------------------ what is refused


def edited(star: Path, file: str, old: str, new: str) -> Path:
    path = star.parent / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return star


REFUSED = {
    "unknown tomogram": (("particles.star", "TS_2 TS_2/0", "TS_9 TS_2/0"), "_rlnTomoName, row 1: tomogram TS_9"),
    "frames": (("particles.star", "[1,1,", "[1,"), "row 1: 12 flags where the tilt series has 13 images"),
    "nothing visible": (
        ("particles.star", "[" + "1," * 12 + "1]", "[" + "0," * 12 + "0]"),
        "row 1: no image is visible",
    ),
    "no tomograms": (("set.star", "tomograms.star", "gone.star"), "gone.star"),
    "projection": (("tomograms.star", "[0.500000000,", "[2.500000000,"), "is not a rotation"),
    "bracket": (("tomograms.star", "[0.500000000,", "[half,"), "column _rlnTomoProjX, row 1"),
    "not a set": (("tomograms.star", "data_global", "data_other"), "no block data_global"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_faults_of_an_optimisation_set_are_named(plain: Set, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    star = edited(plain.write_set(tmp_path), *change)
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        read_particles(star, InputOptions())
    assert "\n" not in str(caught.value)


def test_particles_without_their_tomograms_are_refused(plain: Set, tmp_path: Path) -> None:
    plain.write_set(tmp_path)
    with pytest.raises(UserError, match=r"give the optimisation set"):
        read_particles(tmp_path / "particles.star", InputOptions())


def test_stack_of_another_length_is_refused(plain: Set, tmp_path: Path) -> None:
    star = plain.write_set(tmp_path)
    put_stack(tmp_path / "stacks/0.mrcs", np.ones((9, 32, 32)), 7.5)
    with pytest.raises(UserError, match=r"has 9 images where .* row 1, shows 13 of 13"):
        read_particles(star, InputOptions())


def test_normalisation_of_images_is_refused(plain: Set, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--normalisation mean: .* leave it out"):
        read_particles(plain.write_series(tmp_path), InputOptions(normalisation="mean"))


def test_format_overrides_what_is_recognised(plain: Set, tmp_path: Path) -> None:
    flat = plain.write_series(tmp_path / "flat")
    with pytest.raises(UserError, match="52 of 52 subtomograms missing"):
        read_particles(flat, InputOptions(format="relion3"))
    star = plain.write_set(tmp_path / "set")
    with pytest.raises(UserError, match=r"--format series.*leave --format out"):
        read_particles(star, InputOptions(format="series"))
    # a set whose flag was lost on the way through another program
    edited(star, "particles.star", "_rlnTomoSubTomosAre2DStacks 1", "_rlnTomoSubTomosAre2DStacks 0")
    with pytest.raises(UserError, match="not cubic"):
        read_particles(star, InputOptions())
    found = read_particles(star, InputOptions(format="relion5"))
    assert_particles(found, plain)
    assert "as --format says; recognised was relion3" in found.notes[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("1@all.mrcs", "one@all.mrcs", "'one' in front of @"), ("14@all.mrcs", "14@other.mrcs", "must be in one stack")],
)
def test_faults_of_a_flat_table_are_named(plain: Set, tmp_path: Path, old: str, new: str, message: str) -> None:
    star = edited(plain.write_series(tmp_path), "flat.star", f"\n{old}", f"\n{new}")
    with pytest.raises(UserError, match=message):
        read_particles(star, InputOptions())
