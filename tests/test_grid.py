"""The sizes of a run follow METHOD section 4."""

from __future__ import annotations

import pytest
import torch

from opustomo.physics.grid import Grid, crop_size, make_grid, mask_extent, template_size, working_size
from opustomo.physics.volume import spherical_mask


@pytest.mark.parametrize(
    ("box", "fraction", "expected"), [(64, 0.5, 32), (100, 0.7, 70), (90, 0.5, 44), (50, 1.0, 50), (200, 0.29, 58)]
)
def test_working_box_is_even_and_never_above_the_fraction(box: int, fraction: float, expected: int) -> None:
    assert working_size(box, fraction) == expected


@pytest.mark.parametrize(("box", "fraction"), [(64, 0.0), (64, 1.01), (64, -0.5), (20, 0.3)])
def test_working_box_refuses_nonsense(box: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="downfrac"):
        working_size(box, fraction)


def test_mask_extent_is_measured_from_voxel_half_n() -> None:
    mask = torch.zeros((20, 20, 20))
    mask[10, 10, 10] = 1
    assert mask_extent(mask) == 0
    mask[10, 3, 10] = 1  # y = -7
    assert mask_extent(mask) == 7
    mask[10, 10, 19] = 1  # x = +9
    assert mask_extent(mask) == 9
    with pytest.raises(ValueError, match="empty"):
        mask_extent(torch.zeros((20, 20, 20)))


def test_crop_is_even_holds_mask_and_margin_and_never_exceeds_the_working_box() -> None:
    assert crop_size(10.0, 4.0, 64) == 28
    assert crop_size(10.1, 4.0, 64) == 30
    assert crop_size(40.0, 4.0, 64) == 64


def test_template_is_a_multiple_of_16_at_or_above_the_crop() -> None:
    assert [template_size(crop) for crop in (16, 18, 32, 46)] == [16, 32, 32, 48]


def test_grid_of_a_run() -> None:
    grid = make_grid(64, 5.0, 0.5, mask_extent(spherical_mask(64, 18, 2)))
    # edge reaches 19 voxels (value above 1e-3), 9.5 working voxels, margin 4 -> 27 -> 28
    assert grid == Grid(64, 5.0, 32, 28, 32)
    assert grid.working_pixel == pytest.approx(10.0)
    assert grid.extent == pytest.approx(320.0)
    odd = make_grid(90, 2.0, 0.5, 20.0, 64)
    assert odd.working_box == 44
    assert odd.working_pixel == pytest.approx(2.0 * 90 / 44)  # not 4.0: the pitch follows the true ratio
    assert odd.templateres == 64
