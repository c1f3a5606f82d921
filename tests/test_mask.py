"""Masks of maps whose extent is known: balls, shells and specks; lengths in Angstrom, for dsdsh in voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from opustomo import cli
from opustomo.compat import dsdsh
from opustomo.data.inputs import read_mask
from opustomo.data.mrc import read_volume
from star_sets import put_volume

N, PIXEL, RADIUS = 40, 5.0, 45.0  # voxels, Angstrom
Z, Y, X = np.ogrid[:N, :N, :N]
DISTANCE = np.sqrt((Z - 20) ** 2 + (Y - 20) ** 2 + (X - 20) ** 2) * PIXEL


def ball(folder: Path, speck: bool = False, hollow: bool = False, pixel: float = PIXEL) -> Path:
    volume = (DISTANCE <= RADIUS).astype(np.float32)
    if hollow:
        volume[DISTANCE < 20] = 0
    if speck:
        volume[4:8, 4:8, 4:8] = 1
    put_volume(folder / "map.mrc", volume, pixel)
    return folder / "map.mrc"


def mask_of(folder: Path, *options: str, **kind: bool) -> np.ndarray:
    assert cli.main(["mask", str(ball(folder, **kind)), "-o", str(folder / "out"), *options]) == 0
    return read_volume(folder / "out" / "mask.mrc")[0]


def test_margin_and_edge_are_what_was_asked_for_in_angstrom(tmp_path: Path) -> None:
    mask = mask_of(tmp_path, "--threshold", "0.5", "--smooth", "0", "--dilate", "15", "--edge", "30")
    assert (mask[DISTANCE <= RADIUS + 15 - PIXEL] == 1).all() and (mask[DISTANCE >= RADIUS + 45 + PIXEL] == 0).all()
    middle = mask[np.abs(DISTANCE - (RADIUS + 30)) < 1]
    assert abs(middle.mean() - 0.5) < 0.1
    shell = mask[np.abs(DISTANCE - (RADIUS + 22.5)) < 1]  # a quarter of the way: cos^2(pi/8)
    assert abs(shell.mean() - 0.854) < 0.1
    assert read_mask(tmp_path / "out" / "mask.mrc", N, PIXEL).shape == (N, N, N)
    assert (tmp_path / "out" / "mask.png").stat().st_size > 50


def test_a_mask_can_be_shrunk_and_limited(tmp_path: Path) -> None:
    small = mask_of(tmp_path / "a", "--threshold", "0.5", "--smooth", "0", "--dilate", "-15", "--edge", "0")
    assert (small[DISTANCE < RADIUS - 20] == 1).all() and (small[DISTANCE > RADIUS - 10] == 0).all()
    options = ("--threshold", "0.5", "--smooth", "0", "--dilate", "0", "--edge", "0", "--radius", "30")
    limited = mask_of(tmp_path / "b", *options)
    assert np.array_equal(limited == 1, DISTANCE < 30)


def test_parts_and_holes(tmp_path: Path) -> None:
    plain = ("--threshold", "0.5", "--smooth", "0", "--dilate", "0", "--edge", "0", "--radius", "150")
    assert np.array_equal(mask_of(tmp_path / "a", *plain, speck=True, hollow=True) == 1, DISTANCE <= RADIUS)
    kept = mask_of(tmp_path / "b", *plain, "--no-largest", "--no-fill", speck=True, hollow=True)
    assert kept[5, 5, 5] == 1 and kept[20, 20, 20] == 0 and kept.sum() == read_volume(tmp_path / "b/map.mrc")[0].sum()


def test_thresholds_by_deviations_and_by_percentile(tmp_path: Path) -> None:
    """A ramp, of which every threshold keeps a known part."""
    ramp = np.broadcast_to(np.arange(N, dtype=np.float32), (N, N, N)).copy()
    put_volume(tmp_path / "ramp.mrc", ramp, PIXEL)
    plain = ("--smooth", "0", "--dilate", "0", "--edge", "0", "--radius", "190", "--no-fill")
    for i, (option, value, level) in enumerate(
        (("--percentile", "75", 29.25), ("--sigma", "1", 19.5 + np.arange(N).std()), ("--threshold", "12.5", 12.5))
    ):
        out = tmp_path / f"o{i}"
        assert cli.main(["mask", str(tmp_path / "ramp.mrc"), "-o", str(out), option, value, *plain]) == 0
        assert np.array_equal(read_volume(out / "mask.mrc")[0] == 1, ramp > level), option


def test_a_coarser_map_gives_a_mask_in_the_box_of_the_subtomograms(tmp_path: Path) -> None:
    ball(tmp_path)
    assert cli.main(["mask", str(tmp_path / "map.mrc"), "-o", str(tmp_path / "m"), "--box", "60"]) == 0
    mask, pixel = read_volume(tmp_path / "m" / "mask.mrc")
    assert mask.shape == (60, 60, 60) and pixel == pytest.approx(PIXEL * N / 60, rel=1e-6)
    assert mask[30, 30, 30] > 0.98 and mask[30, 30, 30 + 27] < 0.02  # 20 A edge from 55 A on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threshold", "1", "--sigma", "2"), "--threshold and --sigma are both thresholds"),
        (("--percentile", "100"), "--percentile 100: must be between 0 and 100"),
        (("--edge", "-3"), "--edge -3: must be a length"),
        (("--threshold", "5"), "lower the threshold, or give --invert"),
        (("--angpix", "4"), "--angpix 4: the header"),
        (("--box", "31"), "--box 31: must be an even number"),
    ],
)
def test_what_mask_refuses(
    options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["mask", str(ball(tmp_path)), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_masks_are_not_replaced_and_dark_protein_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask_of(tmp_path, "--invert")
    assert "give the map without --invert" in capsys.readouterr().err
    assert cli.main(["mask", str(tmp_path / "map.mrc"), "-o", str(tmp_path / "out")]) == 2
    assert "holds mask.mrc already" in capsys.readouterr().err


def created(folder: Path, *options: str, **kind: bool) -> np.ndarray:
    assert dsdsh.main(["create_mask", str(ball(folder, **kind)), "-o", str(folder / "m.mrc"), *options]) == 0
    mask, pixel = read_volume(folder / "m.mrc")
    assert pixel == PIXEL
    return mask


def test_create_mask_grows_by_voxels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = ball(tmp_path, speck=True)
    volume = read_volume(body)[0] > 0
    options = ("--threshold", "0.5", "--dilate", "3", "--erode", "1", "--largest-component")
    expected = ndimage.binary_erosion(ndimage.binary_dilation(DISTANCE <= RADIUS, iterations=3))
    assert np.array_equal(created(tmp_path, *options, speck=True) == 1, expected)
    opened = ndimage.binary_opening(volume, iterations=3)  # the speck is 4 voxels wide
    assert np.array_equal(created(tmp_path, "--threshold", "0.5", "--open", "3", speck=True) == 1, opened)
    assert not opened[5, 5, 5] and opened.any()
    half = np.percentile(read_volume(body)[0], 50)  # 0
    assert np.array_equal(created(tmp_path, "--percentile", "50", speck=True) == 1, read_volume(body)[0] > half)
    assert dsdsh.main(["create_mask", str(body), "-o", str(body)]) == 2
    assert "is a file that is read here" in capsys.readouterr().err


def test_create_mask_makes_spheres(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = created(tmp_path, "--sphere-radius", "8", "--soft-edge", "4", "--sphere-center", "20", "22", "15")
    away = np.sqrt((Z - 20) ** 2 + (Y - 22) ** 2 + (X - 15) ** 2)
    expected = np.where(away <= 8, 1, np.where(away >= 12, 0, 0.5 + 0.5 * np.cos(np.pi * (away - 8) / 4)))
    assert np.abs(mask - expected).max() < 1e-5
    line = ["create_mask", str(tmp_path / "map.mrc"), "-o", str(tmp_path / "x.mrc"), "--sphere-radius", "8"]
    assert dsdsh.main([*line, "--dilate", "2"]) == 2
    assert "--dilate does not act on a sphere" in capsys.readouterr().err


def test_create_mask_takes_dark_density_and_closes_at_the_edge_of_the_box(tmp_path: Path) -> None:
    volume = np.zeros((N, N, N), np.float32)
    volume[:8, 10:20, 10:20], volume[20:30, 10:20, 10:20], volume[23:26, 10:20, 10:20] = 1, -1, 0
    put_volume(tmp_path / "map.mrc", volume, PIXEL)
    line = ["create_mask", str(tmp_path / "map.mrc"), "-o", str(tmp_path / "m.mrc"), "--threshold", "0.5", "--use-abs"]
    assert dsdsh.main([*line, "--close", "2"]) == 0
    mask = read_volume(tmp_path / "m.mrc")[0]
    expected = np.abs(volume)
    # the gap is three voxels wide and closed but near its rim, where it is open to the side
    inner = (slice(None), slice(12, 18), slice(12, 18))
    expected[23:26] = expected[21]
    assert np.array_equal(mask[inner], expected[inner])
    assert mask[0, 14, 14] == 1
