"""Particle lists of every program say where a particle is and how it is turned; angles by formulas of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.data.lists import ParticleList, read_list
from opustomo.data.lists.write import read_sources, write_list
from opustomo.data.places import Places, tomogram_key
from opustomo.errors import UserError
from stack_writers import relion_angles
from star_sets import put_loop

Array = NDArray[np.float64]
P = 7
PIXEL = 4.0  # of the voxels in the lists
SIZE = np.array([200, 210, 90])  # of the tomogram in voxels of 2 Angstrom
A: Array = Rotation.random(P, random_state=3).as_matrix()
PLACE: Array = np.random.default_rng(4).uniform(10, 40, (P, 3))  # voxels of PIXEL
SHIFT: Array = np.random.default_rng(5).normal(size=(P, 3))
SCORE = np.linspace(0.1, 0.7, P)


def turn_by_hand(axis: str, degrees: Array) -> Array:
    """(P, 3, 3) right-handed rotation of a vector."""
    c, s, one, zero = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), np.ones(P), np.zeros(P)
    rows = {"z": [c, -s, zero, s, c, zero, zero, zero, one], "x": [one, zero, zero, zero, c, -s, zero, s, c]}[axis]
    return np.stack(rows, -1).reshape(P, 3, 3)


ZXZ = np.random.default_rng(6).uniform(-170, 170, (P, 3))  # phi, the, psi
OF_ZXZ = turn_by_hand("z", ZXZ[:, 2]) @ turn_by_hand("x", ZXZ[:, 1]) @ turn_by_hand("z", ZXZ[:, 0])


def text(values: Array) -> list[str]:
    return [f"{value:.6f}" for value in values]


def named(prefix: str, names: str, values: Array, suffix: str = "") -> dict[str, list[str]]:
    return {f"{prefix}{n}{suffix}": text(c) for n, c in zip(names.split(), values.T, strict=True)}


def dynamo(folder: Path) -> Path:
    """Angles from RELION's by the formula of another converter (dyn2rel): rot = narot - 270, psi = tdrot - 90."""
    rot, tilt, psi = relion_angles(A).T
    table = np.zeros((P, 35))
    table[:, 3:6], table[:, 6:9] = SHIFT, np.stack([psi + 90, -tilt, rot + 270], 1)
    table[:, 9], table[:, 19], table[:, 23:26] = SCORE, 12, PLACE - SHIFT
    path = folder / "a.tbl"
    path.write_text("\n".join(" ".join(text(row)) for row in table) + "\n")
    return path


def stopgap(folder: Path) -> Path:
    columns = {"motl_idx": [str(i) for i in range(P)], "tomo_num": ["12"] * P, "halfset": ["A", "B"] * 3 + ["A"]}
    columns |= named("orig_", "x y z", PLACE - SHIFT) | {"score": text(SCORE)}
    columns |= named("", "x y z", SHIFT, "_shift") | named("", "phi the psi", ZXZ)
    put_loop(folder / "motl.star", "stopgap_motivelist", columns)
    return folder / "motl.star"


def pytom(folder: Path) -> Path:
    nodes = []
    for place, shift, (z1, x, z2), score in zip(PLACE - SHIFT, SHIFT, ZXZ, SCORE, strict=True):
        nodes.append(
            f'<Particle Filename="p.em"><Rotation X="{x}" Paradigm="ZXZ" Z1="{z1}" Z2="{z2}"/>'
            f'<Shift Y="{shift[1]}" X="{shift[0]}" Z="{shift[2]}"/>'
            f'<PickPosition Origin="tomo/12.mrc" Y="{place[1]}" Z="{place[2]}" X="{place[0]}"/>'
            f'<Score Type="FLCFScore" Value="{score}"/></Particle>'
        )
    path = folder / "list.xml"
    path.write_text("<ParticleList>" + "".join(nodes) + "</ParticleList>")
    return path


def ndjson(folder: Path) -> Path:
    path = folder / "points.ndjson"
    points = [
        {"type": "orientedPoint", "location": dict(zip("xyz", p, strict=True)), "xyz_rotation_matrix": a.tolist()}
        for p, a in zip(PLACE, A, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, points)))
    return path


def m(folder: Path) -> Path:
    columns = named("wrpCoordinate", "X Y Z", PLACE * PIXEL, "1") | named("wrpCoordinate", "X Y Z", PLACE, "2")
    columns |= named("wrpAngle", "Rot Tilt Psi", relion_angles(A), "1")
    put_loop(folder / "m.star", "", columns | {"wrpSourceName": ["12.tomostar"] * P, "wrpRandomSubset": ["2"] * P})
    return folder / "m.star"


def match_pick(folder: Path) -> Path:
    columns = named("ptmCoordinate", "X Y Z", PLACE) | named("ptmAngle", "Rot Tilt Psi", relion_angles(A))
    columns |= {"ptmLCCmax": text(SCORE), "ptmDetectorPixelSize": ["4.0"] * P, "ptmMicrographName": ["12"] * P}
    put_loop(folder / "ptm.star", "", columns)
    return folder / "ptm.star"


def match_pick5(folder: Path) -> Path:
    centred = PLACE * PIXEL - SIZE * 2 / 2
    columns = named("rlnCenteredCoordinate", "X Y Z", centred, "Angst")
    columns |= named("rlnAngle", "Rot Tilt Psi", relion_angles(A)) | {"rlnLCCmax": text(SCORE)}
    put_loop(folder / "p5.star", "", columns | {"rlnDetectorPixelSize": ["4.0"] * P, "rlnTomoName": ["12"] * P})
    return folder / "p5.star"


def artiax(folder: Path) -> Path:
    columns = {"rlnTomoName": ["12"] * P} | named("rlnCoordinate", "X Y Z", PLACE - SHIFT)
    columns |= named("rlnOrigin", "X Y Z", -SHIFT) | named("rlnAngle", "Rot Tilt Psi", relion_angles(A))
    put_loop(folder / "artiax.star", "particles", columns)
    return folder / "artiax.star"


def warp(folder: Path) -> Path:
    columns = named("rlnCoordinate", "X Y Z", PLACE) | {"rlnMicrographName": ["12.tomostar"] * P}
    columns |= named("rlnAngle", "Rot Tilt Psi", relion_angles(A)) | {"rlnAutopickFigureOfMerit": text(SCORE)}
    put_loop(folder / "picks.star", "", columns)
    return folder / "picks.star"


def relion5(folder: Path) -> Path:
    """Poses and origins in the frame of each subtomogram, origins in Angstrom."""
    sub = Rotation.random(P, random_state=8).as_matrix()
    own = np.einsum("pji,pj->pi", sub, -SHIFT * PIXEL)
    columns = named("rlnCoordinate", "X Y Z", PLACE - SHIFT) | {"rlnTomoName": ["12"] * P}
    columns |= named("rlnAngle", "Rot Tilt Psi", relion_angles(sub.swapaxes(1, 2) @ A))
    columns |= named("rlnTomoSubtomogram", "Rot Tilt Psi", relion_angles(sub))
    columns |= named("rlnOrigin", "X Y Z", own, "Angst") | {"rlnOpticsGroup": ["1"] * P}
    optics = {"rlnOpticsGroup": ["1"], "rlnTomoTiltSeriesPixelSize": ["4.0"], "rlnImagePixelSize": ["8.0"]}
    put_loop(folder / "r5.star", "optics", optics)
    put_loop(folder / "r5.star", "particles", columns, "a")
    return folder / "r5.star"


def relion30(folder: Path) -> Path:
    """Origins in pixels of the subtomograms, twice as large as those that the coordinates count."""
    columns = named("rlnCoordinate", "X Y Z", PLACE - SHIFT) | {"rlnMicrographName": ["tomo/12.mrc"] * P}
    columns |= named("rlnOrigin", "X Y Z", -SHIFT / 2) | named("rlnAngle", "Rot Tilt Psi", relion_angles(A))
    columns |= {"rlnMagnification": ["10000"] * P, "rlnDetectorPixelSize": ["8.0"] * P, "rlnRandomSubset": ["1"] * P}
    put_loop(folder / "r3.star", "", columns)
    return folder / "r3.star"


# writer, program, rotation, whether the file states the pixel size
CASES: list[tuple[Callable[[Path], Path], str, Array, bool]] = [
    (dynamo, "Dynamo", A, False), (stopgap, "STOPGAP", OF_ZXZ, False), (pytom, "PyTom", OF_ZXZ, False),
    (ndjson, "CZ portal", A, False), (m, "M", A, True), (match_pick, "pytom-match-pick", A, True),
    (match_pick5, "pytom-match-pick", A, True), (artiax, "RELION", A, False), (warp, "RELION", A, False),
    (relion5, "RELION", A, True), (relion30, "RELION", A, False),
]  # fmt: skip


def centres(found: ParticleList, coordinate_pixel: float | None = None) -> Array:
    return found.voxels(np.arange(P), 2.0, SIZE, coordinate_pixel)


@pytest.mark.parametrize(("write", "kind", "rotation", "stated"), CASES, ids=[case[0].__name__ for case in CASES])
def test_every_list_places_the_particles(
    write: Callable[[Path], Path], kind: str, rotation: Array, stated: bool, tmp_path: Path
) -> None:
    found = read_list(write(tmp_path))
    assert found.kind == kind and len(found) == P
    assert np.abs(found.rotation - rotation).max() < 1e-6
    # the tomogram has voxels of 2 Angstrom: twice the numbers of the list
    assert np.abs(centres(found, None if stated else PIXEL) - PLACE * 2).max() < 1e-4
    assert write is ndjson or {tomogram_key(name) for name in found.tomogram} == {"12"}
    if write in (dynamo, stopgap, pytom, match_pick, match_pick5, warp):
        assert np.allclose(found.score, SCORE, atol=1e-6)
    halves = {stopgap: [1, 2, 1, 2, 1, 2, 1], m: [2] * P, relion30: [1] * P}.get(write, [0] * P)
    assert found.half.tolist() == halves


def test_without_a_word_coordinates_count_voxels_of_the_tomogram(tmp_path: Path) -> None:
    assert np.abs(centres(read_list(warp(tmp_path))) - PLACE).max() < 1e-5
    assert np.abs(centres(read_list(match_pick(tmp_path)), 2.0) - PLACE).max() < 1e-5  # typed wins over the file


def test_the_portals_matrix_has_relions_angles_as_its_users_compute_them() -> None:
    """Angles of RELION from xyz_rotation_matrix as published for RECOVAR: of the inverse, intrinsic ZYZ."""
    assert np.allclose(Rotation.from_matrix(A).inv().as_euler("ZYZ", degrees=True), relion_angles(A))


def test_coordinates_of_warptools_count_pixels_of_its_subtomograms(tmp_path: Path) -> None:
    """The optics table states the pixel size of the tilt series too, which RELION's coordinates count."""
    columns = named("rlnCoordinate", "X Y Z", PLACE) | {"rlnOpticsGroup": ["1"] * P}
    optics = {"rlnOpticsGroup": ["1"], "rlnTomoTiltSeriesPixelSize": ["1.0"], "rlnImagePixelSize": ["4.0"]}
    for name, factor in (("12.tomostar", 2.0), ("12", 0.5)):
        put_loop(tmp_path / "a.star", "optics", optics)
        put_loop(tmp_path / "a.star", "particles", columns | {"rlnMicrographName": [name] * P}, "a")
        assert np.abs(centres(read_list(tmp_path / "a.star")) - PLACE * factor).max() < 1e-4


def test_poses_that_change_in_time_are_told(tmp_path: Path) -> None:
    assert "first ones are used" in read_list(m(tmp_path)).notes[0]


WRONG = [
    ("a.tbl", "1 2 3\n", r"a.tbl: row 1 has 3 columns"),
    ("a.tbl", "\n" + "1 " * 25 + "2+1i\n", r"row 2, column 26: '2\+1i' is not a number that is possible"),
    ("a.tbl", "\n", "has no particles"),
    ("a.xml", "<ParticleList/>", "has no particles"),
    ("a.xml", "<ParticleList>", r"a.xml: is not XML \("),
    ("a.xml", "<L><Particle><Rotation/></Particle></L>", "particle 1 has no <PickPosition>"),
    (
        "a.xml",
        '<L><Particle><PickPosition X="1" Y="2" Z="a"/></Particle></L>',
        r"particle 1, <PickPosition> Z: 'a' is not a number that is possible",
    ),
    ("a.ndjson", '{"location": {"x": 1, "y": 2}}', r"line 1 is no point with a location x, y, z"),
    ("a.ndjson", "[1, 2]", "line 1 is no point"),
    (
        "a.ndjson",
        '{"location": {"x": 1, "y": 2, "z": 3}, "xyz_rotation_matrix": [[1,0,0],[0,1,0],[0,0,-1]]}',
        "line 1: xyz_rotation_matrix is no rotation",
    ),
    ("a.csv", "1,2,3", "which program wrote this list is not known"),
    ("a.star", "data_\n\nloop_\n_rlnTomoName\na\n", "has neither _rlnCoordinateX/Y/Z"),
    ("a.star", "data_\n\nloop_\n_wrpCoordinateX1\n1\n", "no column _wrpCoordinateY1"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_lists_that_cannot_be_read_say_why(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_list(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.tbl: no such file"):
        read_list(tmp_path / "none.tbl")


@pytest.mark.parametrize("kind", ["artiax", "warp", "m"])
def test_written_lists_are_read_again(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.source").write_text(
        '<?xml version="1.0" encoding="utf-16"?><DataSource><Files><File Hash="0AF3" Name="sub/12.tomostar" /></Files>'
        "</DataSource>",
        encoding="utf-16",
    )
    sources = read_sources(tmp_path / "x.source")
    places = Places(PLACE * PIXEL, A, np.array(["tomograms/12.mrc"] * P, object), PIXEL)
    half, classes = np.array([0, 1, 2, 0, 1, 2, 0]), np.arange(P)
    path = tmp_path / "out.star"
    write_list(path, kind, places, half, classes, sources)  # type: ignore[arg-type]
    found = read_list(path)
    assert np.abs(centres(found, PIXEL) - PLACE * 2).max() < 1e-4
    assert np.abs(found.rotation - A).max() < 1e-6 and {tomogram_key(n) for n in found.tomogram} == {"12"}
    assert found.half.tolist() == ([1, 1, 2, 2, 1, 2, 1] if kind == "m" else half.tolist())
    content = path.read_text()
    if kind == "m":
        assert content.count("0AF3") == P and content.count("sub/12.tomostar") == P
        with pytest.raises(UserError, match=r"--m-source: has no tilt series 12 \(it has 13 \.\.\.\)"):
            write_list(path, "m", places, half, classes, {"13": ("13.tomostar", "ff")})
        (tmp_path / "x.source").write_text("<DataSource/>")
        with pytest.raises(UserError, match="lists no files"):
            read_sources(tmp_path / "x.source")
    else:
        assert "rlnClassNumber" in content
    assert (content.count("12.tomostar") == P) == (kind in ("warp", "m"))
