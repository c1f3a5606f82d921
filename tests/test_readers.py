"""RELION 3.0 and 3.1 sets become one particle table; every disagreement is refused in one line."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.config import InputOptions
from opustomo.data.particles import TILT_COLUMNS, Particles
from opustomo.data.poses import with_poses
from opustomo.data.readers import ctf_star, read_particles
from opustomo.data.readers.ctf_volume import half_fourier, read_transfer_volume
from opustomo.errors import UserError
from opustomo.physics.ctf import contrast_transfer
from star_sets import BOX, PIXEL, REAL_SETS, Set, put_loop, put_volume, real_star, relion31, tilt_columns


def read(star: Path, **options: object) -> Particles:
    return read_particles(star, InputOptions(**options))  # type: ignore[arg-type]


def error_of(star: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read(star, **options)
    return str(caught.value)


def test_relion30_particles(tmp_path: Path) -> None:
    made = Set(tmp_path)
    found = read(made.write())
    assert (len(found), found.dialect, found.box, found.pixel_size) == (4, "RELION 3.0", BOX, PIXEL)
    assert found.transfer == "tilts" and not found.premultiplied
    assert found.image_files[2] == tmp_path / "sub/p2.mrc" and list(found.names) == made.columns["rlnImageName"]
    assert list(found.tomogram) == ["TS_0.tomostar", "TS_1.tomostar"] * 2 and not found.half.any()
    euler = np.array([made.columns[f"rlnAngle{name}"] for name in ("Rot", "Tilt", "Psi")], float).T
    # RELION's matrix is the transpose of scipy's intrinsic ZYZ
    oracle = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(found.rotation, oracle, atol=1e-9)
    np.testing.assert_array_equal(found.origin.T, np.array([made.columns[f"rlnOrigin{axis}"] for axis in "XYZ"], float))


def test_relion31_gives_the_same_particles(tmp_path: Path) -> None:
    old, new = read(Set(tmp_path / "a").write()), read(relion31(tmp_path / "b", groups=2).write(), relion31=True)
    assert new.dialect == "RELION 3.1"
    np.testing.assert_allclose(new.origin, old.origin, atol=1e-6)
    np.testing.assert_array_equal(new.rotation, old.rotation)
    np.testing.assert_array_equal(new.tilts, old.tilts)


def test_magnification_and_detector_in_micrometres(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.columns["rlnMagnification"] = ["40000"] * made.n
    made.columns["rlnDetectorPixelSize"] = ["14"] * made.n  # 14 um * 1e4 / 40000 = 3.5 A
    assert read(made.write()).pixel_size == pytest.approx(PIXEL)


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets_load(name: str) -> None:
    found = read(real_star(name))
    box, pixel, count, kind, pre = {
        REAL_SETS[0]: (48, 10.0, 412, "ctf_volume", False),
        REAL_SETS[1]: (32, 12.0, 40, "weight_volume", True),
    }[name]
    assert (found.box, found.pixel_size, len(found)) == (box, pixel, count)
    assert (found.transfer, found.premultiplied, found.dialect) == (kind, pre, "RELION 3.1")
    assert "origin at voxel N//2" in found.notes[-1]
    half = read_transfer_volume(found.ctf_files[0], box)
    cubic = mrcfile.read(found.ctf_files[0])
    c = box // 2
    assert half[0, 0, 0] == pytest.approx(float(cubic[c, c, c])) and half[1, 2, 3] == cubic[c + 1, c + 2, c + 3]


# --- cross-checks ---------------------------------------------------------------------------------------------


def test_options_that_disagree_are_refused_naming_both_values(tmp_path: Path) -> None:
    star = Set(tmp_path).write()
    assert "--angpix 2.1" in (words := error_of(star, angpix=2.1)) and "3.5 A" in words
    assert "-D 236" in (words := error_of(star, box=236)) and "box 16" in words
    assert "--relion31" in (words := error_of(star, relion31=True)) and "RELION 3.0" in words
    assert len(read(star, angpix=3.505, box=16)) == 4


def test_header_pixel_size_against_the_star(tmp_path: Path) -> None:
    words = error_of(Set(tmp_path / "a", header_pixel=7.0).write())
    assert "3.5 A" in words and "7 A" in words
    for unset in (0.0, 1.0):
        assert "unset" in " ".join(read(Set(tmp_path / f"{unset}", header_pixel=unset).write()).notes)


def test_pixel_size_from_headers_or_option_when_the_star_has_none(tmp_path: Path) -> None:
    made = Set(tmp_path)
    del made.columns["rlnMagnification"]
    assert read(made.write()).pixel_size == PIXEL
    made.header_pixel = 1.0
    assert read(made.write(), angpix=2.5).pixel_size == 2.5
    made.header_pixel = 0.0
    assert "--angpix" in error_of(made.write())


def test_optics_groups_must_agree(tmp_path: Path) -> None:
    made = relion31(tmp_path, groups=2)
    made.write()
    made.optics["rlnImagePixelSize"] = ["3.5", "7.0"]
    assert "_rlnImagePixelSize differs: 3.5 and 7" in error_of(made.write_star())
    made.columns["rlnOpticsGroup"] = ["1"] * made.n  # the second group is not in use
    assert read(made.write_star()).pixel_size == PIXEL
    made.columns["rlnOpticsGroup"] = ["5"] * made.n
    assert "optics group 5" in error_of(made.write_star())
    made.columns["rlnOpticsGroup"] = ["1"] * made.n
    made.optics["rlnImageSize"] = ["64", "64"]
    assert "rlnImageSize says 64" in error_of(made.write_star())


@pytest.mark.parametrize(
    ("shape", "words"),
    [((16, 16, 8), "not cubic"), ((15, 15, 15), "box 15 is odd"), ((18, 18, 18), "box 18 but")],
)
def test_boxes_must_be_cubic_even_and_alike(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    star = Set(tmp_path).write()
    put_volume(tmp_path / "sub/p3.mrc", np.zeros(shape, np.float32))
    message = error_of(star)
    assert words in message and "p3.mrc" in message


def test_missing_columns_and_stacks(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.write()
    made.columns["rlnAngleTilt2"] = made.columns.pop("rlnAngleTilt")
    assert "_rlnAngleTilt, needed for the consensus poses" in error_of(made.write_star())
    made = Set(tmp_path)
    made.columns["rlnImageName"][0] = "1@stack.mrcs"
    assert "stacks missing, first: stack.mrcs" in error_of(made.write_star())
    made = Set(tmp_path)
    made.columns["rlnOriginx"] = made.columns.pop("rlnOriginX")  # dynamo2m writes lower case
    del made.columns["rlnOriginZ"]
    origin = read(made.write_star()).origin
    assert origin[:, 0].any() and not origin[:, 2].any()


# --- files ------------------------------------------------------------------------------------------------------


def test_missing_files_name_first_count_folders_and_fix(tmp_path: Path) -> None:
    star = Set(tmp_path).write()
    (tmp_path / "sub/p1.mrc").unlink()
    (tmp_path / "sub/p3.mrc").unlink()
    words = error_of(star)
    assert "2 of 4 subtomograms missing, first: sub/p1.mrc (row 2)" in words and str(tmp_path) in words


def test_datadir_is_proposed_and_works(tmp_path: Path) -> None:
    project = tmp_path / "project"
    star = Set(project).write()
    job = project / "Refine3D" / "job001" / "run_data.star"  # RELION names files relative to its project
    job.parent.mkdir(parents=True)
    star.rename(job)
    assert f"try --datadir {project}" in error_of(job)
    assert read(job, datadir=project).image_files[0] == project / "sub/p0.mrc"
    flat = read(job, datadir=project / "sub")  # as with the earlier program: without the folders in the name
    assert flat.image_files[0] == project / "sub/p0.mrc" and flat.transfer == "tilts"
    assert "no such folder" in error_of(job, datadir=tmp_path / "absent")


def test_files_of_the_same_names_beside_the_star_are_not_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Set(tmp_path / "sub_other").write()
    star = Set(tmp_path / "set").write()
    for path in (tmp_path / "set" / "sub").glob("*.mrc"):
        path.unlink()
    monkeypatch.chdir(tmp_path / "sub_other" / "sub")
    message = error_of(star)
    assert "try" not in message and message.endswith("give the folder in front of these names with --datadir")


def test_datadir_that_was_not_needed_is_said(tmp_path: Path) -> None:
    star = Set(tmp_path / "a").write()
    (tmp_path / "b").mkdir()
    assert any("was not needed" in note for note in read(star, datadir=tmp_path / "b").notes)


# --- transfer functions -----------------------------------------------------------------------------------------


def test_tilts_are_ragged_shared_and_damping(tmp_path: Path) -> None:
    made = Set(tmp_path)
    made.columns["rlnCtfImage"][3] = "sub/p0_ctf.mrc"
    star = made.write()
    put_loop(tmp_path / "sub/p1_ctf.star", "images", tilt_columns([-30.0, 30.0], bfactor_sign=-1))
    columns = tilt_columns([0.0, 3.0, 6.0])
    columns["rlnDefocusV"] = ["20000"] * 3
    columns["rlnDefocusAngle"] = ["45"] * 3
    columns["rlnCtfScalefactor"][1] = "0"
    put_loop(tmp_path / "sub/p2_ctf.star", "images", columns)
    found = read(star)
    assert np.diff(found.tilt_offsets).tolist() == [3, 2, 3, 3]
    at = {name: i for i, name in enumerate(TILT_COLUMNS)}
    assert found.tilts_of(1)[:, at["bfactor"]].tolist() == [12, 20]  # Warp 1 writes -4 x dose: damping all the same
    assert found.tilts_of(0)[0, at["tilt"]] == -40 and found.tilts_of(0)[0, at["defocus_v"]] == 21000
    assert found.tilts_of(2)[:, at["tilt"]].tolist() == [0, 6]
    assert found.tilts_of(2)[0, [at["defocus_u"], at["defocus_v"], at["defocus_angle"]]].tolist() == [21000, 20000, 45]
    np.testing.assert_array_equal(found.tilts_of(3), found.tilts_of(0))
    assert "2 to 3 tilts per particle" in found.notes[-1]
    back = found.subset(np.array([2, 1]))
    np.testing.assert_array_equal(back.tilts_of(1), found.tilts_of(1))


def test_ctf_star_beats_volume_and_is_found_beside_the_subtomogram(tmp_path: Path) -> None:
    made = Set(tmp_path)
    del made.columns["rlnCtfImage"]
    assert read(made.write()).transfer == "tilts"
    made = Set(tmp_path)
    for name in made.columns["rlnCtfImage"]:
        put_volume(tmp_path / name, np.ones((BOX,) * 3, np.float32))
    assert read(made.write()).transfer == "tilts"


def test_voltage_may_come_from_optics(tmp_path: Path) -> None:
    made = relion31(tmp_path)
    star = made.write()
    columns = tilt_columns([0.0])
    del columns["rlnVoltage"]
    for i in range(made.n):
        put_loop(tmp_path / f"sub/p{i}_ctf.star", "images", columns)
    assert read(star).tilts[0, TILT_COLUMNS.index("voltage")] == 300
    del made.optics["rlnVoltage"]
    assert "no column _rlnVoltage" in error_of(made.write_star())


def test_data_without_a_ctf_can_state_so(tmp_path: Path) -> None:
    """A phase of 90 degrees and nothing else: what docs/inputs.md has for such data is a transfer of one, as read."""
    made = Set(tmp_path)
    star = made.write()
    none = {"rlnPhaseShift": 90, "rlnDefocusU": 0, "rlnSphericalAberration": 0, "rlnAmplitudeContrast": 0}
    columns = tilt_columns([-30.0, 0.0, 30.0])
    columns = {name: column for name, column in columns.items() if "Defocus" not in name and "Ctf" not in name}
    columns |= {name: [str(value)] * 3 for name, value in none.items()}
    for i in range(made.n):
        put_loop(tmp_path / f"sub/p{i}_ctf.star", "images", columns)
    u = torch.linspace(0, 0.2, 9)
    for lens in torch.tensor(read(star).tilts[:, 3:], dtype=torch.float32):
        torch.testing.assert_close(contrast_transfer(u, u.flip(0), lens), torch.ones(9))


def test_particle_without_ctf(tmp_path: Path) -> None:
    made = Set(tmp_path)
    star = made.write(ctf=False)
    assert "4 of 4 CTF volumes missing" in error_of(star)
    put_loop(tmp_path / "sub/p0_ctf.star", "images", tilt_columns([0.0]))
    assert "3 of 4 CTF STAR files missing, first: sub/p1_ctf.star" in error_of(star)
    made.columns["rlnCtfImage"][2] = "None"
    assert "row 3 (sub/p2.mrc) has an empty _rlnCtfImage" in error_of(made.write_star())
    del made.columns["rlnCtfImage"]
    assert "particle without CTF" in error_of(made.write_star())


def test_all_tilts_excluded_names_the_particle(tmp_path: Path) -> None:
    star = Set(tmp_path).write()
    columns = tilt_columns([0.0, 3.0])
    columns["rlnCtfScalefactor"] = ["0", "0.0"]
    put_loop(tmp_path / "sub/p2_ctf.star", "images", columns)
    assert "particle sub/p2.mrc are excluded" in error_of(star)


def ctf_half(box: int = BOX) -> np.ndarray:
    """A wedge times a ring pattern, Friedel symmetric, almost zero at low frequency; kx >= 0, origin at index 0."""
    k = np.fft.fftfreq(box, 1 / box)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    inside = (np.abs(z) < 1.7 * np.abs(x) + 1) & (radius < box / 2)
    rings = np.sin(0.15 * radius**2 + 0.05) * np.exp(-radius / box) * (1 + 0.1 * x * y / box**2)
    full = np.where(inside, rings, 0).astype(np.float32)
    return 0.5 * (full + np.roll(full[::-1, ::-1, ::-1], 1, (0, 1, 2)))


@pytest.mark.parametrize("sign", [1, -1])
def test_every_layout_of_a_ctf_volume_gives_the_same_array(sign: int) -> None:
    corner = ctf_half() ** (1 if sign > 0 else 2)
    half = corner[:, :, : BOX // 2 + 1]
    layouts = {
        "cubic, origin at voxel N//2": np.fft.fftshift(corner),
        "cubic, origin at the corner": corner,
        "half-Fourier, origin at voxel N//2": np.fft.fftshift(half, axes=(0, 1)),
        "half-Fourier, origin at the corner": half,
        "RELION 4": np.concatenate([half, 3 * np.abs(half)]),
    }
    for words, volume in layouts.items():
        found, said = half_fourier(volume.astype(np.float32), BOX, Path("x.mrc"))
        assert said.startswith(words)
        assert found.shape == (BOX, BOX, BOX // 2 + 1) and found.dtype == np.float32
        np.testing.assert_allclose(found, half, atol=1e-7)


def test_volumes_that_are_no_transfer_functions() -> None:
    noise = np.random.default_rng(0).normal(size=(BOX,) * 3).astype(np.float32)
    cases = {
        "no Friedel symmetry": noise,
        "zeros only": np.zeros((BOX,) * 3, np.float32),
        r"does not fit the box 16": np.ones((BOX, BOX, BOX + 2), np.float32),
    }
    for words, volume in cases.items():
        with pytest.raises(UserError, match=words):
            half_fourier(volume, BOX, Path("x.mrc"))


# --- poses ------------------------------------------------------------------------------------------------------


def test_pose_pickle_overrides_the_star(tmp_path: Path) -> None:
    found = read(Set(tmp_path).write())
    order = np.array([2, 3, 0, 1])
    turned = with_poses(found, found.rotation[order], found.origin[order] / found.box, found.euler[order])
    np.testing.assert_allclose(turned.origin, found.origin[order])
    np.testing.assert_array_equal(turned.rotation, found.rotation[order])
    np.testing.assert_array_equal(turned.euler, found.euler[order])
    transposed = with_poses(found, found.rotation.transpose(0, 2, 1), found.origin / found.box, found.euler)
    np.testing.assert_allclose(transposed.rotation, found.rotation, atol=1e-12)
    assert "the angles are used" in transposed.notes[-1]
    with pytest.raises(UserError, match=r"3 poses but .* 4 particles"):
        with_poses(found, found.rotation[:3], found.origin[:3], found.euler[:3])


def test_ctf_stars_are_parsed_once_and_kept_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start opens none of them; a changed file, another microscope or a damaged pack has all read again."""
    star, pack = Set(tmp_path).write(), tmp_path / "cache" / "ctf.npy"
    monkeypatch.setattr(ctf_star, "PACK_FROM", 2)
    plain, parsed = read(star), []
    tilts = ctf_star._tilts

    def counting(path: Path, microscope: dict[str, float]) -> np.ndarray:
        parsed.append(path)
        return tilts(path, microscope)

    monkeypatch.setattr(ctf_star, "_tilts", counting)

    def again() -> Particles:
        parsed.clear()
        found = read_particles(star, InputOptions(), pack)
        np.testing.assert_array_equal(found.tilt_offsets, plain.tilt_offsets)
        return found

    assert np.array_equal(again().tilts, plain.tilts) and len(parsed) == len(plain)
    second = again()
    assert np.array_equal(second.tilts, plain.tilts) and parsed == []
    assert isinstance(second.tilts, np.memmap)  # sets larger than the memory
    np.testing.assert_array_equal(second.subset(np.array([2, 0])).tilts_of(1), plain.tilts_of(0))

    changed = sorted(set(tmp_path.rglob("*.star")) - {star})[0]
    changed.write_text(changed.read_text().replace("21000", "22000"))
    defocus = TILT_COLUMNS.index("defocus_u")
    assert again().tilts[:, defocus].max() == 22000 and len(parsed) == len(plain)
    kept = pack.read_bytes()
    for damaged in (kept[: len(kept) // 2], b"", b"\0" * 100):
        pack.write_bytes(damaged)
        assert again().tilts[:, defocus].max() == 22000 and len(parsed) == len(plain)
        assert pack.read_bytes() == kept


def test_few_ctf_stars_leave_no_file(tmp_path: Path) -> None:
    read_particles(Set(tmp_path).write(), InputOptions(), tmp_path / "cache" / "ctf.npy")
    assert not (tmp_path / "cache").exists()
