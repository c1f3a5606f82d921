"""Written maps: exact pixel size, in register with the consensus map, the right hand, the right density."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from scipy import ndimage

from fake_run import GRID, ZDIM, blob, fake_run
from opustomo.analysis import volumes
from opustomo.config import VolumesConfig
from opustomo.errors import UserError


def _centre_of_mass_angstrom(path: Path) -> np.ndarray:
    """(x, y, z) where ChimeraX would show the density."""
    with mrcfile.open(path) as mrc:
        origin = np.array([float(mrc.header.origin[axis]) for axis in "xyz"])
        return origin + np.array(ndimage.center_of_mass(mrc.data.astype(float))[::-1]) * float(mrc.voxel_size.x)


@pytest.mark.parametrize(("angpix", "box"), [(None, 0), (10.0, 32), (7.3, 0), (3.3712, 64), (14.6, 0), (5.0, 48)])
def test_header_is_exact_and_the_map_overlays_the_consensus(tmp_path: Path, angpix: float | None, box: int) -> None:
    run, _ = fake_run(tmp_path)
    codes = np.array([[2.0, 3, 0, 0]])
    (path,) = volumes.write_volumes(run, codes, volumes.MapFiles(tmp_path / "out", angpix=angpix, box=box))
    assert path == tmp_path / "out" / "reference0.mrc" and mrcfile.validate(str(path))
    with mrcfile.open(path) as mrc:
        n = mrc.data.shape[0]
        assert mrc.data.shape == (n, n, n) and n % 2 == 0 and (not box or n == box)
        assert float(mrc.header.cella.x) == pytest.approx(n * (angpix or 10.0), rel=1e-6)
    # the consensus map: box 48 at 5 A, voxel 0 at the origin, so the crop's centre voxel lies at 120 A
    decoded = run.decode(codes)[0].astype(float)
    expected = 24 * 5.0 + (np.array(ndimage.center_of_mass(decoded)[::-1]) - GRID.crop // 2) * GRID.working_pixel
    np.testing.assert_allclose(_centre_of_mass_angstrom(path), expected, atol=0.15)


@pytest.mark.parametrize("pixel", [3.37, 8.0, 10.0])
def test_finer_samples_lie_on_the_same_function(pixel: float) -> None:
    # a Gaussian of 2 voxels is band-limited to 1e-4 of its height at this sampling
    fine = volumes.resample(blob(24, 1, -2, 0.5), 10.0, pixel, 40)
    ratio = pixel / 10.0
    expected = blob(40, 1 / ratio, -2 / ratio, 0.5 / ratio, 2.0 / ratio)
    inside = np.abs(np.arange(40) - 20) * ratio <= 12
    expected = expected * inside[:, None, None] * inside[None, :, None] * inside[None, None, :]
    np.testing.assert_allclose(fine, expected, atol=2e-3)


def test_coarse_samples_are_low_passed_not_aliased() -> None:
    volume = blob(32, 0, 0, 0, 3.0)
    checker = np.where(np.indices((32, 32, 32)).sum(0) % 2 == 0, 1.0, -1.0) * blob(32, 0, 0, 0, 4.0)
    clean, noisy = (volumes.resample(v.astype(np.float32), 5.0, 10.0, 16) for v in (volume, volume + checker))
    np.testing.assert_allclose(noisy, clean, atol=0.02)
    # densities, not sums: the height of the blob stays
    assert clean[8, 8, 8] == pytest.approx(1.0, abs=0.02)


def test_box_only_pads(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path)
    small, large = (
        volumes.write_volumes(run, np.zeros((1, ZDIM)), volumes.MapFiles(tmp_path / str(box), angpix=8.0, box=box))[0]
        for box in (0, 60)
    )
    a, b = mrcfile.read(small), mrcfile.read(large)
    start = 30 - len(a) // 2
    part = slice(start, start + len(a))
    np.testing.assert_array_equal(b[part, part, part], a)
    rest = b.copy()
    rest[part, part, part] = 0
    assert not rest.any()


@pytest.mark.parametrize("angpix", [None, 7.3])
def test_flip_mirrors_z_about_the_centre_voxel(tmp_path: Path, angpix: float | None) -> None:
    run, _ = fake_run(tmp_path)
    codes = np.array([[3.0, 3, 0, 0]])
    (plain,) = volumes.write_volumes(run, codes, volumes.MapFiles(tmp_path / "a", angpix=angpix))
    (flipped,) = volumes.write_volumes(run, codes, volumes.MapFiles(tmp_path / "b", angpix=angpix, flip=True))
    a, b = mrcfile.read(plain), mrcfile.read(flipped)
    np.testing.assert_allclose(b[1:], a[1:][::-1], atol=1e-5)
    x, y, z = _centre_of_mass_angstrom(plain)
    np.testing.assert_allclose(_centre_of_mass_angstrom(flipped), [x, y, 240 - z], atol=0.1)
    assert abs(z - 120) > 1


@pytest.mark.parametrize(
    ("angpix", "box", "message"),
    [
        (0.0, 0, "pixel size in Angstrom above 0"),
        (float("nan"), 0, "pixel size in Angstrom above 0"),
        (0.01, 0, "a box of 20000 voxels"),
        (1000.0, 0, "a box of 2 voxels"),
        (10.0, 18, "even and at least 20"),
        (10.0, 33, "even and at least 20"),
    ],
)
def test_pixel_sizes_and_boxes_that_do_not_fit(tmp_path: Path, angpix: float, box: int, message: str) -> None:
    run, _ = fake_run(tmp_path)
    with pytest.raises(UserError, match=message):
        volumes.write_volumes(run, np.zeros((1, ZDIM)), volumes.MapFiles(tmp_path / "out", angpix=angpix, box=box))
    assert not (tmp_path / "out").exists()


def test_lists_of_codes_name_the_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "z.txt"
    path.write_text("# codes\n1 2 3 4\n\n5, 6, 7, 8e-1\n")
    np.testing.assert_allclose(volumes.read_codes(path, 4), [[1, 2, 3, 4], [5, 6, 7, 0.8]])
    for text, message in (
        ("1 2 3 4\n1 2 3\n", "row 2 has 3 columns"),
        ("1 2 3 x\n", "row 1: .*'x'"),
        ("1 2 nan 4\n", "row 1 .* not finite"),
        ("\n", "has no codes"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            volumes.read_codes(path, 4)
    with pytest.raises(UserError, match=r"missing\.txt: cannot be read"):
        volumes.read_codes(tmp_path / "missing.txt", 4)


def test_codes_of_axes_and_groups_come_from_the_analysis(tmp_path: Path) -> None:
    """--axis J and --groups read what analyze found; an axis that is not there is named with those that are."""
    run, _ = fake_run(tmp_path)
    folder = run.path / f"analyze.{run.epoch}"
    for name in ("axis1/z_axis.txt", "groups/centers.txt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("1 2 3 4\n")
    source = volumes._source
    assert source(run, VolumesConfig(run.path, axis=1)) == folder / "axis1" / "z_axis.txt"  # type: ignore[arg-type]
    assert source(run, VolumesConfig(run.path, groups=True)) == folder / "groups" / "centers.txt"  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--axis 2: .*axes 1 to 1"):
        source(run, VolumesConfig(run.path, axis=2))  # type: ignore[arg-type]
