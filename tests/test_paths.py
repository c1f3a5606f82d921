"""Ways through the codes, and what is done to maps before they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.contour import QuadContourSet

from fake_run import blob, fake_run
from opustomo.analysis import latent_plots, paths
from opustomo.analysis.filters import filtered, gain_of
from opustomo.config import VolumesConfig
from opustomo.errors import UserError


def test_the_way_follows_the_particles_where_the_straight_line_has_none() -> None:
    rng = np.random.default_rng(0)
    angle = np.sort(rng.uniform(0.25 * np.pi, 1.75 * np.pi, 600))
    codes = np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.02, (600, 2))
    rows = paths.graph_path(codes, [0, 300, 599], np.ones(600, bool))
    assert rows[0] == 0 and rows[-1] == 599 and 300 in rows
    way = paths.along(codes[rows], 40)
    np.testing.assert_allclose(np.linalg.norm(way, axis=1), 1, atol=0.1)  # the straight line passes 0.7 from here
    length = np.linalg.norm(np.diff(codes[rows], axis=0), axis=1)
    assert length.max() < 0.3 and length.sum() == pytest.approx(1.5 * np.pi, rel=0.3)
    assert angle[rows[len(rows) // 2]] == pytest.approx(np.pi, abs=0.4)


def test_the_way_is_the_cheapest_of_all() -> None:
    """Against all ways over seven particles, every pair being neighbours."""
    from itertools import permutations

    codes = np.random.default_rng(3).normal(0, 1, (7, 3)) * [3, 1, 1]
    codes = codes[np.argsort(codes[:, 0])]

    def cost(order: tuple[int, ...]) -> float:
        return float(np.square(np.diff(codes[[0, *order, 6]], axis=0)).sum())

    best = min((order for n in range(6) for order in permutations(range(1, 6), n)), key=cost)
    assert len(best) > 1 and paths.graph_path(codes, [0, 6], np.ones(7, bool)).tolist() == [0, *best, 6]


def test_groups_apart_and_equal_codes_are_joined_and_outliers_passed_by() -> None:
    rng = np.random.default_rng(1)
    codes = np.concatenate([np.zeros((30, 2)), rng.normal((50, 0), 0.1, (40, 2)), [[25.0, 0]]])
    rows = paths.graph_path(codes, [3, 60], np.arange(71) < 70)
    assert rows[0] == 3 and rows[-1] == 60 and 70 not in rows
    assert 70 in paths.graph_path(codes, [3, 60], np.ones(71, bool))


def test_points_are_at_equal_distances() -> None:
    way = paths.along(np.array([[0.0, 0], [3, 0], [3, 1]]), 5)
    np.testing.assert_allclose(way, [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]])


def test_ends_are_classes_or_particles(tmp_path: Path) -> None:
    run, _ = fake_run(tmp_path / "run")
    folder = tmp_path / "run" / "analyze.3"
    (folder / "kmeans2").mkdir(parents=True)
    np.savetxt(folder / "kmeans2" / "centers_ind.txt", [7, 11], fmt="%d")

    def config(**given: object) -> VolumesConfig:
        return VolumesConfig(run=run.path, **given)  # type: ignore[arg-type]

    straight = paths.write_path(run, config(kmeans=2, between=(1, 0), points=3), folder)  # type: ignore[arg-type]
    assert straight == folder / "kmeans2_between1-0_3points" / "z_path.txt"
    middle = (run.codes[11] + run.codes[7]) / 2
    np.testing.assert_allclose(np.loadtxt(straight), [run.codes[11], middle, run.codes[7]], rtol=1e-5)
    along = paths.write_path(run, config(path=(1, 0)), folder)  # type: ignore[arg-type]
    assert along == folder / "path1-0" / "z_path.txt" and len(np.loadtxt(along)) == 10
    passed = np.loadtxt(along.with_name("z_path_rows.txt"), dtype=int)
    assert passed[0] == 1 and passed[-1] == 0
    for given, message in (
        ({"path": (1,)}, "two ends"),
        ({"path": (1, 240)}, "particles 0 to 239"),
        ({"kmeans": 2, "path": (0, 2)}, "classes 0 to 1"),
        ({"between": (1, 1)}, "codes are equal"),
        ({"path": (0, 1), "points": 1}, "two points"),
    ):
        with pytest.raises(UserError, match=message):
            paths.write_path(run, config(**given), folder)  # type: ignore[arg-type]


def test_contours_of_the_density_enclose_the_shares_they_are_for() -> None:
    points = np.random.default_rng(0).normal(0, 1, (4000, 2)) * [3, 1] + [5, -2]
    axes = latent_plots.density(points).axes[0]
    (contours,) = (drawn for drawn in axes.collections if isinstance(drawn, QuadContourSet))
    inside = [outline.contains_points(points).mean() for outline in contours.get_paths()]
    np.testing.assert_allclose(inside, [0.9, 0.7, 0.5, 0.3, 0.1], atol=0.04)


# ------------------------------------------------------------------------------------------------ filters of maps


@pytest.mark.parametrize("b", [-400.0, 150.0])
def test_a_b_factor_widens_or_narrows_a_gaussian_as_it_should(b: float) -> None:
    """exp(-r^2 / 2 w^2) has the spectrum exp(-2 pi^2 w^2 s^2): B adds -B / (8 pi^2) to w^2."""
    pitch, width = 2.0, 3.0  # Angstrom a voxel; voxels
    new = np.sqrt(width**2 - b / (8 * np.pi**2) / pitch**2)
    result = filtered(blob(24, 0, 0, 0, width), pitch, gain_of(sharpen=b))
    expected = (width / new) ** 3 * blob(24, 0, 0, 0, new)
    np.testing.assert_allclose(result[6:18, 6:18, 6:18], expected[6:18, 6:18, 6:18], atol=0.004)


def test_low_pass_takes_the_waves_that_are_finer() -> None:
    gain = gain_of(lowpass=10.0)
    np.testing.assert_allclose(gain(np.array([0, 0.09, 0.1, 0.11])), [1, 1, 0.5, 0], atol=1e-6)
    wave = np.cos(2 * np.pi * np.arange(48) / np.array([[12], [4]])).astype(np.float32)  # 24 and 8 Angstrom
    envelope = blob(48, 0, 0, 0, 6.0)
    coarse, fine = (np.abs(filtered(envelope * line, 2.0, gain)).max() for line in wave)
    assert coarse > 0.95 and fine < 0.03


def test_fsc_weights_are_those_of_the_sum_of_both_halves_up_to_where_it_is_lost() -> None:
    at, fsc = np.arange(6) / 100, np.array([0.2, 1.0, 0.5, 0.1, 0.9, 0.9])
    gain = gain_of(fsc=(at, fsc))
    np.testing.assert_allclose(gain(at), [1, 1, np.sqrt(2 * 0.5 / 1.5), 0, 0, 0])
    assert gain(np.array([0.2]))[0] == 0
