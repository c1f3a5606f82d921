"""Converters: positions and orientations survive a change of columns, units and angles, by scipy's own rotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from opustomo.compat import dsdsh
from opustomo.config import InputOptions
from opustomo.data.lists import read_list
from opustomo.data.mrc import read_volume
from opustomo.data.readers import read_particles
from opustomo.data.star import read_star
from star_sets import PIXEL as SET_PIXEL
from star_sets import Set, put_loop, put_volume, relion31
from test_lists import OF_ZXZ, PIXEL, PLACE, SCORE, SHIFT, A, Array, P, m, named, pytom, relion_angles

Lines = pytest.CaptureFixture[str]


def run(*words: object) -> int:
    return dsdsh.main([str(word) for word in words])


def refused(capsys: Lines, *words: object) -> str:
    """The one line that a command ends in."""
    capsys.readouterr()
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def columns(path: Path, *names: str) -> Array:
    star = read_star(path)
    return np.stack([star.numbers(star.particle_block, name, "a test") for name in names], 1)


def place(path: Path) -> Array:
    """Coordinate - origin, in pixels."""
    return columns(path, *(f"rlnCoordinate{a}" for a in "XYZ")) - columns(path, *(f"rlnOrigin{a}" for a in "XYZ"))


def turns(path: Path) -> Array:
    """A, the transpose of intrinsic ZYZ."""
    angles = columns(path, "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    return Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()


def test_pytom_lists_become_a_star(tmp_path: Path, capsys: Lines) -> None:
    xml, star = pytom(tmp_path), tmp_path / "out/p.star"
    options = ("--output", star, "--bin-size", 4, "--pixel-size", 1.5, "--ctf-template", "ctf/{ts_name}_{i}.mrc")
    assert run("convert_pytom_to_star", "--input", xml, *options) == 0
    assert np.allclose(place(star), PLACE * 4, atol=1e-4)
    assert np.allclose(turns(star), OF_ZXZ, atol=1e-6)
    assert np.allclose(columns(star, "rlnDetectorPixelSize", "rlnMagnification"), [1.5, 10000])
    assert np.allclose(columns(star, "rlnAutopickFigureOfMerit")[:, 0], SCORE)
    assert list(read_star(star).particles["rlnCtfImage"])[:2] == ["ctf/12_1.mrc", "ctf/12_2.mrc"]
    (tmp_path / "second.xml").write_text(xml.read_text().replace("tomo/12.mrc", "tomo/13.mrc"))
    line = ("convert_pytom_to_star", "--input-dir", tmp_path, "--output", tmp_path / "both.star")
    capsys.readouterr()
    assert run(*line, "--pattern", "*.xml") == 0
    assert "no --pixel-size" in capsys.readouterr().err
    assert (
        list(read_star(tmp_path / "both.star").particles["rlnMicrographName"])
        == ["tomo/12.mrc"] * P + ["tomo/13.mrc"] * P
    )
    assert "has no file *.tbl" in refused(capsys, *line, "--pattern", "*.tbl")


def test_species_of_m_becomes_a_star_in_pixels(tmp_path: Path) -> None:
    species = m(tmp_path)
    assert run("convert_warp", species, 2.5, "--kv", 200) == 0
    star = tmp_path / "m_relion.star"
    assert np.allclose(place(star) * 2.5, PLACE * PIXEL, atol=1e-4)
    assert np.allclose(turns(star), A, atol=1e-6)
    assert set(columns(star, "rlnVoltage")[:, 0]) == {200} and set(columns(star, "rlnRandomSubset")[:, 0]) == {2}
    back = read_list(star)  # with the pixel size that it states
    assert np.allclose(back.voxels(np.arange(P), 5.0, np.array([9, 9, 9]), None), PLACE * PIXEL / 5, atol=1e-4)


def tomograms(folder: Path, names: list[str]) -> Path:
    """A RELION 3.0 list whose coordinates and origins count pixels of 8 Angstrom."""
    table = named("rlnCoordinate", "X Y Z", PLACE - SHIFT) | {"rlnMicrographName": names}
    table |= named("rlnOrigin", "X Y Z", -SHIFT) | named("rlnAngle", "Rot Tilt Psi", relion_angles(A))
    table |= {"rlnMagnification": ["10000"] * P, "rlnDetectorPixelSize": ["8.0"] * P}
    table |= {"rlnImageName": [f"{i // 2}.mrc" for i in range(P)]}
    put_loop(folder / "all.star", "", table)
    return folder / "all.star"


def test_one_tomogram_for_warp_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Lines) -> None:
    star = tomograms(tmp_path, ["t/TS_1_10.0Apx.mrc"] * 3 + ["t/TS_10_10.0Apx.mrc"] * 4)
    star.write_text(star.read_text().replace("loop_\n", "loop_\n\n"))  # as PyTom leaves it
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert run("convert_pytom", star, "TS_1") == 0
    found = tmp_path / "work/TS_1_norm.star"
    assert np.allclose(columns(found, "rlnCoordinateX", "rlnCoordinateY", "rlnCoordinateZ"), PLACE[:3], atol=1e-4)
    assert np.allclose(turns(found), A[:3], atol=1e-6)
    assert set(read_star(found).particles["rlnMicrographName"]) == {"TS_1.tomostar"}
    assert "fits several tomograms" in refused(capsys, "convert_pytom", star, "TS")
    assert "is no tomogram of it" in refused(capsys, "convert_pytom", star, "TS_2")
    assert "without folders" in refused(capsys, "convert_pytom", star, "../TS_1")


def test_one_tomogram_for_artiax(tmp_path: Path, capsys: Lines) -> None:
    star = tomograms(tmp_path, ["TS_1.tomostar"] * 3 + ["TS_10.tomostar"] * 4)
    out = tmp_path / "artiax.star"
    assert run("convert_artiax", star, "TS_10", "--factor", 0.5, "-o", out) == 0
    assert np.allclose(place(out), PLACE[3:] / 2, atol=1e-4) and np.allclose(turns(out), A[3:], atol=1e-6)
    assert list(read_star(out).particles)[:1] == ["rlnTomoName"]
    assert run("convert_artiax", star, "TS_10", "--deduplicate", "-o", out) == 0
    assert np.allclose(place(out), PLACE[[3, 4, 6]], atol=1e-4)  # images 1, 2, 2, 3
    table = read_star(star).particles.rename(columns={"rlnMicrographName": "rlnOther"})
    put_loop(tmp_path / "two.star", "other", {"rlnCoordinateX": ["1"]})
    put_loop(tmp_path / "two.star", "mine", {name: list(table[name]) for name in table}, "a")
    line = ("convert_artiax", tmp_path / "two.star", "TS_1", "-o", out)
    assert run(*line, "--micrograph-col", "rlnOther", "--data-block", "mine") == 0
    assert np.allclose(place(out), PLACE[:3], atol=1e-4)
    assert "is a file that is read here" in refused(capsys, "convert_artiax", star, "TS_1", "-o", star)


def test_a_file_that_is_read_is_not_written_over(tmp_path: Path, capsys: Lines) -> None:
    star, xml = tomograms(tmp_path, ["TS_1.tomostar"] * P), pytom(tmp_path)
    before = star.read_bytes(), xml.read_bytes()
    put_volume(tmp_path / "t.mrc", np.zeros((8, 8, 8), np.float32), 5.0)
    cubes = ("extract_tomo_cubes", tmp_path / "t.mrc", star, "--box-size", 2, "-o", tmp_path / "c")
    for line in (
        ("convert_warp", star, 10, "-o", star),
        ("convert_pytom", star, "TS_1", "-o", star),
        ("convert_pytom_to_star", "--input", xml, "--output", xml),
        (*cubes, "--out-star", star),
        (*cubes, "--write-stack", tmp_path / "t.mrc"),
        ("create_mask", tmp_path / "t.mrc", "-o", tmp_path / "t.mrc"),
    ):
        assert "is a file that is read here; give another name" in refused(capsys, *line)
    assert (star.read_bytes(), xml.read_bytes()) == before


def test_what_cannot_be_meant_is_said(tmp_path: Path, capsys: Lines) -> None:
    star, xml = tomograms(tmp_path, ["TS_1.tomostar"] * P), pytom(tmp_path)
    assert "'300000' is no voltage of a microscope in kV" in refused(capsys, "convert_warp", star, 10, "--kv", 300000)
    for template in ("ctf/{ts}_{i}.mrc", "ctf/{ts_name"):
        line = ("convert_pytom_to_star", "--input", xml, "--output", tmp_path / "o.star", "--ctf-template", template)
        assert "braces other than {ts_name} and {i}" in refused(capsys, *line)
    (tmp_path / "set.star").write_text("data_\n\n_rlnTomoParticlesFile sub/p.star\n_rlnTomoTomogramsFile t.star\n")
    for verb in (("convert_warp", tmp_path / "set.star", 10), ("convert_artiax", tmp_path / "set.star", "TS_1")):
        assert "is an optimisation set; give the table of particles that it names here, sub/p.star" in refused(
            capsys, *verb
        )
    assert "is a folder; give a file" in refused(capsys, "convert_pytom", tmp_path, "TS_1")
    assert "is a folder, and a file is to be written" in refused(capsys, "convert_warp", star, 10, "-o", tmp_path)


def test_centred_coordinates_are_not_guessed(tmp_path: Path, capsys: Lines) -> None:
    table = named("rlnCenteredCoordinate", "X Y Z", PLACE, "Angst") | {"rlnTomoName": ["12"] * P}
    put_loop(tmp_path / "c.star", "particles", table)
    assert "from the middle of the tomogram" in refused(capsys, "convert_pytom", tmp_path / "c.star", "12")


def test_relion31_as_30(tmp_path: Path, capsys: Lines) -> None:
    made = relion31(tmp_path, n=6, groups=2)
    made.optics["rlnVoltage"] = ["300.0", "200.0"]
    made.columns |= {f"rlnCoordinate{a}": [f"{40 + 3 * i + k}" for i in range(6)] for k, a in enumerate("XYZ")}
    star = made.write()
    assert run("convert_star", star, SET_PIXEL, "--subset-label", 2) == 0
    old, new = (read_particles(tmp_path / name, InputOptions()) for name in ("particles.star", "particles30.star"))
    assert new.dialect == "RELION 3.0" and np.abs(new.origin - old.origin).max() < 1e-5
    assert np.array_equal(new.rotation, old.rotation) and np.array_equal(new.coordinates, old.coordinates)
    assert new.half.tolist() == [1, 2] * 3
    assert list(read_star(tmp_path / "particles30.star").particles["rlnVoltage"]) == ["300.0", "200.0"] * 3
    half = read_star(tmp_path / "particles30_subset2.star").particles
    assert list(half["rlnImageName"]) == [f"sub/p{i}.mrc" for i in (1, 3, 5)]
    text = star.read_text()
    star.write_text(text.replace("_rlnImageName", "_rlnElse"))
    assert "is no table of subtomograms" in refused(capsys, "convert_star", star, SET_PIXEL, "--remove-symexp")
    star.write_text(text)
    assert f"says {SET_PIXEL:g} A" in refused(capsys, "convert_star", star, 2 * SET_PIXEL)


def test_optics_of_an_unknown_group_are_not_guessed(tmp_path: Path, capsys: Lines) -> None:
    made = relion31(tmp_path, groups=2)
    made.optics["rlnVoltage"][1] = "200.0"
    del made.optics["rlnImagePixelSize"], made.columns["rlnOpticsGroup"]
    assert "no column _rlnOpticsGroup" in refused(capsys, "convert_star", made.write_star(), SET_PIXEL)


def test_half_sets_of_the_file_are_kept_and_copies_removed(tmp_path: Path) -> None:
    made = relion31(tmp_path, n=6)
    made.columns["rlnRandomSubset"] = list("221112")
    made.columns["rlnImageName"] = [f"sub/p{i // 2}.mrc" for i in range(6)]
    star = made.write_star()
    assert run("convert_star", star, SET_PIXEL, "--remove-symexp") == 0
    out = tmp_path / "particles30.star"
    assert columns(out, "rlnRandomSubset")[:, 0].tolist() == [2, 1, 1]
    origins = [float(v) / SET_PIXEL for v in made.columns["rlnOriginYAngst"][::2]]
    assert np.allclose(columns(out, "rlnOriginY")[:, 0], origins, atol=1e-5)


def test_pixels_are_scaled(tmp_path: Path) -> None:
    star = tomograms(tmp_path, ["TS_1.tomostar"] * P)
    assert run("convert_star", star, 8, "--rescale-angpix", 2) == 0
    out = tmp_path / "all30.star"
    assert np.allclose(place(out), PLACE * 4, atol=1e-4) and np.allclose(columns(out, "rlnDetectorPixelSize"), 2)


def halves_of_a_set(folder: Path) -> tuple[Path, Path]:
    """Particles 0-2 with optics a and b, and 3-5 with b and c, in two folders and with columns in another order."""
    made = relion31(folder / "one", n=6, groups=2)
    made.write()
    group = {"1": "300", "2": "200", "3": "80"}

    def part(path: Path, rows: range, numbers: dict[str, str]) -> None:
        table = {name: [values[i] for i in rows] for name, values in made.columns.items()}
        table["rlnOpticsGroup"] = [list(numbers)[i % 2] for i in range(len(rows))]
        names = list(table) if rows[0] == 0 else list(table)[::-1]
        voltage = [group[kind] for kind in numbers.values()]
        put_loop(path, "optics", {
            "rlnOpticsGroup": list(numbers), "rlnOpticsGroupName": ["opticsGroup1", "opticsGroup2"],
            "rlnImagePixelSize": [f"{SET_PIXEL}"] * 2, "rlnImageSize": ["16"] * 2, "rlnVoltage": voltage,
        })  # fmt: skip
        put_loop(path, "particles", {name: table[name] for name in names}, "a")

    part(folder / "one/a.star", range(3), {"1": "1", "2": "2"})
    part(folder / "two/b.star", range(3, 6), {"1": "2", "2": "3"})
    (folder / "two/sub").symlink_to(folder / "one/sub")
    return folder / "one/a.star", folder / "two/b.star"


def test_stars_of_other_columns_order_optics_and_folder_are_joined(tmp_path: Path) -> None:
    a, b = halves_of_a_set(tmp_path)
    out = tmp_path / "joined.star"
    assert run("combine_star", a, b, out) == 0
    parts, whole = [read_particles(path, InputOptions()) for path in (a, b)], read_particles(out, InputOptions())
    for name in ("rotation", "origin", "tomogram", "tilts"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(one, name) for one in parts])), name
    star = read_star(out)
    assert list(star.table("optics")["rlnVoltage"]) == ["300", "200", "80"]
    assert len(set(star.table("optics")["rlnOpticsGroupName"])) == 3
    assert list(star.particles["rlnOpticsGroup"]) == ["1", "2", "1", "2", "3", "2"]
    assert list(star.particles["rlnImageName"])[2:4] == ["one/sub/p2.mrc", "two/sub/p3.mrc"]


def test_what_cannot_be_joined_is_told(tmp_path: Path, capsys: Lines) -> None:
    a, b = halves_of_a_set(tmp_path)
    out = tmp_path / "joined.star"
    assert "particle one/sub/p0.mrc is in" in refused(capsys, "combine_star", a, b, a, out)
    text = b.read_text()
    b.write_text(text.replace(f"{SET_PIXEL}", "7.25"))
    assert "differ in pixel size (3.5 and 7.25)" in refused(capsys, "combine_star", a, b, out)
    b.write_text(text.replace("_rlnOriginXAngst", "_rlnElse"))
    error = refused(capsys, "combine_star", a, b, out)
    assert "do not have the same columns (rlnElse, rlnOriginXAngst)" in error and not out.exists()
    b.write_text(text)
    old = Set(tmp_path / "old").write_star()
    assert "is RELION 3.1 (relion3) and" in refused(capsys, "combine_star", a, old, out)
    assert "is one of the files" in refused(capsys, "combine_star", a, b, b)
    assert "two STAR files are needed" in refused(capsys, "combine_star", a, out)
    assert b.read_text() == text and not out.exists()
    b.write_text(text.replace("_rlnMicrographName", "_rlnElse"))
    assert run("combine_star", a, b, out, "--common-columns") == 0
    assert not {"rlnElse", "rlnMicrographName"} & set(read_star(out).particles)


def test_cubes_are_the_voxels_at_the_coordinates(tmp_path: Path, capsys: Lines) -> None:
    volume = np.random.default_rng(1).normal(size=(30, 34, 38)).astype(np.float32)
    put_volume(tmp_path / "t.mrc", volume, 6.0)
    x, y, z = ["5.0", "20.4", "30.8"], ["6.0", "22.6", "40"], ["30.0", "26.4", "30.2"]
    names = {"rlnTomoName": ["b", "a", "a"], "rlnKept": ["09", "07", "08"]}
    put_loop(tmp_path / "p.star", "particles", {"rlnMyX": x, "rlnMyY": y, "rlnMyZ": z} | names)
    line = ("extract_tomo_cubes", tmp_path / "t.mrc", tmp_path / "p.star", "--box-size", 8, "-o", tmp_path / "c",
            "--coord-cols", "rlnMyX", "rlnMyY", "rlnMyZ")  # fmt: skip
    some = ("--coord-scale", "0.5", "--one-based", "--round-mode", "floor")
    assert run(*line, *some, "--start-index", 3, "--out-star", tmp_path / "c.star", "--tomo-col", "rlnTomoName",
               "--tomo-id", "a", "--write-stack", tmp_path / "c.mrc") == 0  # fmt: skip
    first, pixel = read_volume(tmp_path / "c/cube_000003.mrc")
    # 20.4 / 2 - 1 = 9.2, 22.6 / 2 - 1 = 10.3, 26.4 / 2 - 1 = 12.2; four voxels before and after
    assert pixel == 6.0 and np.array_equal(first, volume[8:16, 6:14, 5:13])
    second = read_volume(tmp_path / "c/cube_000004.mrc")[0]
    assert np.array_equal(second, volume[10:18, 15:23, 10:18])
    assert np.array_equal(read_volume(tmp_path / "c.mrc")[0].reshape(2, 8, 8, 8), np.stack([first, second]))
    assert read_star(tmp_path / "c.star").particles["rlnKept"].tolist() == ["07", "08"]
    assert run(*line, *some, "--prefix", "padded", "--pad-outside") == 0
    padded = read_volume(tmp_path / "c/padded_000000.mrc")[0]  # 1.5, 2, 14: from -3, -2, 10
    assert (padded[:, :2] == 0).all() and (padded[:, :, :3] == 0).all()
    assert np.array_equal(padded[:, 2:, 3:], volume[10:18, :6, :5])
    assert "none of 3 cubes" in refused(capsys, *line, "--coord-scale", 50)
    assert "belong together" in refused(capsys, *line, "--tomo-col", "rlnTomoName")
    assert "no row of" in refused(capsys, *line, "--tomo-col", "rlnTomoName", "--tomo-id", "c")
