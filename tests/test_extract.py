"""Boxes from tomograms: what was put into a tomogram comes out of it, where it was and turned as it was."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo import cli
from opustomo.config import ExtractConfig, InputOptions
from opustomo.data.extract import main, wedge
from opustomo.data.mrc import read_volume
from opustomo.data.readers import read_particles, read_transfer_volume
from opustomo.data.star import read_star
from opustomo.errors import UserError
from opustomo.physics.geometry import euler_to_matrix
from stack_writers import relion_angles
from star_sets import put_loop, put_volume

Array = NDArray[np.float64]
N, PIXEL = 24, 6.0
SIZE = np.array([112, 96, 40])  # x, y, z
RANGE = (-62.0, 30.0)
BLOBS: Array = np.array([[0, 0, 0], [5, 0, 0], [0, 4, 2], [-3, -2, 5.0], [-4, 3, -4]])  # no symmetry, no mirror
WEIGHT = [1.0, 1.2, 0.8, 1.0, 0.6]


def density(shape: NDArray[np.int64], centre: Array, turn: Array) -> Array:
    """(z, y, x) of the molecule about ``centre`` (x, y, z); A = turn takes its points there."""
    z, y, x = np.ogrid[: shape[2], : shape[1], : shape[0]]
    found = np.zeros(shape[::-1])
    for (bx, by, bz), weight in zip(centre + BLOBS @ turn.T, WEIGHT, strict=True):
        found += weight * np.exp(-((x - bx) ** 2 + (y - by) ** 2 + (z - bz) ** 2) / (2 * 1.6**2))
    return found


def missing_wedge(volume: Array, low: float, high: float) -> Array:
    """Only what tilts about y from ``low`` to ``high`` see: planes whose normal is (sin t, 0, cos t)."""
    kz = np.fft.fftfreq(volume.shape[0])[:, None, None]
    kx = np.fft.rfftfreq(volume.shape[2])[None, None]
    seen = np.zeros(np.broadcast_shapes(kz.shape, kx.shape), bool)
    for t in np.deg2rad(np.arange(low, high + 0.1, 0.25)):
        seen |= np.abs(kx * np.sin(t) + kz * np.cos(t)) < 0.002
    spectrum = np.fft.rfftn(volume) * seen
    return np.fft.irfftn(spectrum, volume.shape, axes=(0, 1, 2))


def tomograms(folder: Path) -> Path:
    """Two tomograms with 2 x 12 particles on a coarse grid, and a list of them in RELION's columns."""
    rng = np.random.default_rng(1)
    x, y, z = np.meshgrid(np.arange(14, 100, 28), np.arange(14, 84, 28), [20], indexing="ij")
    grid = np.stack([x.ravel(), y.ravel(), z.ravel()], 1).astype(float)
    rows: list[str] = []
    columns: dict[str, list[str]] = {f"rlnCoordinate{axis}": [] for axis in "XYZ"}
    columns |= {f"rlnAngle{name}": [] for name in ("Rot", "Tilt", "Psi")}
    for name in ("TS_1", "TS_2"):
        place = grid + rng.uniform(-1.5, 1.5, grid.shape)
        turns = Rotation.random(len(grid), rng=rng).as_matrix()
        volume = sum(density(SIZE, p, a) for p, a in zip(place, turns, strict=True))
        noisy = volume + rng.normal(0, 0.15, volume.shape)
        put_volume(folder / f"tomo/{name}_6.00A.mrc", missing_wedge(noisy, *RANGE).astype(np.float32), PIXEL)
        rows += [f"{name}.tomostar"] * len(grid)
        for axis, values in zip("XYZ", place.T, strict=True):
            columns[f"rlnCoordinate{axis}"] += [f"{v:.4f}" for v in values]
        for angle, values in zip(("Rot", "Tilt", "Psi"), relion_angles(turns).T, strict=True):
            columns[f"rlnAngle{angle}"] += [f"{v:.4f}" for v in values]
    put_loop(folder / "picks.star", "", columns | {"rlnMicrographName": rows})
    return folder / "picks.star"


@pytest.fixture(scope="module")
def picks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tomograms(tmp_path_factory.mktemp("tomograms"))


def options(picks: Path, output: Path, *more: str) -> list[str]:
    files = [str(path) for path in sorted((picks.parent / "tomo").glob("*.mrc"))]
    return ["extract", str(picks), "-o", str(output), "--tomogram", *files, "--box", str(N),
            "--tilt-range", *map(str, RANGE), *more]  # fmt: skip


def test_average_of_extracted_particles_is_the_molecule(picks: Path, tmp_path: Path) -> None:
    """With the wedge that was there; with its mirror image the map is worse."""
    assert cli.main(options(picks, tmp_path / "out")) == 0
    star = tmp_path / "out/particles.star"
    truth = density(np.full(3, N), np.full(3, N / 2), np.eye(3))
    sphere = np.linalg.norm(np.indices((N,) * 3) - N // 2, axis=0) < 10

    def likeness(output: str) -> float:
        assert cli.main(["average", str(star), "-o", str(tmp_path / output), "--workers", "1"]) == 0
        found, _ = read_volume(tmp_path / output / "average.mrc")
        return float(np.corrcoef(found[sphere], truth[sphere])[0, 1])

    right = likeness("average")
    seen, _ = read_volume(tmp_path / "out/wedge.mrc")
    put_volume(tmp_path / "out/mirrored.mrc", seen[np.r_[0, N - 1 : 0 : -1]], PIXEL)
    star.write_text(star.read_text().replace("wedge.mrc", "mirrored.mrc"))
    mirrored = likeness("mirrored")
    assert right > 0.97 and mirrored < right - 0.01, (right, mirrored)


def test_boxes_keep_what_is_left_of_the_position_as_origin(picks: Path, tmp_path: Path) -> None:
    assert cli.main(options(picks, tmp_path)) == 0
    particles = read_particles(tmp_path / "particles.star", InputOptions())
    listed = read_star(picks).particles
    assert particles.dialect == "RELION 3.1" and particles.transfer == "ctf_volume" and particles.box == N
    assert particles.pixel_size == pytest.approx(PIXEL) and particles.coordinates is not None
    place = np.stack([listed[f"rlnCoordinate{axis}"].astype(float) for axis in "XYZ"], 1)
    assert np.abs(particles.coordinates - particles.origin - place).max() < 1e-4
    assert np.abs(particles.origin).max() <= 0.5 and np.ptp(particles.origin) > 0.5
    box, pixel = read_volume(particles.image_files[20])
    whole, _ = read_volume(picks.parent / "tomo/TS_2_6.00A.mrc")
    x, y, z = particles.coordinates[20].astype(int) - N // 2
    assert np.array_equal(box, whole[z : z + N, y : y + N, x : x + N]) and pixel == pytest.approx(PIXEL)


@pytest.mark.parametrize("axis", ["y", "x"])
def test_wedge_holds_the_planes_of_its_tilts_and_no_others(axis: str, tmp_path: Path) -> None:
    """Planes by the program's own tilts (RELION's sign), or by scipy's rotation about x; also as read from a file."""
    put_volume(tmp_path / "wedge.mrc", wedge(32, *RANGE, axis))
    seen = read_transfer_volume(tmp_path / "wedge.mrc", 32)
    assert np.array_equal(seen, wedge(32, *RANGE, axis))
    radius, along = 14.0, np.deg2rad(np.arange(0, 360, 7.0))
    for tilt in range(-85, 90, 5):
        if axis == "y":
            u, v, _ = euler_to_matrix(torch.tensor([0.0, float(tilt), 0.0])).numpy()
        else:
            v, u, _ = Rotation.from_euler("x", tilt, degrees=True).as_matrix().T  # x and y of the image
        k = np.rint(radius * (np.cos(along)[:, None] * u + np.sin(along)[:, None] * v)).astype(int)
        k = np.where(k[:, :1] < 0, -k, k)
        k = k[(k[:, 0] > 0) & (np.abs(k[:, [0 if axis == "y" else 1, 2]]).max(1) > 9)]  # near the axis all tilts meet
        values = seen[k[:, 2], k[:, 1], k[:, 0]]
        if RANGE[0] + 5 <= tilt <= RANGE[1] - 5:
            assert values.all(), tilt
        elif not RANGE[0] - 5 <= tilt <= RANGE[1] + 5:
            assert not values.any(), tilt


def small(folder: Path, places: list[list[float]], names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        put_volume(folder / f"{name}.mrc", np.random.default_rng(0).normal(size=(20, 30, 40)).astype(np.float32), 5.0)
    columns = {f"rlnCoordinate{axis}": [f"{p[i]}" for p in places] for i, axis in enumerate("XYZ")}
    put_loop(folder / "list.star", "", columns | {"rlnTomoName": names})
    return folder / "list.star"


def config(star: Path, output: Path, **more: object) -> ExtractConfig:
    chosen = {"tomogram": (star.parent / "a.mrc", star.parent / "b.mrc"), "box": 8, "tilt_range": (-60.0, 60.0)} | more
    return ExtractConfig(star, output, **chosen)  # type: ignore[arg-type]


def test_particles_at_the_edge_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    star = small(tmp_path, [[4, 4, 4], [3.4, 20, 10], [36, 26, 16], [36.6, 26, 16]], ["a", "a", "b", "b"])
    with caplog.at_level("INFO"):
        assert main(config(star, tmp_path / "out")) == 0
    named = "left out (left_out.csv): row 2 (a: 3.4, 20.0, 10.0), row 4 (b: 36.6, 26.0, 16.0)"
    assert f"2 of 4 particles are too near the edge and {named}" in caplog.text
    rows = list(csv.DictReader((tmp_path / "out/left_out.csv").read_text().splitlines()))
    assert [row["row"] for row in rows] == ["2", "4"]
    kept = read_star(tmp_path / "out/particles.star").particles
    assert kept["rlnImageName"].tolist() == ["subtomo/a/p000001.mrc", "subtomo/b/p000003.mrc"]
    assert sorted(path.name for path in (tmp_path / "out/subtomo").rglob("*.mrc")) == ["p000001.mrc", "p000003.mrc"]
    with pytest.raises(UserError, match="holds particles"):
        main(config(star, tmp_path / "out"))


def test_coordinates_of_another_pixel_size_and_a_table_of_tomograms(tmp_path: Path) -> None:
    """Coordinates of the unbinned tilt series, tomograms by number."""
    star = small(tmp_path, [[40, 60, 40.5]], ["7"])
    (tmp_path / "table.txt").write_text("# name file\n7 b.mrc\n8 a.mrc\n")
    main(config(star, tmp_path / "out", tomogram=(tmp_path / "table.txt",), coords_angpix=1.25))
    kept = read_star(tmp_path / "out/particles.star").particles
    assert kept[[f"rlnCoordinate{axis}" for axis in "XYZ"]].to_numpy().tolist() == [["10", "15", "10"]]
    assert float(kept["rlnOriginZAngst"][0]) == pytest.approx(-0.125 * 5.0)


WRONG: list[tuple[dict[str, object], str]] = [
    ({"box": 7}, "--box 7: must be an even number"),
    ({"box": 24}, r"no box of 24 voxels lies inside its tomogram, first: row 1 \(a: 20.0"),
    ({"tilt_range": (60.0, -60.0)}, "--tilt-range 60 -60: needs the lowest"),
    ({"angpix": 7.0}, r"a.mrc: pixel size 5 A where 7 A is expected"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_mistakes_are_told_and_leave_nothing(more: dict[str, object], message: str, tmp_path: Path) -> None:
    star = small(tmp_path, [[20, 15, 10]], ["a"])
    with pytest.raises(UserError, match=message):
        main(config(star, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_tomogram_that_no_file_fits_is_named(tmp_path: Path) -> None:
    star = small(tmp_path, [[20, 15, 10], [20, 15, 10]], ["a", "TS_1"])
    with pytest.raises(UserError, match=r"tomogram of row 2 TS_1 is not there among a, b; give --tomogram a text file"):
        main(config(star, tmp_path / "out"))
    put_volume(tmp_path / "other/a.mrc", np.zeros((20, 30, 40), np.float32), 5.0)
    with pytest.raises(UserError, match=r"a\.mrc and .*other/a\.mrc are both named a; give one"):
        main(config(star, tmp_path / "out", tomogram=(tmp_path / "a.mrc", tmp_path / "other/a.mrc")))
    (tmp_path / "table.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="line 1 is not a name and a tomogram"):
        main(config(star, tmp_path / "out", tomogram=(tmp_path / "table.txt",)))
    put_volume(tmp_path / "TS_1_a.mrc", np.zeros((20, 30, 40), np.float32), 1.0)
    put_volume(tmp_path / "TS_1_b.mrc", np.zeros((20, 30, 40), np.float32), 1.0)
    both = (tmp_path / "TS_1_a.mrc", tmp_path / "TS_1_b.mrc", tmp_path / "a.mrc")
    with pytest.raises(UserError, match="TS_1: several files fit"):
        main(config(star, tmp_path / "out", tomogram=both))
    with pytest.raises(UserError, match="does not state the pixel size; give it with --angpix"):
        main(config(small(tmp_path, [[20, 15, 10]], ["TS_1"]), tmp_path / "out", tomogram=both[:1]))
